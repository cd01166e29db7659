"""HQQ's layout, as hqq and transformers save it: each layer brings its own settings as tensors.

``W_q`` holds codes of ``nbits`` as ``packing`` says: the rows of the grouped weight are cut into as many parts as a
word has fields, and the first part is in the highest bits. ``scale`` and ``zero`` have one value a group, which is a
row of the grouped weight where ``axis`` is 1 and a column where it is 0. ``Ŵ = (q − zero) · scale``, brought to
``shape``. Numbers are int32 scalars, texts are bytes (hqq 0.2.8, ``encode_safetensor_type``).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.models.foreign.base import FLOATS, Packed, damaged, label_of, present, unread

_PACKINGS = {
    "8bit_u8": (torch.uint8, 8, 1),
    "4bit_u8": (torch.uint8, 4, 2),
    "2bit_u8": (torch.uint8, 2, 4),
    "1bit_u8": (torch.uint8, 1, 8),
    "3bit_32": (torch.int32, 3, 10),
}
"""By name: the dtype of a word, bits of a field, fields a word."""
_NUMBERS = ("nbits", "group_size", "axis")
_FLAGS = (
    *("view_as_float", "quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "unpack_view_dtype", "compute_dtype"),
)


def read(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    for name in sorted(stored.names):
        prefix = name.removesuffix("W_q")
        if prefix == name:
            continue
        parts = present(stored, prefix, "W_q", "scale", "zero", "shape", "packing", *_NUMBERS, *_FLAGS)
        yield f"{prefix}weight", _layer(stored, f"{prefix}weight", parts)


def decode(tensors: Mapping[str, torch.Tensor], *, packing: str, rows: int, shape: tuple[int, int]) -> torch.Tensor:
    """``[out, in]`` float32 weights; ``rows`` are those of the grouped weight."""
    dtype, bits, fields = _PACKINGS[packing]
    words = tensors["W_q"].view(dtype)
    codes = torch.cat([words >> bits * (fields - 1 - field) & (2**bits - 1) for field in range(fields)])[:rows].float()
    return ((codes - tensors["zero"].float()) * tensors["scale"].float()).reshape(shape)


def _layer(stored: LazyTensors, name: str, parts: Mapping[str, str]) -> Packed:
    if not parts.keys() >= {"W_q", "scale", "zero", "shape", "packing", *_NUMBERS}:
        raise unread(stored, "HQQ", "without settings beside each layer")
    try:
        nbits, size, axis = (int(stored.read(parts[short])) for short in _NUMBERS)
        packing = bytes(stored.read(parts["packing"]).flatten().tolist()).decode()
        out_features, in_features = map(int, stored.read(parts["shape"]).tolist())
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise damaged(name, "HQQ") from None
    if packing not in _PACKINGS:
        raise unread(stored, "HQQ", packing)
    shape, (dtype, _, fields) = (out_features, in_features), _PACKINGS[packing]
    if min(size, out_features, in_features) <= 0 or prod(shape) % size or axis not in (0, 1):
        raise damaged(name, "HQQ")
    grouped = (prod(shape) // size, size) if axis == 1 else (size, prod(shape) // size)
    groups = (grouped[0], 1) if axis == 1 else (1, grouped[1])
    known = stored.nbytes(parts["W_q"]) == -(-grouped[0] // fields) * grouped[1] * dtype.itemsize
    known = known and all(stored.shape(parts[part]) == groups for part in ("scale", "zero"))
    if not known or any(stored.dtype(parts[part]) not in FLOATS for part in ("scale", "zero")):
        raise damaged(name, "HQQ")
    return Packed(
        parts, shape, partial(decode, packing=packing, rows=grouped[0], shape=shape), label_of(nbits, size, 0)
    )
