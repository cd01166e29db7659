"""AWQ's layout ``gemm``, as AutoAWQ, gptqmodel and AutoRound write it.

A layer ``[out, in]`` with ``G`` groups a row is stored as ``qweight`` int32 ``[in, out/8]``, ``qzeros`` int32
``[G, out/8]`` and ``scales`` floats ``[G, out]``. The eight fields of a word, from the lowest bits on, are the outputs
0, 2, 4, 6, 1, 3, 5, 7 of eight. ``Ŵ = scales · (q − zero)``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.formats.streams import unpack_stream
from ulbq.models.foreign.base import FLOATS, Packed, damaged, label_of, present, scaled, unread

_BITS = 4
_FIELDS = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which field of a word each of eight outputs is in."""


def read(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    stated = said.get("version") or said.get("checkpoint_format") or said.get("format") or "gemm"
    layout = "llm-awq" if said.get("backend") == "llm-awq" else str(stated).lower()
    bits = said.get("bits", said.get("w_bit", _BITS))
    if layout != "gemm" or bits != _BITS:
        raise unread(stored, "AWQ", f"{layout}, {bits} bits")
    yield from layers(stored)


def layers(stored: LazyTensors) -> Iterator[tuple[str, Packed]]:
    """The layers of a checkpoint."""
    for name in sorted(stored.names):
        prefix = name.removesuffix("qweight")
        if not name.endswith(".qweight"):
            continue
        parts = present(stored, prefix, "qweight", "qzeros", "scales")
        shape, groups = _form(stored, f"{prefix}weight", parts)
        yield f"{prefix}weight", Packed(parts, shape, decode, label_of(_BITS, shape[1] // groups, shape[1]))


def decode(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[out, in]`` float32 weights."""
    codes, zeros = (_unpacked(tensors[part]) for part in ("qweight", "qzeros"))
    return scaled(codes, tensors["scales"].T, zeros)


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """uint8 ``[8·m, n]`` of int32 ``[n, m]``."""
    fields = unpack_stream(words.T.contiguous(), _BITS, words.shape[1] * 8)
    return fields.view(-1, 8, fields.shape[1])[:, _FIELDS].flatten(0, 1)


def _form(stored: LazyTensors, name: str, parts: Mapping[str, str]) -> tuple[tuple[int, int], int]:
    """``(out, in)`` of a layer and its groups a row. Raises InputError where its parts do not fit each other."""
    if not parts.keys() >= {"qzeros", "scales"} or stored.dtype(parts["scales"]) not in FLOATS:
        raise damaged(name, "AWQ")
    words, zeros, scales = (stored.shape(parts[part]) for part in ("qweight", "qzeros", "scales"))
    if not len(words) == len(zeros) == len(scales) == 2 or not all((*words, *scales)):
        raise damaged(name, "AWQ")
    fits = words[1] * 8 == scales[1] and zeros == (scales[0], words[1]) and words[0] % scales[0] == 0
    if not fits or {stored.dtype(parts[part]) for part in ("qweight", "qzeros")} != {torch.int32}:
        raise damaged(name, "AWQ")
    return (scales[1], words[0]), scales[0]
