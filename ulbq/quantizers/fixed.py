"""Codes that are decided: scales train alone, and what lies in memory are the packed codes (EfficientQAT's E2E-QP).

The quantizers that let weights move choose codes anew at every call. After their training many weights lie at the very
border of their codes' cells, as near to the full-precision ones as the codes allow; a change of the scale by a
thousandth would undo what the codes have learnt.

Zero points are b-bit integers, so where they train they are real numbers that are rounded at every call, with a
gradient that passes straight through.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme, TrellisScheme, binary_mos
from ulbq.formats import trellis as trellis_format
from ulbq.formats.bits import BaseScheme, pack_planes, unpack_planes
from ulbq.kernels import fake_quantize, trellis
from ulbq.quantizers.base import SCALE_FLOOR, Quantizer
from ulbq.quantizers.binary_mos import BinaryMosQuantizer


class Dequantize(torch.autograd.Function):
    """``s (q − z)`` of codes that are unpacked anew in the backward pass, so that no unpacked matrix is kept for it.

    Gradients: to a scale the sum of the incoming one times ``q − z`` over its group, to a zero point ``−s`` times the
    group's sum. Without zero points every plane is a code of its own, and the weight is their sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        planes: torch.Tensor,
        columns: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.planes, ctx.columns = planes, columns  # the buffer itself: nothing is kept beside it
        ctx.save_for_backward(scales, zeros)
        if fake_quantize.takes_planes(planes, scales, columns, dtype):
            return fake_quantize.fixed(planes, scales, zeros, dtype)
        weight = _levels(planes, columns, scales, zeros).mul_(scales.unsqueeze(-1))
        while weight.dim() > 3:
            weight = weight.sum(0)
        return weight.flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        (scales, zeros), planes = ctx.saved_tensors, ctx.planes
        if fake_quantize.takes_planes(planes, scales, ctx.columns, gradients[0].dtype):
            found = fake_quantize.fixed_back(planes, scales, zeros, gradients[0], to_zeros=ctx.needs_input_grad[1])
            return *found, None, None, None
        gradient = gradients[0].to(scales.dtype).view(*scales.shape[-2:], -1)
        to_scales = _levels(planes, ctx.columns, scales, zeros).mul_(gradient).sum(-1)
        to_zeros = -gradient.sum(-1) * scales if ctx.needs_input_grad[1] else None
        return to_scales, to_zeros, None, None, None


