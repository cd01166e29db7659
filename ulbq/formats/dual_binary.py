"""Flexible dual binarization (DB-LLM): ``Ŵ = α₁b₁ + α₂b₂`` with ``b ∈ {0, 1}`` and two scales a group.

Stored tensors of an ``[out, in]`` matrix with ``G`` groups a row:

* ``codes``  uint8 ``[2, out, ceil(in/8)]``: the planes ``b₁`` and ``b₂``;
* ``scales`` float16 ``[2, out, G]``: ``α₁`` and ``α₂``.

The four levels are ``0, α₁, α₂, α₁ + α₂``; with ``α₁ = 2s, α₂ = −s`` they are ``{−s, 0, s, 2s}``.
"""

from collections.abc import Mapping
from typing import Literal

import torch

from ulbq.formats.bits import BaseScheme, Format, TensorSpec, groups_of, pack_planes, packed_length, unpack_planes


class DualBinaryScheme(BaseScheme):
    """Parameters of the dual-binary format.

    Attributes:
        group_size: columns that share a pair of scales; -1 for the whole row.
    """

    format: Literal["dual_binary"] = "dual_binary"
    group_size: int = 64

    @property
    def bits(self) -> int:
        """Bits per code: the two planes."""
        return 2

    @property
    def label(self) -> str:
        """Short name, as in ``w2g64-db``: uniform codes at 2 bits are ``w2g64``."""
        return "w2" + ("" if self.group_size == -1 else f"g{self.group_size}") + "-db"

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the stored tensors of one matrix."""
        groups = groups_of(in_features, self.group_size)
        return {
            "codes": TensorSpec(dtype="uint8", shape=(2, out_features, packed_length(in_features)), role="codes"),
            "scales": TensorSpec(dtype="float16", shape=(2, out_features, groups), role="scales"),
        }


def pack(scheme: DualBinaryScheme, planes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack one matrix.

    Args:
        planes: ``[2, out, in]``, zeros and ones of any dtype.
        scales: ``[2, out, G]``, stored as float16.
    """
    codes = planes[0].to(torch.uint8) | (planes[1].to(torch.uint8) << 1)
    return {"codes": pack_planes(codes, scheme.bits), "scales": scales.to(torch.float16).contiguous()}


def unpack(
    scheme: DualBinaryScheme, tensors: Mapping[str, torch.Tensor], in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo :func:`pack`: planes ``[2, out, in]`` uint8 and scales ``[2, out, G]`` float32."""
    planes = torch.stack([unpack_planes(plane.unsqueeze(0), in_features) for plane in tensors["codes"]])
    return planes, tensors["scales"].float()


def weight(codes: torch.Tensor, scales: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """``α₁b₁ + α₂b₂``, ``[out, in]`` in ``dtype``: planes ``[2, out, ceil(in/8)]``, scales ``[2, out, G]``.

    The arithmetic is float32, or float64 where that is asked for, with one rounding; it is differentiable in scales.
    """
    exact = torch.promote_types(torch.float32, dtype)
    first, second = (
        unpack_planes(plane.unsqueeze(0), in_features).view(*own.shape, -1).to(exact).mul_(own.to(exact).unsqueeze(-1))
        for plane, own in zip(codes, scales, strict=True)
    )
    return first.add_(second).flatten(1).to(dtype)


def dequantize(
    scheme: DualBinaryScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights in ``dtype``; the arithmetic is that of :func:`weight`."""
    return weight(tensors["codes"], tensors["scales"], in_features, dtype)


def sparsity(scheme: DualBinaryScheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> tuple[float, float]:
    """Share of zeros in ``b₁`` and in ``b₂`` (the method's selling point: zeros need no arithmetic)."""
    planes, _ = unpack(scheme, tensors, in_features)
    first, second = (1.0 - planes.float().mean((1, 2))).tolist()
    return first, second


FORMAT = Format(DualBinaryScheme, dequantize, sparsity=sparsity)
