"""Uniform affine codes: ``Ŵ = s · (q − z)`` with one scale and zero point a group along the input dimension.

Stored tensors of an ``[out, in]`` matrix with ``G`` groups a row:

* ``codes``  uint8 ``[bits, out, ceil(in/8)]``, bit planes;
* ``scales`` float16 ``[out, G]``; negative where the mirrored symmetric grid fits better;
* ``zeros``  uint8 ``[bits, ceil(out·G/8)]``, bit planes over the flattened ``[out, G]`` (asymmetric only).

The symmetric grid has ``z = 2^(bits−1)``: at 2 bits ``s·{−2, −1, 0, 1}``, or ``|s|·{−1, 0, 1, 2}`` where ``s < 0``.
One that is *mid-rise* has ``z = (2^bits − 1)/2`` and no level at zero: at 2 bits ``s·{−3/2, −1/2, 1/2, 3/2}``. At 1 bit
every symmetric grid is, ``±s/2``, since ``{−s, 0}`` could not hold both signs.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import model_validator

from ulbq.formats.bits import BaseScheme, Format, TensorSpec, groups_of, pack_planes, packed_length, unpack_planes


class AffineScheme(BaseScheme):
    """Parameters of the affine format.

    Attributes:
        bits: bits per code.
        group_size: columns that share a scale; -1 for the whole row.
        symmetric: fixed zero point, none stored.
        mid_rise: of a symmetric grid: as many levels below zero as above, and none at zero.
    """

    format: Literal["affine"] = "affine"
    bits: Literal[1, 2, 3, 4, 6, 8] = 4
    group_size: int = 64
    symmetric: bool = False
    mid_rise: bool = False

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if self.mid_rise and not self.symmetric:
            raise ValueError("a mid-rise grid is symmetric")
        return self

    @property
    def label(self) -> str:
        """Short name, as in ``w2g64``."""
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        return f"w{self.bits}{group}" + ("-mid-rise" if self.mid_rise else "-sym" if self.symmetric else "")

    @property
    def centre(self) -> float:
        """Zero point of the symmetric grid."""
        return (2**self.bits - 1) / 2 if self.bits == 1 or self.mid_rise else float(2 ** (self.bits - 1))

    @property
    def has_zero(self) -> bool:
        """Whether every grid has a level at zero: zero points are integers."""
        return not self.symmetric or self.centre.is_integer()

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the stored tensors of one matrix."""
        groups = groups_of(in_features, self.group_size)
        specs = {
            "codes": TensorSpec(
                dtype="uint8", shape=(self.bits, out_features, packed_length(in_features)), role="codes"
            ),
            "scales": TensorSpec(dtype="float16", shape=(out_features, groups), role="scales"),
        }
        if not self.symmetric:
            specs["zeros"] = TensorSpec(
                dtype="uint8", shape=(self.bits, packed_length(out_features * groups)), role="zeros"
            )
        return specs


def pack(
    scheme: AffineScheme, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Pack one matrix.

    Args:
        codes: ``[out, in]``, any integer dtype, values below ``2**bits``.
        scales: ``[out, G]``, stored as float16.
        zeros: ``[out, G]`` integers in ``[0, 2**bits)``; must be given exactly where the scheme is asymmetric.

    Returns:
        The stored tensors, named as in :meth:`AffineScheme.tensors`.

    Raises:
        ValueError: zeros are missing, or given to a symmetric scheme, which would not store them.
    """
    if scheme.symmetric and zeros is not None:
        raise ValueError("a symmetric matrix stores no zeros")
    tensors = {
        "codes": pack_planes(codes.to(torch.uint8), scheme.bits),
        "scales": scales.to(torch.float16).contiguous(),
    }
    if not scheme.symmetric:
        if zeros is None:
            raise ValueError("an asymmetric matrix needs its zeros")
        tensors["zeros"] = pack_planes(zeros.to(torch.uint8).flatten(), scheme.bits)
    return tensors


def unpack(
    scheme: AffineScheme, tensors: Mapping[str, torch.Tensor], in_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo :func:`pack`: codes ``[out, in]`` uint8, scales ``[out, G]`` float32, zeros ``[out, G]`` float32."""
    codes = unpack_planes(tensors["codes"], in_features)
    scales = tensors["scales"].float()
    if scheme.symmetric:
        return codes, scales, torch.full_like(scales, scheme.centre)
    zeros = unpack_planes(tensors["zeros"], scales.numel()).view_as(scales)
    return codes, scales, zeros.float()


def weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | float, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """``s · (q − z)``, ``[out, in]`` in ``dtype``, rounded once from float32 (float64 where that is asked for).

    It is differentiable in scales and zero points.

    Args:
        codes: uint8 planes ``[bits, out, ceil(in/8)]``.
        scales: ``[out, G]``, any floating dtype.
        zeros: floating ``[out, G]``, or planes as stored, uint8 ``[bits, ceil(out·G/8)]``, or one for all.
        in_features: columns of the matrix.
        dtype: of the weight.
    """
    exact = torch.promote_types(torch.float32, dtype)
    grouped = unpack_planes(codes, in_features).to(exact).unflatten(1, (scales.shape[1], -1))
    if isinstance(zeros, float):
        grouped.sub_(zeros)
    else:
        grouped.sub_(real_zeros(zeros, scales).to(exact).unsqueeze(-1))
    weight: torch.Tensor = grouped.mul_(scales.to(exact).unsqueeze(-1)).flatten(1).to(dtype)
    return weight


def real_zeros(zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Zero points ``[out, G]`` as floats, of what may be planes."""
    if zeros.is_floating_point():
        return zeros
    return unpack_planes(zeros, scales.numel()).view_as(scales).float()


def dequantize(
    scheme: AffineScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights in ``dtype``; the arithmetic is that of :func:`weight`."""
    zeros = scheme.centre if scheme.symmetric else tensors["zeros"]
    return weight(tensors["codes"], tensors["scales"], zeros, in_features, dtype)


FORMAT = Format(AffineScheme, dequantize)
