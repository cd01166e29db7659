"""Floats of eight and four bits with scales, as makers publish whole models: what is made of them is made of those.

``fp8`` (DeepSeek-V3 and V4, Kimi-K2, MiniMax-M2, Qwen3-…-FP8, Ministral 3): ``weight`` float8 ``[…, out, in]`` times
``weight_scale_inv``, ``scale`` or ``qscale_weight``, one for the tensor (``[]``, or ``[experts, 1, 1]``) or one for
each of ``weight_block_size`` ``[…, ⌈out/128⌉, ⌈in/128⌉]``. DeepSeek-V4's experts are int8 ``[out, in/2]``, two E2M1
codes a byte with the lower half first, times ``[out, in/32]``.

``mxfp4`` (gpt-oss): ``…_blocks`` uint8 ``[experts, out, in/32, 16]``, codes as above, and ``…_scales`` uint8
``[experts, out, in/32]``. What they stand for is ``[experts, in, out]``, as gpt-oss's own parameters are.

``modelopt`` (NVIDIA's FP8 and NVFP4), ``fbgemm_fp8``, and compressed-tensors' ``nvfp4-pack-quantized``,
``mxfp4-pack-quantized`` and ``mxfp8-quantized``: ``weight`` float8 ``[out, in]``, or ``weight`` or ``weight_packed``
uint8 ``[out, in/2]``, times ``weight_scale``, one for the tensor, a row, or a group of a row. NVFP4's scales of 16 are
float8 themselves, times ``weight_scale_2``, or divided by ``weight_global_scale``.

Scales of one byte that are no float8 are powers of two, biased by 127 (E8M0). All is laid out as
``transformers.integrations.finegrained_fp8`` and ``.mxfp4`` (5.23) and compressed-tensors 0.20 read it.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError
from ulbq.models.foreign.base import FLOATS, Packed, damaged, present, table, unread

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_BLOCK = (128, 128)  # where the configuration is silent
_ROWS = 128  # that are decoded together
_MX = 32
_NV = 16
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_FOUR_BITS = (torch.int8, torch.uint8)
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_SCALES = {"_scale_inv": "", ".scale": ".weight", ".qscale_weight": ".weight"}
"""How ``fp8`` calls scales, and the weights that they belong to."""

Block = tuple[int, int] | None
"""Rows and columns that share a scale; None for all of a matrix."""


def read_fp8(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """Packed weights by the name that they have in a dense model. Raises InputError."""
    block = _block_of(said)
    for scales in sorted(stored.names):
        ending = next((one for one in _SCALES if scales.endswith(one)), None)
        if ending is None:
            continue
        name = scales.removesuffix(ending) + _SCALES[ending]
        coded = name in stored.names and stored.dtype(name) in (*_EIGHT_BITS, *_FOUR_BITS)
        if coded:
            parts = {"weight": name, "weight_scale": scales}
            yield name, packed(stored, name, parts, "FP8", block, (1, _MX), dtype=torch.bfloat16)
        elif ending == "_scale_inv":
            raise damaged(scales, "FP8")


def read_mxfp4(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """The same of gpt-oss's experts."""
    for codes in sorted(stored.names):
        name = codes.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == codes:
            continue
        shape = stored.shape(codes)
        known = scales in stored.names and len(shape) == 4 and shape[3] == _MX // 2
        known = known and stored.shape(scales) == shape[:3]
        if not known or {stored.dtype(part) for part in (codes, scales)} != {torch.uint8}:
            raise damaged(name, "MXFP4")
        turned = (shape[0], shape[2] * _MX, shape[1])
        yield name, Packed({"blocks": codes, "scales": scales}, turned, _gpt_oss, "MXFP4", torch.bfloat16, floats=True)


