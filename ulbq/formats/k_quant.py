"""Scales in two levels, as llama.cpp's K types have them: ``Ŵ = d·a·(q − c) − e·b`` in super-blocks of 256 columns.

A super-block has one ``d`` and ``e`` in float16, each of its groups whole numbers ``a`` and ``b`` of a few bits:

====== ====== ======= ============== ========== === ================
bits   type   columns ``a``          ``b``      c   bits a weight
====== ====== ======= ============== ========== === ================
2      Q2_K   16      0 to 15        0 to 15    0   2.625
3      Q3_K   16      −32 to 31      none       4   3.4375
4      Q4_K   32      0 to 63        0 to 63    0   4.5
====== ====== ======= ============== ========== === ================

Stored tensors of an ``[out, in]`` matrix with ``G`` groups a row (planes of groups over the flattened ``[out, G]``):

* ``codes``       uint8 ``[bits, out, in/8]``, bit planes: ``q``;
* ``scales``      float16 ``[out, in/256]``: ``d``;
* ``sub_scales``  uint8 ``[4 or 6, out·G/8]``, planes: ``a``, from −32 on ``a + 32``;
* ``minima``      float16 ``[out, in/256]``: ``e``; not at 3 bits;
* ``sub_minima``  uint8 ``[4 or 6, out·G/8]``, planes: ``b``; not at 3 bits.

llama.cpp calls them ``d``, ``scales``, ``dmin`` and ``mins`` (ggml-common.h).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from ulbq.config.groups import k_group_size
from ulbq.formats.bits import BaseScheme, Format, TensorSpec, pack_planes, unpack_planes

SUPER_BLOCK = 256
"""Columns."""
_LEAST = 2.0**-24
"""float16's smallest positive number: a super-block of zeros keeps it."""


class KQuantScheme(BaseScheme):
    """Parameters of the format: the bits tell all the rest.

    Attributes:
        bits: bits per code.
    """

    format: Literal["k_quant"] = "k_quant"
    bits: Literal[2, 3, 4] = 2

    @property
    def group_size(self) -> int:
        """Columns that share ``a`` and ``b``."""
        return k_group_size(self.bits)

    @property
    def label(self) -> str:
        """Its name in GGUF, in small letters."""
        return f"q{self.bits}_k"

    @property
    def symmetric(self) -> bool:
        """Whether ``a`` has a sign and nothing is subtracted."""
        return self.bits == 3

    @property
    def centre(self) -> float:
        """``c``."""
        return 4.0 if self.symmetric else 0.0

    @property
    def sub_bits(self) -> int:
        """Bits of ``a``, and of ``b``."""
        return 4 if self.bits == 2 else 6

    @property
    def sub_range(self) -> tuple[int, int]:
        """The least and the greatest ``a``."""
        return (-32, 31) if self.symmetric else (0, 2**self.sub_bits - 1)

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the stored tensors of one matrix."""
        blocks, groups = in_features // SUPER_BLOCK, out_features * in_features // self.group_size
        specs = {
            "codes": TensorSpec(dtype="uint8", shape=(self.bits, out_features, in_features // 8), role="codes"),
            "scales": TensorSpec(dtype="float16", shape=(out_features, blocks), role="scales"),
            "sub_scales": TensorSpec(dtype="uint8", shape=(self.sub_bits, groups // 8), role="scales"),
        }
        if not self.symmetric:
            specs["minima"] = TensorSpec(dtype="float16", shape=(out_features, blocks), role="zeros")
            specs["sub_minima"] = TensorSpec(dtype="uint8", shape=(self.sub_bits, groups // 8), role="zeros")
        return specs

    def unsupported_reason(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot be stored, as the end of a sentence; None where it can."""
        if in_features % SUPER_BLOCK:
            return f"super-blocks of {SUPER_BLOCK} do not divide its {in_features} inputs"
        return None


