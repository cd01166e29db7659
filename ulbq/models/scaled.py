"""Checkpoints that their makers publish in FP8 or MXFP4: their weights in bfloat16, one tensor at a time.

``fp8`` (DeepSeek-V3, Kimi-K2, MiniMax-M2, Qwen3-…-FP8, Ministral 3): ``weight`` float8 ``[…, out, in]`` times
``weight_scale_inv``, one for the tensor (``[]``, or ``[experts, 1, 1]``) or one for each of ``weight_block_size``
``[…, ⌈out/128⌉, ⌈in/128⌉]``. Scales are floats, or powers of two in E8M0.

``mxfp4`` (gpt-oss): ``…_blocks`` uint8 ``[experts, out, in/32, 16]``, two E2M1 codes a byte with the lower half first,
and ``…_scales`` uint8 ``[experts, out, in/32]``, powers of two biased by 127. What they stand for is
``[experts, in, out]``, as gpt-oss's own parameters are.

Both are laid out as ``transformers.integrations.finegrained_fp8`` and ``.mxfp4`` (5.16) read them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError

METHODS = {"fp8": "FP8", "mxfp4": "MXFP4"}
"""By ``quant_method``, what it is called."""

_GROUP = 32
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_BLOCK = (128, 128)  # where the configuration is silent
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


class _Parts(NamedTuple):
    """Stored names of codes and scales, and the shape of what they stand for."""

    codes: str
    scales: str
    shape: tuple[int, ...]


class ScaledTensors(LazyTensors):
    """Tensors of a checkpoint in FP8 or MXFP4; codes and scales are the tensor that they stand for, in bfloat16.

    Args:
        stored: as they lie there.
        quantization: the ``quantization_config``; its ``quant_method`` is one of :data:`METHODS`.

    Raises:
        InputError: codes and scales do not fit each other.
    """

    def __init__(self, stored: LazyTensors, quantization: Mapping[str, Any]) -> None:
        super().__init__(())
        self._packed, self._method = stored, str(quantization["quant_method"])
        self._block = _block_of(quantization)
        # What inputs are scaled by says nothing of weights.
        self._stored = {name: one for name, one in stored._stored.items() if not name.endswith("activation_scale")}
        found = self._eight_bits() if self._method == "fp8" else self._four_bits()
        self._parts = dict(found)
        for name, parts in self._parts.items():
            where = self._stored[parts.codes]
            self._stored.pop(parts.scales)
            self._stored.pop(parts.codes)
            self._stored[name] = where._replace(shape=parts.shape, dtype="BF16")

    @property
    def stored_as(self) -> tuple[str, float] | None:
        """``FP8`` or ``MXFP4``, and bits a value of what is so; None where nothing is."""
        values = sum(torch.Size(parts.shape).numel() for parts in self._parts.values())
        size = sum(self._packed.nbytes(part) for parts in self._parts.values() for part in (parts.codes, parts.scales))
        return (METHODS[self._method], 8 * size / values) if values else None

    def read(self, name: str) -> torch.Tensor:
        """As any other; what is scaled comes in bfloat16."""
        parts = self._parts.get(name)
        if parts is None:
            return self._packed.read(name)
        codes, scales = self._packed.read(parts.codes), self._packed.read(parts.scales)
        return four_bits(codes, scales) if self._method == "mxfp4" else eight_bits(codes, scales, self._block)

    def _eight_bits(self) -> Iterator[tuple[str, _Parts]]:
        for scales in sorted(self._packed.names):
            name = scales.removesuffix("_scale_inv")
            if name == scales:
                continue
            if name not in self._packed.names or self._packed.dtype(name) not in _EIGHT_BITS:
                raise _unknown(scales, "FP8")
            shape, grid = self._packed.shape(name), self._packed.shape(scales)
            if len(shape) < 2 or self._packed.dtype(scales) not in _SCALES or grid not in _grids(shape, self._block):
                raise _unknown(name, "FP8")
            yield name, _Parts(name, scales, shape)

    def _four_bits(self) -> Iterator[tuple[str, _Parts]]:
        for codes in sorted(self._packed.names):
            name = codes.removesuffix("_blocks")
            scales = f"{name}_scales"
            if name == codes:
                continue
            shape = self._packed.shape(codes)
            known = scales in self._packed.names and len(shape) == 4 and shape[3] == _GROUP // 2
            known = known and self._packed.shape(scales) == shape[:3]
            if not known or {self._packed.dtype(part) for part in (codes, scales)} != {torch.uint8}:
                raise _unknown(name, "MXFP4")
            yield name, _Parts(codes, scales, (shape[0], shape[2] * _GROUP, shape[1]))


def eight_bits(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """bfloat16 ``[…, out, in]`` of float8 codes, and of scales for each block or, None, for each matrix."""
    made = torch.empty(codes.shape, dtype=torch.bfloat16)
    height, width = codes.shape[-2:]
    rows, columns = block or (height, width)
    matrices, whole = (tensor.view(-1, height, width) for tensor in (codes, made))
    factors = scales.float().reshape(len(matrices), -1, -(-width // columns))
    for matrix, target, grid in zip(matrices, whole, factors, strict=True):
        for row, factor in enumerate(grid):
            part = slice(row * rows, (row + 1) * rows)
            torch.mul(matrix[part].float(), factor.repeat_interleave(columns)[:width], out=target[part])
    return made


def four_bits(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 ``[experts, in, out]`` of MXFP4, exactly."""
    experts, rows, groups, _ = blocks.shape
    made = torch.empty((experts, groups * _GROUP, rows), dtype=torch.bfloat16)
    for expert in range(experts):
        codes = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), -1).flatten(-2)
        values = _E2M1[codes.int()] * torch.exp2(scales[expert].float() - 127).unsqueeze(-1)
        made[expert] = values.view(rows, -1).T
    return made


def _block_of(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where a matrix has one. Raises InputError for anything else."""
    block = quantization.get("weight_block_size", _BLOCK)
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise InputError(f"'weight_block_size' in config.json is {block!r}, and not two sizes.")
    return (block[0], block[1])


def _grids(shape: tuple[int, ...], block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Shapes that scales of a tensor may have."""
    *lead, rows, columns = shape
    if block is not None:
        return [(*lead, -(-rows // block[0]), -(-columns // block[1]))]
    return [(*lead, 1, 1), (*lead,), (*lead, 1)] if lead else [(), (1,), (1, 1)]


def _unknown(name: str, kind: str) -> InputError:
    return InputError(
        f"'{name}' is stored otherwise than {kind} is.",
        hint="The checkpoint is damaged, or of another layout: give the full-precision model.",
    )
