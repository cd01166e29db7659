"""Trellis-coded weights (QTIP, https://arxiv.org/abs/2406.11235; EXL3): a weight depends on the bits before it, too.

The matrix is stored between two Hadamard transforms, ``W = diag(sv) · H_out · T · H_in · diag(su)``, which make the
elements of ``T`` look like Gaussian noise. ``H`` is block-diagonal, of normalized Hadamard matrices of the largest
power of two up to 128 that divides the width. Where these are ``m`` blocks of fewer than 128, they are mixed, too:
block ``i`` of the result is ``Σ_j (cos 2πij/m + sin 2πij/m)/√m`` times block ``j`` (a Hartley matrix). ``T`` is cut
into tiles of 16 × 16. The 256 elements of a tile are one sequence, and ``K`` bits come with each of them; an element's
*state* is its own bits and those before it, ``L`` in all (the bits wrap around: the first element follows the last),
and its value is computed from the state:

    ``value = (1024 + sum of the four bytes of (state · multiplier mod 2³²)) · k + b``

with ``k`` and ``b`` the float16 numbers 0x1EEE and 0xC931, so that values have a mean of about 0 and a variance of
about 1. ``L = 16`` with multiplier 0x83DCD12D is what EXL3 calls ``mul1``. Stored tensors of an ``[out, in]`` matrix:

* ``codes`` uint8 ``[in/16, out/16, 32·K]``: for each tile the bits of its sequence, most significant first, as 32-bit
  words with their lowest byte first. With ``r`` the input and ``c`` the output within a tile, element ``8t + j`` of the
  sequence has ``r = 2·(t mod 4) + (0, 1, 8, 9)[j mod 4]`` and ``c = t div 4 + 8·(j div 4)``: what one thread of a
  tensor core holds lies together;
* ``su`` float16 ``[in]`` and ``sv`` float16 ``[out]``: signs and scales of inputs and outputs.
"""

import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, Self

import torch

from ulbq.formats.bits import BaseScheme, Format, TensorSpec

TILE = 16
"""Rows and columns of a tile."""
LENGTH = TILE * TILE
"""Elements of a sequence."""
_WIDEST = 128
MULTIPLIERS: dict[int, int] = {12: 0xD0DBC74D, 16: 0x83DCD12D}
"""Of each width of a state."""
VALUE_SCALE, VALUE_SHIFT = 0.00676727294921875, -10.3828125
"""``k`` and ``b`` above."""
_MIDDLE = 1024


