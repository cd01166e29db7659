"""What a layout is: an order of a packed matrix in memory, and the code that multiplies it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from ulbq import formats
from ulbq.formats import AnyScheme
from ulbq.kernels import ops
from ulbq.kernels.banks import Bank
from ulbq.kernels.ops.dense import Dense
from ulbq.kernels.product import Product

Tensors = Mapping[str, torch.Tensor]


class Case(NamedTuple):
    """A product to be made.

    Attributes:
        scheme: the weight's.
        out_features, in_features: the weight's dimensions.
        device: ``cpu``, ``cuda``, ….
        dtype: of the activations.
        rows: of the activations.
        differentiable: whether a gradient of the activations will be asked for.
    """

    scheme: AnyScheme
    out_features: int
    in_features: int
    device: str
    dtype: torch.dtype
    rows: int
    differentiable: bool = False


class Layout:
    """A layout, and the backend that reads it; what is not said otherwise is that of tensors as stored.

    Attributes:
        name: of the backend.
        summary: what it does, for people.
        device: the only one that it runs on; None for all.
        formats: names of those that it takes; None for all.
        form: that its tensors have for :func:`ulbq.kernels.ops.multiply`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    device: ClassVar[Literal["cpu", "cuda"] | None] = None
    formats: ClassVar[tuple[str, ...] | None] = None
    form: ClassVar[str] = "planes"

    def unavailable_reason(self) -> str | None:
        """Why this machine has it not; None where it has."""
        return None

    def unsupported_reason(self, scheme: Any, out_features: int, in_features: int) -> str | None:
        """Why it does not take a matrix in one of its formats, whatever the machine; None where it does."""
        return None

    def call_reason(self, case: Case) -> str | None:
        """Why it does not take the activations for a matrix that it takes; None where it does."""
        return None

    def pack(self, scheme: Any, stored: Tensors, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
        """The tensors that :meth:`multiply` takes, by name. It takes milliseconds."""
        return dict(stored)

    def unpack(self, scheme: AnyScheme, tensors: Tensors, out_features: int, in_features: int) -> Tensors:
        """The stored tensors that :meth:`pack` was given, bit for bit."""
        return {name: tensors[name] for name in scheme.tensors(out_features, in_features)}

    def matrix(
        self, scheme: AnyScheme, tensors: Tensors, out_features: int, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """What :func:`ulbq.formats.matrix` gives of the stored tensors."""
        if self.form != "planes" and scheme.format in ops.linear.OPERANDS:
            packed = ops.linear.matrix(scheme, self.form, tensors, out_features, in_features)
            if isinstance(packed, Dense):
                return packed.dense(dtype, next(iter(tensors.values())).device)
        stored = self.unpack(scheme, tensors, out_features, in_features)
        return formats.matrix(scheme, stored, in_features, dtype)

    def rows(
        self, scheme: Any, tensors: Tensors, chosen: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows ``[n, in]`` of a symmetric affine matrix in ``dtype``, int64 ``[n]`` their numbers."""
        some = {"codes": tensors["codes"][:, chosen], "scales": tensors["scales"][chosen]}
        return formats.dequantize(scheme, some, in_features, dtype)

    def prefers_dense(self, x: torch.Tensor) -> bool:
        """Whether one who kept the dense weight does better with it than :meth:`multiply` does."""
        return True

    def bank(self, scheme: AnyScheme) -> type[Bank] | None:
        """What multiplies several of its matrices in one call; None for nothing."""
        return None

    def product(
        self, scheme: Any, tensors: Tensors, shape: tuple[int, int], bias: torch.Tensor | None, *, exact: bool
    ) -> Product | None:
        """What tokens are multiplied with (:mod:`ulbq.kernels.decode`); None for nothing.

        Args:
            scheme, tensors: of the matrix, as for :meth:`multiply`.
            shape: its outputs and inputs.
            bias: float32 ``[out]``, or None.
            exact: inputs are rounded to 24 bits of their largest, not to 14 (signs) or 16.
        """
        return None

    def multiply(self, scheme: AnyScheme, tensors: Tensors, x: torch.Tensor, out_features: int) -> torch.Tensor:
        """The product ``[..., out]`` of inputs ``[..., in]``, in their dtype, without a bias."""
        return ops.multiply(scheme, self.form, tensors, x, out_features)


class StoredLayout(Layout):
    """Tensors as artifacts store them: products of dense weights, some outputs at a time where the format can."""

    name = "dense"
    summary = "slabs of dense weights, then torch's product: everything, on every device"


def one_of(dtype: torch.dtype, *known: torch.dtype) -> str | None:
    """Why activations of a dtype are not taken; None for those that are."""
    if dtype in known:
        return None
    names = [str(each).removeprefix("torch.") for each in (dtype, *known)]
    allowed = f"{', '.join(names[1:-1])} or {names[-1]}" if len(known) > 1 else f"{names[-1]} only"
    return f"{names[0]} activations: {allowed}"
