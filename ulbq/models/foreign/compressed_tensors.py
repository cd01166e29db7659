"""compressed-tensors' layouts of integers and eight-bit floats, as llm-compressor and ulbq write them.

A layer ``[out, in]`` has ``weight_scale`` ``[out, G]``, ``[out, 1]``, or one for the whole, and by its ``format``

* ``pack-quantized``: ``weight_packed`` int32 ``[out, ⌈in·b/32⌉]``, the codes packed along the inputs, ``weight_shape``
  int64 ``[2]``, and where it is asymmetric ``weight_zero_point`` int32 ``[⌈out·b/32⌉, G]``, packed along the outputs.
  Codes and zero points are signed, and ``2^(b−1)`` is added to both for storage. The library packs one stream of bits
  since June 2026; before, as many whole values to a word as fit, which is another thing at 3, 5, 6 and 7 bits.
* ``int-quantized``, ``naive-quantized``: ``weight`` int8, and ``weight_zero_point`` int8 as the scales.
* ``float-quantized``: ``weight`` float8, with a scale for each row, for the whole, or for each block.
* ``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``, ``mxfp8-quantized``: see :mod:`ulbq.models.foreign.floats`.

Older versions store act-order's ``weight_g_idx`` int32 ``[in]``. Layout and names were read from compressed-tensors
0.20. What inputs are rounded to is no matter of weights, and is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.formats.streams import unpack_stream
from ulbq.models.foreign import floats
from ulbq.models.foreign.base import FLOATS, Packed, damaged, label_of, present, scaled, scaled_by_index, table, unread

_KIND = "compressed-tensors"
_LAYOUTS = (
    *("pack-quantized", "int-quantized", "naive-quantized", "float-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_WHOLE = ("dense", "mixed-precision")
"""What is said of a whole model of which nothing, or each layer apart, is packed."""
_WEIGHTS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def read(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    schemes = [one for one in table(said, "config_groups").values() if isinstance(one, dict)]
    layouts = {str(one.get("format") or "dense") for one in (said, table(said, "sparsity_config"), *schemes)}
    if unknown := layouts - {*_LAYOUTS, *_WHOLE}:
        raise unread(stored, _KIND, min(unknown))
    if said.get("transform_config"):
        raise unread(stored, _KIND, "with transforms")
    asked = [weights for one in schemes if isinstance(weights := one.get("weights"), dict)]
    for scales in sorted(stored.names):
        prefix = scales.removesuffix("weight_scale")
        if prefix == scales:
            continue
        name = f"{prefix}weight"
        words = stored.dtype(f"{name}_packed") if f"{name}_packed" in stored.names else None
        if torch.uint8 in (words, stored.dtype(scales)):
            yield name, floats.beside(stored, name, _KIND)
            continue
        shorts = ("weight_scale", "weight_packed", "weight", "weight_zero_point", "weight_g_idx", "weight_shape")
        make = _plain if words is None else _packed
        yield name, make(stored, name, present(stored, prefix, *shorts), asked)


def decode(tensors: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """``[out, in]`` float32 weights of ``pack-quantized``, from nothing but what is stored."""
    rows, columns = tensors["weight_shape"].tolist()
    # Zero points are packed as the codes are, and may be too few to tell how.
    older = tensors["weight_packed"].shape[1] != _words(columns, bits)[0]
    codes = _unpacked(tensors["weight_packed"].T, bits, columns, older=older).T
    scales, zeros = tensors["weight_scale"], tensors.get("weight_zero_point")
    middle = 2 ** (bits - 1)
    if zeros is not None and zeros.dtype != torch.int32:
        zeros = zeros.int() + middle
    elif zeros is not None:
        zeros = _unpacked(zeros, bits, rows, older=older)
    return _dequantized(codes, scales, float(middle) if zeros is None else zeros, tensors.get("weight_g_idx"))


def _unpacked(words: torch.Tensor, bits: int, count: int, *, older: bool) -> torch.Tensor:
    """uint8 ``[count, m]`` of int32 ``[words, m]``: one stream, or in older versions whole values."""
    if not older:
        return unpack_stream(words.contiguous(), bits, count)
    fields = 32 // bits
    shifts = torch.arange(fields, dtype=torch.int32).view(-1, 1) * bits
    values: torch.Tensor = words.unsqueeze(1) >> shifts & (2**bits - 1)
    return values.to(torch.uint8).flatten(0, 1)[:count]


def _dequantized(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | float,
    groups: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> torch.Tensor:
    """float32 ``[out, in]`` of codes and of scales in any of the layout's shapes; zeros have the same, or are one."""
    if block is not None:
        # Looked up, not repeated: a checkpoint may say that a block is larger than any matrix.
        rows, columns = (torch.arange(size) // each for size, each in zip(codes.shape, block, strict=True))
        return codes.float() * scales.float()[rows][:, columns]
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    scales = scales.expand(len(codes), -1)
    if isinstance(zeros, torch.Tensor):
        zeros = zeros.reshape(-1, 1) if zeros.ndim < 2 else zeros
        zeros = zeros.expand(scales.shape)
    # It is stored as -1 throughout where nothing was reordered.
    if groups is not None and int(groups.max()) >= 0:
        return scaled_by_index(codes.T, scales.T, zeros.T if isinstance(zeros, torch.Tensor) else zeros, groups)
    return scaled(codes, scales, zeros)


def _whole(tensors: Mapping[str, torch.Tensor], block: tuple[int, int] | None) -> torch.Tensor:
    zeros = tensors.get("weight_zero_point")
    scales, codes = tensors["weight_scale"], tensors["weight"]
    return _dequantized(codes, scales, 0.0 if zeros is None else zeros, tensors.get("weight_g_idx"), block)


def _packed(stored: LazyTensors, name: str, parts: Mapping[str, str], asked: Sequence[Mapping[str, Any]]) -> Packed:
    """A layer of integers in words. Which of the widths it has that the model is said to have, its shape tells."""
    words = stored.shape(parts["weight_packed"])
    known = "weight_shape" in parts and stored.shape(parts["weight_shape"]) == (2,) and len(words) == 2
    if not known or stored.dtype(parts["weight_packed"]) != torch.int32:
        raise damaged(name, _KIND)
    rows, columns = stored.read(parts["weight_shape"]).tolist()
    widths = [bits for bits in range(1, 9) if any(one.get("num_bits") == bits for one in asked)]
    fitting = [bits for bits in widths if (rows, words[1]) in [(words[0], count) for count in _words(columns, bits)]]
    if len(fitting) != 1 or columns <= 0:
        raise damaged(name, _KIND)
    bits, groups = fitting[0], _groups(stored, name, parts, (rows, columns))
    zeros = parts.get("weight_zero_point")
    if zeros is None or stored.dtype(zeros) != torch.int32:
        fits = zeros is None or stored.shape(zeros) == stored.shape(parts["weight_scale"])
    else:
        fits = stored.shape(zeros) == (_words(rows, bits)[words[1] != _words(columns, bits)[0]], groups)
    if not fits:
        raise damaged(name, _KIND)
    own = {short: part for short, part in parts.items() if short != "weight"}
    return Packed(own, (rows, columns), partial(decode, bits=bits), label_of(bits, columns // groups, columns))


def _plain(stored: LazyTensors, name: str, parts: Mapping[str, str], asked: Sequence[Mapping[str, Any]]) -> Packed:
    """A layer of eight bits a weight."""
    shape, scales = stored.shape(parts["weight"]) if "weight" in parts else (), stored.shape(parts["weight_scale"])
    zeros = parts.get("weight_zero_point")
    if len(shape) != 2 or stored.dtype(parts["weight"]) not in _WEIGHTS:
        raise damaged(name, _KIND)
    if zeros is not None and stored.shape(zeros) != scales:
        raise damaged(name, _KIND)
    blocks = [found for one in asked if (found := _block_of(one.get("block_structure"))) is not None]
    block = next((one for one in blocks if scales == (-(-shape[0] // one[0]), -(-shape[1] // one[1]))), None)
    if stored.dtype(parts["weight"]).is_floating_point:
        label = "FP8"
    else:
        label = label_of(8, shape[1] // scales[1] if len(scales) == 2 and scales[1] else -1, shape[1])
    if block is None or scales == (shape[0], 1):
        block = None
        _groups(stored, name, parts, (shape[0], shape[1]))
    elif zeros is not None or stored.dtype(parts["weight_scale"]) not in FLOATS:
        raise damaged(name, _KIND)
    return Packed(parts, (shape[0], shape[1]), partial(_whole, block=block), label, floats=label == "FP8")


def _words(count: int, bits: int) -> tuple[int, int]:
    """Words that so many values take, as one stream and as whole values."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def _groups(stored: LazyTensors, name: str, parts: Mapping[str, str], shape: tuple[int, int]) -> int:
    """Groups a row. Raises InputError where scales or the order of inputs do not fit a weight of this shape."""
    scales = stored.shape(parts["weight_scale"])
    rows, columns = (*scales, 1, 1)[:2]
    fits = len(scales) < 3 and rows in (1, shape[0]) and columns > 0 and shape[1] % columns == 0
    if "weight_g_idx" in parts:
        fits = fits and stored.shape(parts["weight_g_idx"]) == (shape[1],)
    if not fits or stored.dtype(parts["weight_scale"]) not in FLOATS:
        raise damaged(name, _KIND)
    return columns


def _block_of(said: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale: ``[128, 128]``, in older versions ``"128x128"``; None for anything else."""
    sizes = said.split("x") if isinstance(said, str) else said
    try:
        tall, wide = map(int, sizes)
    except (TypeError, ValueError, OverflowError):
        return None
    return (tall, wide) if min(tall, wide) > 0 else None