class TrellisScheme(BaseScheme):
    """Parameters of the trellis format.

    Attributes:
        bits: ``K``, bits of an element.
        state_bits: ``L``, bits of a state.
    """

    format: Literal["trellis"] = "trellis"
    bits: Literal[1, 2, 3, 4] = 2
    state_bits: Literal[12, 16] = 12

    @property
    def group_size(self) -> int:
        """-1: nothing is shared by groups of columns."""
        return -1

    @property
    def label(self) -> str:
        """Short name, as in ``t2s12``."""
        return f"t{self.bits}s{self.state_bits}"

    @property
    def nominal(self) -> Self:
        """The scheme without the bits of one matrix: what matrices of one model have in common."""
        return type(self)(state_bits=self.state_bits)

    def unsupported_reason(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot be stored, as the end of a sentence; None where it can."""
        if out_features % TILE or in_features % TILE:
            return f"{out_features} × {in_features} weights cannot be cut into tiles of {TILE} × {TILE}"
        return None

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, dtypes and shapes of the stored tensors of one matrix. ValueError where tiles do not fit."""
        if failed := self.unsupported_reason(out_features, in_features):
            raise ValueError(failed)
        tiles = (in_features // TILE, out_features // TILE, LENGTH * self.bits // 8)
        return {
            "codes": TensorSpec(dtype="uint8", shape=tiles, role="codes"),
            "su": TensorSpec(dtype="float16", shape=(in_features,), role="scales"),
            "sv": TensorSpec(dtype="float16", shape=(out_features,), role="scales"),
        }


class Trellis(NamedTuple):
    """A matrix by its parts.

    Attributes:
        codes: ``[in/16, out/16, 256]`` uint8, below ``2**bits``, in the order of the sequence.
        su, sv: ``[in]`` and ``[out]``.
    """

    codes: torch.Tensor
    su: torch.Tensor
    sv: torch.Tensor


def pack(scheme: TrellisScheme, trellis: Trellis) -> dict[str, torch.Tensor]:
    """Pack one matrix; the tensors are named as in :meth:`TrellisScheme.tensors`."""
    codes, su, sv = trellis
    shifts = torch.arange(scheme.bits - 1, -1, -1, dtype=torch.uint8, device=codes.device)
    bits = ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    # Distinct powers of two never carry, so the sum stays one byte wide. A word's highest byte is stored last.
    octets = (bits.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
    words = octets.unflatten(-1, (-1, 4)).flip(-1).flatten(-2).contiguous()
    return {"codes": words, "su": su.to(torch.float16).contiguous(), "sv": sv.to(torch.float16).contiguous()}


def unpack(scheme: TrellisScheme, tensors: Mapping[str, torch.Tensor]) -> Trellis:
    """Undo :func:`pack`: ``su`` and ``sv`` float32."""
    octets = tensors["codes"].unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=octets.device)
    bits = ((octets.unsqueeze(-1) >> places) & 1).flatten(-2).unflatten(-1, (-1, scheme.bits))
    shifts = torch.arange(scheme.bits - 1, -1, -1, dtype=torch.uint8, device=octets.device)
    codes = (bits << shifts).sum(-1, dtype=torch.uint8)
    return Trellis(codes, tensors["su"].float(), tensors["sv"].float())


def states(scheme: TrellisScheme, codes: torch.Tensor) -> torch.Tensor:
    """States of sequences: ``[..., 256]`` int32 of codes ``[..., 256]``."""
    found = torch.zeros(codes.shape, dtype=torch.int32, device=codes.device)
    for back in range(-(-scheme.state_bits // scheme.bits)):
        found |= codes.roll(back, -1).int() << (back * scheme.bits)
    return found & ((1 << scheme.state_bits) - 1)


@functools.cache
def values(state_bits: int) -> torch.Tensor:
    """Value of every state: ``[2^L]`` float32, on the CPU. Not to be written to."""
    products = (torch.arange(1 << state_bits, dtype=torch.int64) * MULTIPLIERS[state_bits]) & 0xFFFFFFFF
    sums = sum((products >> shift) & 0xFF for shift in (0, 8, 16, 24))
    return (_MIDDLE + torch.as_tensor(sums)).float() * VALUE_SCALE + VALUE_SHIFT


@functools.cache
def _order() -> torch.Tensor:
    """``[256]`` where element ``i`` of a sequence lies in its tile, ``16·r + c``."""
    index = torch.arange(LENGTH)
    thread, within = index // 8, index % 8
    row = 2 * (thread % 4) + within % 2 + 8 * (within % 4 // 2)
    return TILE * row + thread // 4 + 8 * (within // 4)


def sequences(inner: torch.Tensor) -> torch.Tensor:
    """``[in/16, out/16, 256]`` elements of a matrix ``[out, in]`` in the order of the sequences."""
    tiles = inner.T.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2).flatten(2)
    ordered: torch.Tensor = tiles[..., _order().to(inner.device)]
    return ordered


def from_sequences(elements: torch.Tensor) -> torch.Tensor:
    """``[out, in]``: undo :func:`sequences`."""
    tiles = elements[..., _order().argsort().to(elements.device)].unflatten(2, (TILE, TILE))
    inner: torch.Tensor = tiles.transpose(1, 2).flatten(2).flatten(0, 1).T.contiguous()
    return inner


def block_width(width: int) -> int:
    """Width of the Hadamard blocks of a dimension that tiles divide: 16 to 128."""
    return min(width & -width, _WIDEST)


def transform(x: torch.Tensor) -> torch.Tensor:
    """``x · H`` along the last dimension, of any floating dtype; its own inverse, and its own transpose."""
    width = block_width(x.shape[-1])
    blocks = x.unflatten(-1, (-1, width))
    half = 1
    while half < width:
        first, second = blocks.unflatten(-1, (-1, 2, half)).unbind(-2)
        blocks = torch.stack((first + second, first - second), -2).flatten(-3)
        half *= 2
    return mix((blocks * width**-0.5).flatten(-2))


def mix(x: torch.Tensor) -> torch.Tensor:
    """The second half of the transform: where Hadamard blocks are narrower than 128, the Hartley matrix mixes them."""
    if not is_mixed(x.shape[-1]):
        return x
    blocks = x.unflatten(-1, (-1, block_width(x.shape[-1])))
    mixed: torch.Tensor = hartley(blocks.shape[-2]).to(x) @ blocks
    return mixed.flatten(-2)


def is_mixed(width: int) -> bool:
    """Whether a dimension that tiles divide has several Hadamard blocks that are narrower than 128."""
    return block_width(width) < min(_WIDEST, width)


@functools.cache
def hartley(count: int) -> torch.Tensor:
    """``[n, n]`` ``(cos 2πij/n + sin 2πij/n)/√n``, float64: symmetric and orthogonal. Not to be written to."""
    index = torch.arange(count, dtype=torch.float64)
    angles = torch.outer(index, index) % count * (2 * math.pi / count)
    return (angles.cos() + angles.sin()) / math.sqrt(count)


def inner_matrix(scheme: TrellisScheme, codes: torch.Tensor) -> torch.Tensor:
    """``T``: ``[out, in]`` float32 of codes ``[in/16, out/16, 256]``."""
    return from_sequences(values(scheme.state_bits).to(codes.device)[states(scheme, codes)])


def between(inner: torch.Tensor, su: torch.Tensor, sv: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` weights of ``T`` and the vectors; differentiable in all of them."""
    return transform(transform(inner).T).T * su * sv.unsqueeze(1)


def dequantize(
    scheme: TrellisScheme, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[out, in]`` weights in ``dtype``: float32 arithmetic, or float64 where that is asked for, rounded once."""
    exact = torch.promote_types(torch.float32, dtype)
    trellis = unpack(scheme, tensors)
    inner = inner_matrix(scheme, trellis.codes).to(exact)
    return between(inner, trellis.su.to(exact), trellis.sv.to(exact)).to(dtype)


FORMAT = Format(TrellisScheme, dequantize)