def _levels(planes: torch.Tensor, columns: int, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """What the scales ``[..., out, G]`` multiply, ``[..., out, G, g]`` in their dtype."""
    if zeros is None:
        codes = torch.stack([unpack_planes(plane.unsqueeze(0), columns) for plane in planes])
    else:
        codes = unpack_planes(planes, columns)
    levels = codes.view(*scales.shape, -1).to(scales.dtype)
    return levels if zeros is None else levels.sub_(zeros.unsqueeze(-1))


class FixedCodes(Quantizer):
    """Packed codes that stay.

    Args:
        tensors: as packed.
        scheme: of the format.
        in_features: columns.
    """

    Scheme: ClassVar[type[BaseScheme]]

    @abstractmethod
    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: Any, in_features: int) -> None:
        super().__init__()

    @classmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says; ``train_weights`` must be False."""
        if train_weights:
            raise ValueError("the codes are fixed")
        if not isinstance(scheme, cls.Scheme):
            raise TypeError(f"{scheme.format} is not what {cls.__name__} holds")
        return cls(tensors, scheme, weight.shape[1])


class _Fixed(FixedCodes):
    """A packed matrix whose scales train.

    Args:
        tensors: as packed.
        scheme: of the format.
        in_features: columns.

    Attributes:
        scales: as stored, ``[..., out, G]`` float32, relative to where they started.
        start: where they started, float16 as stored.
    """

    start: torch.Tensor

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, in_features: int) -> None:
        super().__init__(tensors, scheme, in_features)
        self.scheme = scheme
        self._in_features = in_features
        self._names = [name for name in tensors if name != "scales"]
        for name in self._names:
            self.register_buffer(f"packed_{name}", tensors[name])
        self.register_buffer("start", tensors["scales"])
        self.scales = nn.Parameter(torch.ones_like(tensors["scales"], dtype=torch.float32))

    def offsets(self) -> torch.Tensor | None:
        """Zero points ``[out, G]`` in the scales' dtype, differentiable where they train; None for none."""
        return None

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` in ``dtype``, differentiable in what trains."""
        planes = self.get_buffer("packed_codes")
        weight: torch.Tensor = Dequantize.apply(self._absolute(), self.offsets(), planes, self._in_features, dtype)  # type: ignore[no-untyped-call]
        return weight

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``scales``."""
        return {"weights": [], "scales": [self.scales]}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; scales are rounded to float16 only here."""
        packed = {name: self.get_buffer(f"packed_{name}") for name in self._names}
        return packed | {"scales": self._absolute().to(torch.float16)}

    def _absolute(self) -> torch.Tensor:
        """The scales themselves; those that were stored as 0 start at a floor that float16 could not hold."""
        start = self.start.to(self.scales.dtype)
        return self.scales * torch.where(start == 0, SCALE_FLOOR, start)


class FixedAffine(_Fixed):
    """Affine codes that stay, and zero points that stay or train.

    Attributes:
        zeros: ``[out, G]`` float32, of which the nearest integers in ``[0, 2^b)`` count; None where they do not train.
    """

    Scheme = AffineScheme
    scheme: AffineScheme

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, in_features: int) -> None:
        super().__init__(tensors, scheme, in_features)
        self.zeros: nn.Parameter | None = None

    def let_zeros_train(self) -> Self:
        """Let the zero points move, from where they are. Raises ValueError for a symmetric grid, which has none."""
        if self.scheme.symmetric:
            raise ValueError("a symmetric grid has no zero points")
        self.zeros = nn.Parameter(self._stored_zeros().to(self.scales.dtype))
        return self

    def offsets(self) -> torch.Tensor:
        """Zero points ``[out, G]`` in the scales' dtype; those that train rounded, straight-through."""
        if self.zeros is not None:
            rounded: torch.Tensor = _RoundInto.apply(self.zeros, 2**self.scheme.bits - 1)  # type: ignore[no-untyped-call]
            return rounded
        if self.scheme.symmetric:
            return torch.full_like(self.scales, self.scheme.centre, requires_grad=False)
        return self._stored_zeros().to(self.scales.dtype)

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``scales``, and ``zeros`` where they train."""
        return super().trainable() | ({} if self.zeros is None else {"zeros": [self.zeros]})

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format."""
        packed = super().finalize()
        if self.zeros is not None:
            packed["zeros"] = pack_planes(self.offsets().to(torch.uint8).flatten(), self.scheme.bits)
        return packed

    def _stored_zeros(self) -> torch.Tensor:
        return unpack_planes(self.get_buffer("packed_zeros"), self.start.numel()).view_as(self.start)


class _RoundInto(torch.autograd.Function):
    """The nearest integers in ``[0, top]``.

    The gradient passes through the clamping too: a zero point that went beyond the border has to find its way back.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, top: int) -> torch.Tensor:
        return values.round().clamp_(0, top)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class FixedDualBinary(_Fixed):
    """Two bit planes that stay."""

    Scheme = DualBinaryScheme
    scheme: DualBinaryScheme


class FixedBinaryMos(FixedCodes, BinaryMosQuantizer):
    """Signs that stay, packed; scales, router and zeros train.

    Args:
        tensors: as packed.
        scheme: of the format.
        in_features: columns.
    """

    Scheme = BinaryMosScheme

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: BinaryMosScheme, in_features: int) -> None:
        Quantizer.__init__(self)
        self.scheme = scheme
        self._hold(binary_mos.unpack(scheme, tensors, in_features))
        self.register_buffer("packed_codes", tensors["codes"])

    def _signs(self, dtype: torch.dtype) -> torch.Tensor:
        return unpack_planes(self.get_buffer("packed_codes"), self.in_unit.shape[1]).to(dtype).mul_(2).sub_(1)

    def _weights(self) -> list[nn.Parameter]:
        return []


class FixedTrellis(FixedCodes):
    """Trellis codes that stay; the vectors around the transforms train.

    What :meth:`forward` gives is the matrix between the transforms, which no gradient goes to: a product multiplies by
    it, and the gradients of both vectors come from inputs and outputs alone.

    Args:
        tensors: as packed.
        scheme: of the format.

    Attributes:
        su, sv: ``[in]`` and ``[out]`` float32, relative to where they started.
        start_su, start_sv: where they started, float16 as stored.
    """

    Scheme = TrellisScheme
    scheme: TrellisScheme
    start_su: torch.Tensor
    start_sv: torch.Tensor

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: TrellisScheme, in_features: int) -> None:
        super().__init__(tensors, scheme, in_features)
        self.scheme = scheme
        self.register_buffer("packed_codes", tensors["codes"])
        self.register_buffer("start_su", tensors["su"])
        self.register_buffer("start_sv", tensors["sv"])
        self.su = nn.Parameter(torch.ones_like(self.start_su, dtype=torch.float32))
        self.sv = nn.Parameter(torch.ones_like(self.start_sv, dtype=torch.float32))

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``T`` ``[out, in]`` in ``dtype``."""
        return trellis.decode(self.scheme, self.get_buffer("packed_codes"), dtype)

    def multiply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """``sv ⊙ H(T · H(su ⊙ x))``, in the dtype of the matrix; what is between the products is float32."""
        su, sv = self._absolute()
        inner = trellis.transform(x.to(su.dtype) * su)
        product = nn.functional.linear(inner.to(matrix.dtype), matrix)
        return (trellis.transform(product.to(sv.dtype)) * sv).to(matrix.dtype)

    def dense(self, matrix: torch.Tensor) -> torch.Tensor:
        """The weight ``[out, in]``, differentiable in both vectors."""
        su, sv = self._absolute()
        return trellis_format.between(matrix.to(su.dtype), su, sv)

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``scales``."""
        return {"weights": [], "scales": [self.su, self.sv]}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; vectors are rounded to float16 only here."""
        su, sv = (vector.to(torch.float16) for vector in self._absolute())
        return {"codes": self.get_buffer("packed_codes"), "su": su, "sv": sv}

    def _absolute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors themselves; those that were stored as 0 start at a floor that float16 could not hold."""
        su, sv = (start.to(self.su.dtype) for start in (self.start_su, self.start_sv))
        return self.su * torch.where(su == 0, SCALE_FLOOR, su), self.sv * torch.where(sv == 0, SCALE_FLOOR, sv)
