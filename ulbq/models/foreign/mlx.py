"""MLX's affine layout, as mlx-lm and ulbq write it.

A layer ``[out, in]`` with ``G`` groups a row is stored as ``weight`` uint32 ``[out, in·b/32]``, the codes packed along
the inputs as one stream of bits, and ``scales`` and ``biases`` ``[out, G]``; a weight is ``scale · code + bias``.
Embeddings are packed like layers. ``quantization`` says bits and group size, also of layers that have others.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.formats.streams import unpack_stream
from ulbq.models.foreign.base import FLOATS, Packed, damaged, label_of, present, scaled, unread


def read(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    for name in sorted(stored.names):
        prefix = name.removesuffix("scales")
        if not name.endswith(".scales") or f"{prefix}weight" not in stored.names:
            continue
        own = said.get(prefix[:-1])
        asked = {**said, **own} if isinstance(own, dict) else said
        if asked.get("mode", "affine") != "affine":
            raise unread(stored, "MLX", str(asked["mode"]))
        parts = present(stored, prefix, "weight", "scales", "biases")
        bits, shape = _form(stored, f"{prefix}weight", parts, asked)
        label = label_of(bits, asked["group_size"], shape[1])
        yield f"{prefix}weight", Packed(parts, shape, partial(decode, bits=bits), label)


def decode(tensors: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """``[out, in]`` float32 weights, by the layout's own rule and from nothing but what is stored."""
    words, biases = tensors["weight"].view(torch.int32), tensors["biases"].float().unsqueeze(-1)
    codes = unpack_stream(words.T.contiguous(), bits, words.shape[1] * 32 // bits).T
    return (scaled(codes, tensors["scales"]).view(*biases.shape[:2], -1) + biases).flatten(1)


def _form(
    stored: LazyTensors, name: str, parts: Mapping[str, str], asked: Mapping[str, Any]
) -> tuple[int, tuple[int, int]]:
    """Bits and ``(out, in)`` of a layer. Raises InputError where its parts do not fit each other."""
    bits, size = asked.get("bits"), asked.get("group_size")
    words, scales = stored.shape(parts["weight"]), stored.shape(parts["scales"])
    if type(bits) is not int or not 1 <= bits <= 8 or type(size) is not int or size <= 0:
        raise damaged(name, "MLX")
    known = "biases" in parts and stored.shape(parts["biases"]) == scales and len(words) == len(scales) == 2
    known = known and words[0] == scales[0] and words[1] * 32 == scales[1] * size * bits
    known = known and stored.dtype(parts["weight"]) == torch.uint32
    if not known or any(stored.dtype(parts[part]) not in FLOATS for part in ("scales", "biases")):
        raise damaged(name, "MLX")
    return bits, (words[0], scales[1] * size)
