"""bitsandbytes' layouts: blocks of four-bit codes in a table of 16 values (NF4, FP4), and rows of eight-bit integers.

Four bits: ``weight`` uint8 ``[out·in/2, 1]``, two codes a byte with the upper half first, possibly seen as another
dtype; ``weight.quant_map`` float32 ``[16]``; ``weight.absmax`` float32, one for each ``blocksize`` neighbours; and a
JSON object in the bytes of ``weight.quant_state.bitsandbytes__nf4``, which has the ``shape``. With double quantization
``absmax`` is uint8 and stands for ``nested_quant_map[absmax] · nested_absmax + nested_offset``, ``nested_absmax`` one
for each ``nested_blocksize``. The names are those of ``QuantState.as_dict`` (bitsandbytes 0.50).

Eight bits: ``weight`` int8 ``[out, in]`` and ``SCB`` float32 ``[out]``, the largest magnitude of each row.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.models.foreign.base import Packed, damaged, present, scaled

_KIND = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_LONGEST = 1 << 16  # bytes of a JSON object
_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def read(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    for name in sorted(stored.names):
        weight, _, kind = name.partition(_STATE)
        if kind in ("nf4", "fp4"):
            yield weight, _four_bits(stored, weight, name, kind.upper())
        elif name.endswith(".SCB"):
            yield _eight_bits(stored, name.removesuffix("SCB"))


def decode(
    tensors: Mapping[str, torch.Tensor], *, shape: tuple[int, int], sizes: tuple[int, int], offset: float
) -> torch.Tensor:
    """``[out, in]`` float32 weights of four bits.

    Args:
        tensors: by short name.
        shape: of the weight.
        sizes: of a block, and of one of nested scales.
        offset: of nested scales.
    """
    packed, largest = tensors["weight"].view(torch.uint8).flatten(), tensors["absmax"]
    if largest.dtype == torch.uint8:
        nested = tensors["nested_absmax"].float().repeat_interleave(sizes[1])[: len(largest)]
        largest = tensors["nested_quant_map"].float()[largest.int()] * nested + offset
    values, both = tensors["quant_map"].float(), torch.arange(256)
    pairs = torch.stack((values[both >> 4], values[both & 15]), -1)
    made = pairs[packed.int()].flatten()[: prod(shape)]
    made *= largest.float().repeat_interleave(sizes[0])[: len(made)]
    return made.view(shape)


def _four_bits(stored: LazyTensors, weight: str, state: str, kind: str) -> Packed:
    parts = {"weight": weight, "state": state, **present(stored, f"{weight}.", *_TENSORS)}
    if stored.nbytes(state) > _LONGEST:
        raise damaged(weight, _KIND)
    try:
        said = json.loads(bytes(stored.read(state).flatten().tolist()))
        rows, columns = map(int, said["shape"])
        sizes = (int(said["blocksize"]), int(said.get("nested_blocksize") or 1))
        offset = float(said.get("nested_offset") or 0.0)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise damaged(weight, _KIND) from None
    if min(rows, columns, *sizes) <= 0 or weight not in stored.names or not parts.keys() >= {"absmax", "quant_map"}:
        raise damaged(weight, _KIND)
    count, nested = rows * columns, "nested_absmax" in parts
    known = stored.nbytes(weight) == -(-count // 2) and stored.shape(parts["quant_map"]) == (16,)
    blocks = -(-count // sizes[0])
    known = known and stored.shape(parts["absmax"]) == (blocks,)
    known = known and (stored.dtype(parts["absmax"]) == torch.uint8) == nested
    if nested:
        known = known and stored.shape(parts["nested_absmax"]) == (-(-blocks // sizes[1]),)
        known = known and "nested_quant_map" in parts and stored.shape(parts["nested_quant_map"]) == (256,)
    if not known:
        raise damaged(weight, _KIND)
    return Packed(parts, (rows, columns), partial(decode, shape=(rows, columns), sizes=sizes, offset=offset), kind)


def _eight_bits(stored: LazyTensors, prefix: str) -> tuple[str, Packed]:
    name, parts = f"{prefix}weight", present(stored, prefix, "weight", "SCB", "weight_format")
    shape = stored.shape(name) if name in stored.names else ()
    if len(shape) != 2 or stored.dtype(name) != torch.int8 or stored.shape(parts["SCB"]) != shape[:1]:
        raise damaged(name, _KIND)
    return name, Packed(parts, (shape[0], shape[1]), _rows, "w8")


def _rows(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return scaled(tensors["weight"], tensors["SCB"].view(-1, 1) / 127)
