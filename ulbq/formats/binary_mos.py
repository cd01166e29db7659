"""BinaryMoS (https://arxiv.org/abs/2406.12311): signs, and scales that a router mixes anew for every token.

``y = ((x ⊙ s_in(x)) · (B + z)ᵀ) ⊙ s_out(x)`` with ``B ∈ {−1, +1}``, ``G = softmax(x·Rᵀ)``, ``s_in = G·S_in`` and
``s_out = G·S_out``. Stored tensors of an ``[out, in]`` matrix with ``e`` experts:

* ``codes``      uint8 ``[1, out, ceil(in/8)]``: a one for ``+1``;
* ``in_scales``  float16 ``[e, in]`` and ``out_scales`` float16 ``[e, out]``;
* ``router``     float16 ``[e, in]``; none for one expert, whose gate is always 1;
* ``zeros``      float16 ``[out]`` or ``[in]``: shifts the two levels of a row or column to ``−1 + z`` and ``1 + z``
  (ULB-SAPR's addition).

With one expert this is OneBit's matrix ``diag(s_out) · (B + z) · diag(s_in)``, and exactly a dense weight.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from ulbq.config.groups import Zeros
from ulbq.formats.bits import BaseScheme, Format, TensorSpec, pack_planes, packed_length, unpack_planes


class BinaryMosScheme(BaseScheme):
    """Parameters of the format.

    Attributes:
        experts: pairs of scale vectors.
        zeros: a zero point for every output or input channel, or none.
    """

    format: Literal["binary_mos"] = "binary_mos"
    experts: int = Field(default=4, ge=1)
    zeros: Zeros = "none"

    @property
    def bits(self) -> int:
        """Bits per code: the sign."""
        return 1

    @property
    def group_size(self) -> int:
        """-1: whole rows and columns share their scales."""
        return -1

    @property
    def is_one_matrix(self) -> bool:
        """Of one expert; a mixture has another weight for every token."""
        return self.experts == 1

    @property
    def label(self) -> str:
        """Short name, as in ``w1e4``; ``-zo`` and ``-zi`` are zero points of outputs and of inputs."""
        return f"w1e{self.experts}" + {"none": "", "output": "-zo", "input": "-zi"}[self.zeros]

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the stored tensors of one matrix."""
        experts = self.experts
        specs = {
            "codes": TensorSpec(dtype="uint8", shape=(1, out_features, packed_length(in_features)), role="codes"),
            "in_scales": TensorSpec(dtype="float16", shape=(experts, in_features), role="scales"),
            "out_scales": TensorSpec(dtype="float16", shape=(experts, out_features), role="scales"),
        }
        if experts > 1:
            specs["router"] = TensorSpec(dtype="float16", shape=(experts, in_features), role="router")
        if self.zeros != "none":
            count = out_features if self.zeros == "output" else in_features
            specs["zeros"] = TensorSpec(dtype="float16", shape=(count,), role="zeros")
        return specs


class Mixture(NamedTuple):
    """A matrix in float32: signs ``[out, in]``, scales and router as stored, zeros as stored or None."""

    signs: torch.Tensor
    in_scales: torch.Tensor
    out_scales: torch.Tensor
    router: torch.Tensor | None
    zeros: torch.Tensor | None


