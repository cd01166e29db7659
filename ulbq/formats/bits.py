"""Bit planes, and the exact count of what a stored matrix costs.

Every format packs its integer codes as *bit planes*: plane ``p`` holds bit ``p`` (least significant first) of each
code, eight codes to a byte, code ``8k + j`` in bit ``j`` of byte ``k``. One layout serves 1 to 8 bits without waste
(3 bits cost 3 bits), and the two planes of dual binarization are the same thing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

Role = Literal["codes", "scales", "router", "zeros", "codebooks", "columns", "outliers"]


class TensorSpec(BaseModel):
    """Name, dtype and shape of one stored tensor, known before it exists.

    Attributes:
        role: what the bits are spent on, the line under which the accounting shows them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["uint8", "float16"]
    shape: tuple[int, ...]
    role: Role

    @property
    def bits(self) -> int:
        """Stored size in bits."""
        count = 1
        for size in self.shape:
            count *= size
        return count * (8 if self.dtype == "uint8" else 16)


class BaseScheme(BaseModel):
    """What the schemes of all formats have in common; each has ``bits``, ``group_size``, ``label`` and ``tensors`` too.

    Attributes:
        format: the name that artifacts store.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str

    @property
    def nominal(self) -> Any:
        """The scheme without what counts the columns of one matrix: what matrices of one model have in common."""
        return self

    @property
    def is_one_matrix(self) -> bool:
        """Whether a dense weight can stand for the layer."""
        return True

    def unsupported_reason(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot be stored, as the end of a sentence; None where it can."""
        return None


@dataclass(frozen=True)
class Format:
    """How matrices of a kind are stored.

    Attributes:
        scheme: the class of its schemes.
        dequantize: ``[out, in]`` weights of ``(scheme, tensors, in_features, dtype)``.
        matrix: what a layer multiplies by, of the same arguments, where that is not the weight itself.
        multiply: how, of ``(scheme, tensors, x, matrix)``.
        sparsity: share of zeros in each of two planes, of ``(scheme, tensors, in_features)``.
    """

    scheme: type[BaseScheme]
    dequantize: Callable[..., torch.Tensor]
    matrix: Callable[..., torch.Tensor] | None = None
    multiply: Callable[..., torch.Tensor] | None = None
    sparsity: Callable[..., tuple[float, float]] | None = None


def stored_bits(specs: Mapping[str, TensorSpec]) -> dict[Role, int]:
    """Bits by role of one matrix: ``{"codes": …, "scales": …, "zeros": …}``."""
    total: dict[Role, int] = {}
    for spec in specs.values():
        total[spec.role] = total.get(spec.role, 0) + spec.bits
    return total


_LOWEST = 0x0101010101010101
"""The lowest bit of each of eight bytes."""
_TO_TOP = 0x0102040810204080


def packed_length(count: int) -> int:
    """Bytes that ``count`` one-bit values take in one plane."""
    return (count + 7) // 8


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes along their last dimension.

    Args:
        codes: ``[..., n]``, uint8 or int64, every value below ``2**bits``.
        bits: 1 to 8; more for int64.

    Returns:
        ``[bits, ..., ceil(n / 8)]``, uint8. The last byte of a row is padded with zero bits.
    """
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % 8))
    if codes.dtype == torch.uint8:
        words = padded.flatten().view(torch.int64).view(*codes.shape[:-1], packed_length(count))
        # The product carries bit j of byte j into the highest byte; bits of other places never meet there.
        return torch.stack([((words >> p) & _LOWEST).mul_(_TO_TOP).view(torch.uint8)[..., 7::8] for p in range(bits)])
    octets = padded.unflatten(-1, (packed_length(count), 8))
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=codes.device)
    # Eight distinct powers of two never carry, so a wrapping uint8 sum is exact and stays one byte wide.
    planes = [(((octets >> p) & 1) * weights).sum(-1, dtype=torch.uint8) for p in range(bits)]
    return torch.stack(planes)


def unpack_planes(planes: torch.Tensor, count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Undo :func:`pack_planes`.

    Args:
        planes: ``[bits, ..., ceil(count / 8)]``, uint8.
        count: number of codes along the last dimension.
        dtype: of the codes; an integer type that has all their bits.

    Returns:
        ``[..., count]``, in ``dtype``.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    if dtype == torch.uint8:
        # What each byte's bits are, a byte for each, as one word.
        spread = ((torch.arange(256, device=planes.device).unsqueeze(1) >> shifts) & 1).to(dtype).view(torch.int64)
        words = torch.zeros(planes.shape[1:], dtype=torch.int64, device=planes.device)
        for p, plane in enumerate(planes):
            words |= spread.flatten().index_select(0, plane.flatten().int()).view(plane.shape) << p
        return words.view(torch.uint8)[..., :count]
    codes = torch.zeros((*planes.shape[1:], 8), dtype=dtype, device=planes.device)
    for p, plane in enumerate(planes):
        codes |= ((plane.unsqueeze(-1) >> shifts) & 1).to(dtype) << p
    return codes.flatten(-2)[..., :count]


def groups_of(columns: int, group_size: int) -> int:
    """Number of groups in a row; ``group_size`` -1 makes the whole row one group. It has to divide."""
    return 1 if group_size == -1 else columns // group_size
