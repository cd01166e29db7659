"""GGUF's types of tensors: those that the package gguf knows, and those that llama.cpp has had since.

``Q1_0`` and ``Q2_0`` begin each block with a float16 ``d`` and hold codes from the lowest bit of a byte on: 128 weights
``±d`` of one bit, and 64 weights ``d · (code − 1)`` of two (ggml-common.h and ggml-quants.c of llama.cpp, 2026).
"""

from enum import IntEnum

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


class NewType(IntEnum):
    """What gguf 0.19 has no name for."""

    Q2_0 = 42


AnyType = GGMLQuantizationType | NewType

SIZES: dict[AnyType, tuple[int, int]] = dict(GGML_QUANT_SIZES) | {NewType.Q2_0: (64, 18)}
"""Weights and bytes of a block by type."""

_CODES = {GGMLQuantizationType.Q1_0: 1, NewType.Q2_0: 2}
_LEVELS = {1: np.array([-1, 1], np.float32), 2: np.array([-1, 0, 1, 2], np.float32)}


def type_of(number: int) -> AnyType:
    """The type that a file's number means. Raises ValueError for none."""
    return NewType(number) if number in set(NewType) else GGMLQuantizationType(number)


def dequantize(data: npt.NDArray[np.uint8], kind: AnyType) -> npt.NDArray[np.float32]:
    """Weights float32 ``[..., in]`` of blocks uint8 ``[..., bytes a row]``. NotImplementedError: not this type."""
    bits = _CODES.get(kind)
    if bits is None:
        known: npt.NDArray[np.float32] = gguf.dequantize(data, GGMLQuantizationType(kind))
        return known
    blocks = np.ascontiguousarray(data).reshape(*data.shape[:-1], -1, SIZES[kind][1])
    d = blocks[..., :2].copy().view("<f2").astype(np.float32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (blocks[..., 2:, None] >> shifts) & (2**bits - 1)
    weights: npt.NDArray[np.float32] = d * _LEVELS[bits][codes.reshape(*blocks.shape[:-1], -1)]
    return weights.reshape(*data.shape[:-1], -1)