def pack(
    scheme: BinaryMosScheme,
    signs: torch.Tensor,
    in_scales: torch.Tensor,
    out_scales: torch.Tensor,
    router: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Pack one matrix.

    Args:
        signs: ``[out, in]``; what is negative is stored as −1, anything else, zeros included, as +1.
        in_scales, out_scales: ``[e, in]`` and ``[e, out]``, stored as float16, like the router and the zeros.
        router: ``[e, in]``; must be given exactly where there is more than one expert.
        zeros: ``[out]`` or ``[in]``; must be given exactly where the scheme has zeros.

    Raises:
        ValueError: a tensor is missing, or given and not stored, or its shape does not fit.
    """
    given = {"in_scales": in_scales, "out_scales": out_scales, "router": router, "zeros": zeros}
    specs = scheme.tensors(signs.shape[0], signs.shape[1])
    tensors = {"codes": pack_planes((signs >= 0).to(torch.uint8), 1)}
    for name, tensor in given.items():
        wanted = specs[name].shape if name in specs else None
        if wanted != (None if tensor is None else tuple(tensor.shape)):
            raise ValueError(f"'{name}' must be {'absent' if wanted is None else list(wanted)}")
        if tensor is not None:
            tensors[name] = tensor.to(torch.float16).contiguous()
    return tensors


def unpack(scheme: BinaryMosScheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> Mixture:
    """Undo :func:`pack`."""
    signs = unpack_planes(tensors["codes"], in_features).float().mul_(2).sub_(1)
    router = tensors["router"].float() if scheme.experts > 1 else None
    zeros = tensors["zeros"].float() if scheme.zeros != "none" else None
    return Mixture(signs, tensors["in_scales"].float(), tensors["out_scales"].float(), router, zeros)


def shift(scheme: BinaryMosScheme, signs: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """``B + z``: zeros ``[out]`` or ``[in]`` added along their channels of ``[out, in]`` signs."""
    if zeros is None:
        return signs
    return signs + (zeros.unsqueeze(1) if scheme.zeros == "output" else zeros)


def matrix(
    scheme: BinaryMosScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``B + z``, ``[out, in]`` in ``dtype``."""
    found = unpack(scheme, tensors, in_features)
    return shift(scheme, found.signs, found.zeros).to(dtype)


def uniform_weight(factor: torch.Tensor, in_scales: torch.Tensor, out_scales: torch.Tensor) -> torch.Tensor:
    """The weight ``[out, in]`` of a token that every expert has the same share in; of one expert, the weight."""
    return out_scales.mean(0).unsqueeze(1) * factor * in_scales.mean(0)


def dequantize(
    scheme: BinaryMosScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights at uniform gates in ``dtype``; the arithmetic is float32, with one rounding at the end.

    Exact for one expert. For more it is what the layer does on average, which serves error records and penalties
    only: the layer itself weighs its experts by the token.
    """
    found = unpack(scheme, tensors, in_features)
    factor = shift(scheme, found.signs, found.zeros)
    return uniform_weight(factor, found.in_scales, found.out_scales).to(dtype)


def mixed_scales(
    x: torch.Tensor, in_scales: torch.Tensor, out_scales: torch.Tensor, router: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s_in(x)`` and ``s_out(x)``, ``[..., in]`` and ``[..., out]``, or ``[in]`` and ``[out]`` of one expert."""
    inner, outer = in_scales.to(x.dtype), out_scales.to(x.dtype)
    if router is None:
        return inner[0], outer[0]
    gates = torch.nn.functional.linear(x, router.to(x.dtype)).float().softmax(-1).to(x.dtype)
    return gates @ inner, gates @ outer


def apply_mixture(
    x: torch.Tensor,
    factor: torch.Tensor,
    in_scales: torch.Tensor,
    out_scales: torch.Tensor,
    router: torch.Tensor | None,
) -> torch.Tensor:
    """The product of a mixture of scales, differentiable in everything.

    Args:
        x: ``[..., in]``.
        factor: ``B + z``, ``[out, in]``, in the dtype of ``x``.
        in_scales, out_scales: ``[e, in]`` and ``[e, out]``, any floating dtype.
        router: ``[e, in]``; None for one expert.

    Returns:
        ``[..., out]`` in the dtype of the product. The softmax of the gates is float32.
    """
    inner, outer = mixed_scales(x, in_scales, out_scales, router)
    return torch.nn.functional.linear(x * inner, factor) * outer


def multiply(
    scheme: BinaryMosScheme, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """:func:`apply_mixture` with packed scales."""
    router = tensors["router"] if scheme.experts > 1 else None
    return apply_mixture(x, factor, tensors["in_scales"], tensors["out_scales"], router)


FORMAT = Format(BinaryMosScheme, dequantize, matrix, multiply)