def read_modelopt(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """The same of NVIDIA's ModelOpt."""
    algorithm = str(said.get("quant_algo") or table(said, "quantization").get("quant_algo") or "unknown")
    for scales in sorted(stored.names):
        name = scales.removesuffix("_scale")
        if not scales.endswith(".weight_scale"):
            continue
        if name in stored.names and not algorithm.startswith(("FP8", "NVFP4", "MXFP8", "MIXED")):
            raise unread(stored, "ModelOpt", algorithm)
        yield name, beside(stored, name, "ModelOpt")


def read_fbgemm(stored: LazyTensors, said: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    """The same of FBGEMM, as Meta published Llama 3.1 405B."""
    for scales in sorted(stored.names):
        if scales.endswith(".weight_scale"):
            yield (name := scales.removesuffix("_scale")), beside(stored, name, "FBGEMM")


def beside(stored: LazyTensors, name: str, kind: str) -> Packed:
    """A weight whose scales are ``weight_scale``. Raises InputError where its parts do not fit each other."""
    shorts = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale")
    parts = present(stored, name.removesuffix("weight"), *shorts)
    if "weight_packed" in parts:
        parts["weight"] = parts.pop("weight_packed")
    return packed(stored, name, parts, kind)


def packed(
    stored: LazyTensors,
    name: str,
    parts: Mapping[str, str],
    kind: str,
    *blocks: Block,
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """A weight of codes and scales.

    Args:
        stored: the tensors.
        name: of the weight.
        parts: stored names of ``weight`` and ``weight_scale``, and of what those are scaled by.
        kind: who stores it so.
        blocks: that may share a scale; none where the scales' own shape tells.
        dtype: of what it is read as.

    Raises:
        InputError: they do not fit each other.
    """
    if "weight" not in parts:
        raise damaged(name, kind)
    codes, scales = stored.dtype(parts["weight"]), stored.dtype(parts["weight_scale"])
    four, grid = codes in _FOUR_BITS, stored.shape(parts["weight_scale"])
    shape = stored.shape(parts["weight"])
    shape = (*shape[:-1], shape[-1] * (2 if four else 1)) if shape else shape
    more = [part for short, part in parts.items() if short in ("weight_scale_2", "weight_global_scale")]
    known = len(shape) >= 2 and all(shape) and (four or codes in _EIGHT_BITS)
    known = known and scales in (*FLOATS, *_EXPONENTS, *((torch.float8_e4m3fn,) if more else ()))
    known = known and all(stored.dtype(one) == torch.float32 and prod(stored.shape(one)) == 1 for one in more)
    choices = [one for one in blocks or _told(shape, grid) if known and grid in _grids(shape, one)]
    if not choices:
        raise damaged(name, kind)
    rows, columns = choices[0] or shape[-2:]
    label = "FP8"
    if four or (rows, columns) == (1, _MX):
        label = f"{'NV' if columns == _NV else 'MX'}FP{4 if four else 8}"
    return Packed(parts, shape, partial(decode, block=(rows, columns), dtype=dtype), label, dtype, floats=True)


def decode(
    tensors: Mapping[str, torch.Tensor], block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``[…, out, in]`` of ``weight``, ``weight_scale`` and what those are scaled by."""
    codes, scales = tensors["weight"], tensors["weight_scale"]
    four = codes.dtype in _FOUR_BITS
    made = torch.empty((*codes.shape[:-1], codes.shape[-1] * (2 if four else 1)), dtype=dtype)
    (height, width), (rows, columns) = made.shape[-2:], block
    factors = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
    if "weight_scale_2" in tensors:
        factors = factors * tensors["weight_scale_2"].reshape(())
    if "weight_global_scale" in tensors:
        factors = factors / tensors["weight_global_scale"].reshape(())
    for matrix, target, grid in zip(
        codes.view(-1, height, codes.shape[-1]),
        made.view(-1, height, width),
        factors.reshape(-1, -(-height // rows), -(-width // columns)),
        strict=True,
    ):
        for at in range(0, height, _ROWS):
            part = slice(at, at + _ROWS)
            values = _e2m1(matrix[part]) if four else matrix[part].float()
            # Looked up, not repeated: a checkpoint may say that a block is larger than any matrix.
            of_rows = torch.arange(at, at + len(values)) // rows
            torch.mul(values, grid[of_rows][:, torch.arange(width) // columns], out=target[part])
    return made


def _gpt_oss(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``[experts, in, out]``; bfloat16, which holds every such value."""
    blocks, scales = tensors["blocks"], tensors["scales"]
    experts, rows, groups, _ = blocks.shape
    made = torch.empty((experts, groups * _MX, rows), dtype=torch.bfloat16)
    for target, codes, exponents in zip(made, blocks, scales, strict=True):
        target.copy_((_e2m1(codes) * _powers(exponents).unsqueeze(-1)).view(rows, -1).T)
    return made


def _e2m1(pairs: torch.Tensor) -> torch.Tensor:
    """float32 ``[…, 2·n]`` of bytes ``[…, n]`` that hold two codes each."""
    codes = pairs.view(torch.uint8)
    return _E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponents.float() - 127)


def _block_of(said: Mapping[str, Any]) -> Block:
    """Rows and columns that share a scale; None where a matrix has one. Raises InputError for anything else."""
    block = said.get("weight_block_size", _BLOCK)
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise InputError(f"'weight_block_size' in config.json is {block!r}, and not two sizes.")
    return (block[0], block[1])


def _told(shape: tuple[int, ...], grid: tuple[int, ...]) -> list[Block]:
    """Blocks that a shape of scales speaks of: the whole, rows, or groups of a row."""
    if prod(grid) == 1:
        return [None]
    count = grid[1] if len(grid) == 2 else 1
    return [(1, shape[-1] // count)] if count and shape and shape[-1] % count == 0 else []


def _grids(shape: tuple[int, ...], block: Block) -> list[tuple[int, ...]]:
    """Shapes that scales of a tensor may have."""
    *lead, rows, columns = shape
    if block is None:
        return [(*lead, 1, 1), (*lead,), (*lead, 1)] if lead else [(), (1,), (1, 1)]
    whole = [(rows,)] if block == (1, columns) and not lead else []
    return [(*lead, -(-rows // block[0]), -(-columns // block[1])), *whole]
