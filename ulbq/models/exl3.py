"""EXL3's folders, as exllamav3 writes and reads them (1.6): their weights, one layer at a time.

A layer ``[out, in]`` is stored between two Hadamard transforms of 128, as :mod:`ulbq.formats.trellis` has it, with

* ``trellis`` int16 ``[in/16, out/16, 16·K]``: the tiles' bits, 32-bit words with the most significant bit first;
* ``suh`` float16 ``[in]`` and ``svh`` float16 ``[out]``; before 0.0.2 ``su`` and ``sv`` int16, a bit a sign;
* ``mul1`` or ``mcg`` int32 ``[]``, which says by its name how states become values; ``3inst`` where there is none.

A state is 16 bits that end with those of its element. ``K`` is 1 to 8. Where it ends in a half, every second element
has a bit more than the one before.
"""

import functools
from collections.abc import Mapping

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError
from ulbq.formats import trellis
from ulbq.formats.trellis import LENGTH, MULTIPLIERS, TILE

METHOD = "exl3"
"""The ``quant_method``."""
WIDTH = 128
"""Of the Hadamard blocks, which divide both dimensions."""

_STATE_BITS = 16
_CODES = {"mul1": MULTIPLIERS[_STATE_BITS], "mcg": 0xCBAC1FED}
"""Codes that have a marker, and what that holds."""
_PARTS = ("trellis", "suh", "svh", "su", "sv", "mul1", "mcg")
_MOST_BITS = 8
_DECODED_AT_ONCE = 1 << 20


def to_tensors(packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A packed layer of format ``trellis`` with 16-bit states, under EXL3's names; no bit changes."""
    marker = torch.tensor(_CODES["mul1"], dtype=torch.uint32).view(torch.int32)
    return {"trellis": packed["codes"].view(torch.int16), "suh": packed["su"], "svh": packed["sv"], "mul1": marker}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo :func:`to_tensors`."""
    return {"codes": tensors["trellis"].view(torch.uint8), "su": tensors["suh"], "sv": tensors["svh"]}


def decode(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[out, in]`` float32 weights of a layer, of any code and width."""
    return trellis.between(inner_matrix(tensors).float(), _vector(tensors, "su"), _vector(tensors, "sv"))


def inner_matrix(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[out, in]`` float16 values between the transforms, to the bit as exllamav3's kernels round them."""
    codes = tensors["trellis"]
    ends = torch.arange(1, LENGTH + 1) * codes.shape[-1] // TILE
    starts = (ends - _STATE_BITS) % (codes.shape[-1] * 16)
    values = _values(next((name for name in _CODES if name in tensors), "3inst"))
    parts = codes.split(max(1, _DECODED_AT_ONCE // (codes.shape[1] * LENGTH)))
    return trellis.from_sequences(torch.cat([values[_windows(part, starts)] for part in parts]))


def _windows(codes: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """States: 16 bits of each sequence from each of these places on, around its end."""
    words = codes.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    first = starts // 32
    pairs = words[..., first] << 32 | words[..., (first + 1) % words.shape[-1]]
    return pairs >> (32 + _STATE_BITS - starts % 32) & 0xFFFF


@functools.cache
def _values(code: str) -> torch.Tensor:
    """Value of every state: ``[2^16]`` float16. Not to be written to."""
    if code == "mul1":
        return trellis.values(_STATE_BITS).half()
    states = torch.arange(1 << _STATE_BITS)
    products = states * _CODES["mcg"] if code == "mcg" else states * 89226354 + 64248484
    halves = products & 0x8FFF8FFF ^ 0x3B603B60
    low, high = (part.to(torch.int16).view(torch.float16) for part in (halves, halves >> 16))
    return (low.float() + high.float()).half()


def _vector(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """``su`` or ``sv`` in float32."""
    if f"{name}h" in tensors:
        return tensors[f"{name}h"].float()
    signs = tensors[name].unsqueeze(-1) >> torch.arange(16, dtype=torch.int16) & 1
    return 1.0 - 2.0 * signs.flatten().float()


class Exl3Tensors(LazyTensors):
    """Tensors of an EXL3 folder; a packed layer is the ``weight`` that it stands for, in float32.

    Args:
        stored: as they lie there.
        vocabulary: rows of a head, which is stored with as many as 128 divides.

    Raises:
        InputError: a packed layer lacks a part, or its parts do not fit each other.
    """

    def __init__(self, stored: LazyTensors, vocabulary: int) -> None:
        super().__init__(())
        self._packed = stored
        self._stored = dict(stored._stored)
        self._layers: dict[str, dict[str, str]] = {}
        for name in sorted(stored.names):
            layer, _, short = name.rpartition(".")
            if short != "trellis":
                continue
            parts = {part: f"{layer}.{part}" for part in _PARTS if f"{layer}.{part}" in stored.names}
            rows, columns = _shape(stored, layer, parts)
            rows = min(rows, vocabulary) if layer.endswith("lm_head") else rows
            found, *_ = [self._stored.pop(part) for part in parts.values()]
            self._stored[f"{layer}.weight"] = found._replace(shape=(rows, columns), dtype="F32")
            self._layers[f"{layer}.weight"] = parts

    @property
    def stored_as(self) -> tuple[str, float]:
        """``EXL3``, and bits a value of the packed layers."""
        size = sum(self._packed.nbytes(name) for parts in self._layers.values() for name in parts.values())
        return "EXL3", 8 * size / max(1, sum(torch.Size(self.shape(name)).numel() for name in self._layers))

    def read(self, name: str) -> torch.Tensor:
        """As any other; a packed layer is decoded. Raises InputError for a code that EXL3 does not have."""
        if name not in self._layers:
            return self._packed.read(name)
        tensors = {short: self._packed.read(part) for short, part in self._layers[name].items()}
        for code, multiplier in _CODES.items():
            if code in tensors and int(tensors[code]) & 0xFFFFFFFF != multiplier:
                raise _unknown(name.removesuffix(".weight"))
        return decode(tensors)[: self.shape(name)[0]]


def _shape(stored: LazyTensors, layer: str, parts: Mapping[str, str]) -> tuple[int, int]:
    """``(out, in)`` of a packed layer. Raises InputError where its parts do not fit each other."""
    shape = stored.shape(parts["trellis"])
    columns, rows, words = [*shape, 0, 0, 0][:3]
    known = len(shape) == 3 and stored.dtype(parts["trellis"]) == torch.int16 and words % 8 == 0
    known = known and TILE <= words <= _MOST_BITS * TILE
    known = known and all(tiles and tiles * TILE % WIDTH == 0 for tiles in (rows, columns))
    for code in _CODES.keys() & parts.keys():
        marker = stored.dtype(parts[code]), stored.shape(parts[code])
        known = known and marker in ((torch.int32, ()), (torch.int32, (1,)))
    for name, count in (("su", columns), ("sv", rows)):
        wide, narrow = (f"{name}h", torch.float16, (count * TILE,)), (name, torch.int16, (count,))
        known = known and any(
            part in parts and (stored.dtype(parts[part]), stored.shape(parts[part])) == (dtype, size)
            for part, dtype, size in (wide, narrow)
        )
    if not known:
        raise _unknown(layer)
    return rows * TILE, columns * TILE


def _unknown(layer: str) -> InputError:
    return InputError(
        f"'{layer}' is stored otherwise than EXL3 stores layers.",
        hint="The folder is damaged, or exllamav3 changed its layout: give the full-precision model.",
    )