class KQuant(NamedTuple):
    """A matrix, unpacked; float32 where nothing else is said.

    Attributes:
        codes: ``[out, in]`` uint8.
        factors: ``[out, in/256]`` ``d``, a float16 value.
        sub_scales: ``[out, G]`` ``a``.
        minima: ``[out, in/256]`` ``e``, a float16 value; 0 for none.
        sub_minima: ``[out, G]`` ``b``; 0 for none.
        centre: ``[out, 1]`` ``c``.
    """

    codes: torch.Tensor
    factors: torch.Tensor
    sub_scales: torch.Tensor
    minima: torch.Tensor
    sub_minima: torch.Tensor
    centre: torch.Tensor

    @property
    def scales(self) -> torch.Tensor:
        """``[out, G]`` ``d·a``: exact, of at most 17 bits."""
        return spread(self.factors, self.sub_scales) * self.sub_scales

    @property
    def offsets(self) -> torch.Tensor:
        """``[out, G]`` ``e·b``: exact."""
        return spread(self.minima, self.sub_minima) * self.sub_minima

    @property
    def zeros(self) -> torch.Tensor:
        """``[out, G]`` real zero points: where the grid would have its 0. No ``a`` may be 0."""
        return self.centre + self.offsets / self.scales

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[out, in]`` weights in ``dtype``, rounded once from float32 (float64 where that is asked for)."""
        exact = torch.promote_types(torch.float32, dtype)
        grouped = self.codes.to(exact).unflatten(1, (self.sub_scales.shape[1], -1)).sub_(self.centre.unsqueeze(-1))
        grouped.mul_(self.scales.unsqueeze(-1)).sub_(self.offsets.unsqueeze(-1))
        weight: torch.Tensor = grouped.flatten(1).to(dtype)
        return weight


def spread(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Values of super-blocks ``[out, in/256]`` for each of their groups ``[out, G]``."""
    return values.repeat_interleave(groups.shape[1] // values.shape[1], 1)


def stored_factors(factors: torch.Tensor) -> torch.Tensor:
    """As float16 stores them, float32; none becomes 0, by which zero points would be divided."""
    rounded = factors.to(torch.float16).float()
    return torch.where(rounded == 0, torch.copysign(torch.full_like(factors, _LEAST), factors), rounded)


def pack(scheme: KQuantScheme, matrix: KQuant) -> dict[str, torch.Tensor]:
    """The stored tensors of a matrix, named as in :meth:`KQuantScheme.tensors`."""
    least = scheme.sub_range[0]
    packed = {
        "codes": pack_planes(matrix.codes, scheme.bits),
        "scales": matrix.factors.to(torch.float16).contiguous(),
        "sub_scales": pack_planes((matrix.sub_scales - least).to(torch.uint8).flatten(), scheme.sub_bits),
    }
    if not scheme.symmetric:
        packed["minima"] = matrix.minima.to(torch.float16).contiguous()
        packed["sub_minima"] = pack_planes(matrix.sub_minima.to(torch.uint8).flatten(), scheme.sub_bits)
    return packed


def unpack(scheme: KQuantScheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> KQuant:
    """Undo :func:`pack`."""
    return unpack_grids(scheme, tensors, in_features)._replace(codes=unpack_planes(tensors["codes"], in_features))


def unpack_grids(scheme: KQuantScheme, tensors: Mapping[str, torch.Tensor], in_features: int) -> KQuant:
    """The same but for the codes, which are still packed."""
    codes, factors = tensors["codes"], tensors["scales"].float()
    shape = (len(factors), in_features // scheme.group_size)

    def numbers(name: str) -> torch.Tensor:
        return unpack_planes(tensors[name], shape[0] * shape[1]).view(shape).float()

    if scheme.symmetric:
        minima, sub_minima = torch.zeros_like(factors), factors.new_zeros(shape)
    else:
        minima, sub_minima = tensors["minima"].float(), numbers("sub_minima")
    centre = factors.new_full((len(factors), 1), scheme.centre)
    return KQuant(codes, factors, numbers("sub_scales") + scheme.sub_range[0], minima, sub_minima, centre)


def dequantize(
    scheme: KQuantScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights in ``dtype``; the arithmetic is that of :meth:`KQuant.values`, and llama.cpp's."""
    return unpack(scheme, tensors, in_features).values(dtype)


FORMAT = Format(KQuantScheme, dequantize)
