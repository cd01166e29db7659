"""GPTQ's layout, as AutoGPTQ, gptqmodel, AutoRound and ulbq write it.

A layer ``[out, in]`` with ``G`` groups a row is stored as

* ``qweight`` int32 ``[in·b/32, out]``, the codes packed along the inputs as one stream of bits;
* ``qzeros``  int32 ``[G, out·b/32]``, the zero points packed along the outputs;
* ``scales``  floats ``[G, out]``;
* ``g_idx``   int32 ``[in]``, the group of each input. With act-order they are in any order. AutoRound leaves it out.

``Ŵ = scales · (q − zero)``. ``checkpoint_format: gptq`` ("v1") stores ``zero − 1``, ``gptq_v2`` stores ``zero``.
gptqmodel goes from one to the other by adding a one in every field to a word as a whole, so that a field that runs over
counts in its neighbour; at 3 bits field by field. Symmetric layers in v1 have the zero point ``2^(b−1)``, whatever is
stored: gptqmodel wrote others at 3 bits, and vLLM does not look at them either.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.formats.streams import pack_stream, unpack_stream
from ulbq.models.foreign.base import FLOATS, Packed, damaged, label_of, present, scaled, scaled_by_index, table, unread

_BITS = range(2, 9)
_LAYOUTS = {"gptq": True, "gptq_v2": False}


def read(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    layout = str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()
    if said.get("is_marlin_format"):
        layout = "marlin"
    if layout not in _LAYOUTS or said.get("pack_dtype", "int32") != "int32":
        raise unread(stored, "GPTQ", f"{layout}, {said.get('pack_dtype', 'int32')}")
    own = [one for one in table(said, "dynamic").values() if isinstance(one, dict)]
    symmetric = said.get("sym") is True and not any("sym" in one for one in own)
    yield from layers(stored, said, v1=_LAYOUTS[layout], symmetric=symmetric)


def layers(stored: LazyTensors, said: Mapping[str, Any], *, v1: bool, symmetric: bool) -> Iterator[tuple[str, Packed]]:
    """The layers of either version.

    Args:
        stored: as they lie there.
        said: has the ``group_size`` for layers without ``g_idx``.
        v1: ``zero − 1`` is stored.
        symmetric: every layer is.
    """
    for name in sorted(stored.names):
        prefix = name.removesuffix("qweight")
        if not name.endswith(".qweight"):
            continue
        parts = present(stored, prefix, "qweight", "qzeros", "scales", "g_idx")
        bits, shape, size = _form(stored, f"{prefix}weight", parts, said)
        groups = None if "g_idx" in parts else torch.arange(shape[1], dtype=torch.int32) // size
        decoded = partial(_weight, bits=bits, v1=v1, symmetric=symmetric and v1, groups=groups)
        yield f"{prefix}weight", Packed(parts, shape, decoded, label_of(bits, size, shape[1]))


def decode(tensors: Mapping[str, torch.Tensor], bits: int, *, v1: bool) -> torch.Tensor:
    """``[out, in]`` float32 weights, by the layout's own rule and from nothing but what is stored."""
    columns, groups = len(tensors["qweight"]) * 32 // bits, len(tensors["scales"])
    in_order = None if "g_idx" in tensors else torch.arange(columns) // (columns // groups)
    return _weight(tensors, bits, v1=v1, groups=in_order)


def _weight(
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    *,
    v1: bool,
    symmetric: bool = False,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    at = tensors["g_idx"] if groups is None else groups
    codes = unpack_stream(tensors["qweight"], bits, len(at))
    zeros, scales = float(2 ** (bits - 1)) if symmetric else _zeros(tensors, bits, v1=v1), tensors["scales"]
    size, over = divmod(len(at), len(scales))
    if not over and torch.equal(at, torch.arange(len(at), dtype=at.dtype) // size):
        return scaled(codes.T, scales.T, zeros.T if isinstance(zeros, torch.Tensor) else zeros)
    return scaled_by_index(codes, scales, zeros, at)


def _zeros(tensors: Mapping[str, torch.Tensor], bits: int, *, v1: bool) -> torch.Tensor:
    """Zero points ``[G, out]``, integers."""
    words, outputs = tensors["qzeros"].T.contiguous(), tensors["scales"].shape[1]
    if v1 and 32 % bits == 0:
        words = words + pack_stream(torch.ones(outputs, 1), bits)
    zeros = unpack_stream(words, bits, outputs)
    return (zeros.add_(1).bitwise_and_(2**bits - 1) if v1 and 32 % bits else zeros).T


def _form(
    stored: LazyTensors, name: str, parts: Mapping[str, str], said: Mapping[str, Any]
) -> tuple[int, tuple[int, int], int]:
    """Bits, ``(out, in)`` and group size of a layer. Raises InputError where its parts do not fit each other."""
    if not parts.keys() >= {"qzeros", "scales"} or stored.dtype(parts["scales"]) not in FLOATS:
        raise damaged(name, "GPTQ")
    words, zeros, scales = (stored.shape(parts[part]) for part in ("qweight", "qzeros", "scales"))
    integers = {stored.dtype(parts[part]) for part in ("qweight", "qzeros", "g_idx") if part in parts}
    if not len(words) == len(zeros) == len(scales) == 2 or integers != {torch.int32} or not all((*words, *scales)):
        raise damaged(name, "GPTQ")
    groups, rows = scales
    bits, over = divmod(zeros[1] * 32, rows)
    if over or bits not in _BITS or zeros[0] != groups or words[1] != rows or words[0] * 32 % bits:
        raise damaged(name, "GPTQ")
    columns = words[0] * 32 // bits
    size = said.get("group_size")
    if type(size) is not int or size <= 0 or -(-columns // size) != groups:
        size = -(-columns // groups)  # what a layer has of its own stands in `dynamic` or `extra_config`
    known = stored.shape(parts["g_idx"]) == (columns,) if "g_idx" in parts else -(-columns // size) == groups
    if not known:
        raise damaged(name, "GPTQ")
    return bits, (rows, columns), size
