"""GGUF's block types, as far as they hold our integer codes without loss.

The simple ones cut rows into blocks of 32 weights, of 64, 128 or 256, with one float16 factor ``d``:

* ``Q1_0``  ``±d``, 128 weights: 1.125 bits a weight;
* ``Q2_0``  ``d · q``,     q from −1 to 2, 64 weights: 2.25 bits;
* ``Q4_0``  ``d · q``,     q from −8 to 7: 4.5 bits;
* ``Q4_1``  ``d · q + m``, q from 0 to 15, ``m`` a second float16: 5 bits;
* ``Q5_0``  ``d · q``,     q from −16 to 15: 5.5 bits;
* ``Q6_K``  ``d · q``,     q from −32 to 31, 256 weights: 6.5625 bits (a factor of each 16 weights is left at one);
* ``Q8_0``  ``d · q``,     q from −128 to 127: 8.5 bits.

Our weights are ``s · (q − z)``. So what counts is the range of the *steps* ``q − z`` and not the width of the codes:
2 bits without zero points fit into Q2_0 where 64 divides the groups, by a negative ``d``; 2 and 3 bits always fit into
Q4_0, with zero points or without, 4 bits without zero points into Q4_0 and with them into Q5_0, 8 bits without into
Q8_0. A grid without a level at zero has odd multiples of half a step, twice as far: 1 bit fits into Q1_0 where 128
divides the groups, 1 to 3 bits fit into Q4_0, 4 bits into Q5_0. Q4_1 takes 4 bits with zero points only where every
``−s·z`` is a float16. Groups that are longer than a block repeat their scale.

Q2_K, Q3_K and Q4_K hold what is stored as :mod:`ulbq.formats.k_quant`, and Q6_K tables of tokens; they round other
scales.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType

from ulbq import formats
from ulbq.formats import AffineScheme, AnyScheme, KQuantScheme, affine, k_quant
from ulbq.formats.k_quant import SUPER_BLOCK, KQuant
from ulbq.models.gguf_types import SIZES, AnyType, NewType, dequantize

_REACH: dict[AnyType, tuple[int, int]] = {
    NewType.Q2_0: (-1, 2),
    GGMLQuantizationType.Q4_0: (-8, 7),
    GGMLQuantizationType.Q5_0: (-16, 15),
    GGMLQuantizationType.Q6_K: (-32, 31),
    GGMLQuantizationType.Q8_0: (-128, 127),
}
"""The least and the greatest step of a type."""


class Blocks(NamedTuple):
    """A matrix in one of the types: uint8 ``[out, bytes a row]``."""

    data: np.ndarray
    kind: AnyType


_K_KINDS: dict[AnyType, int] = {
    GGMLQuantizationType.Q2_K: 2,
    GGMLQuantizationType.Q3_K: 3,
    GGMLQuantizationType.Q4_K: 4,
}
"""Bits of their codes."""

KINDS: tuple[AnyType, ...] = (
    *_K_KINDS,
    GGMLQuantizationType.Q1_0,
    NewType.Q2_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.Q8_0,
)
"""From the smallest on; none of the K types holds what another does."""
FAST_KINDS = tuple(kind for kind in KINDS if kind != NewType.Q2_0)
"""Those that llama.cpp computes with vectors on every processor: for Q2_0 its x86 code is plain C in 2026."""


def kind_of(schemes: Collection[AnyScheme], in_features: int, kinds: Sequence[AnyType] = KINDS) -> AnyType | None:
    """The first of these types that holds every matrix of these schemes, whatever its codes; None where none does."""
    return next((kind for kind in kinds if all(_holds(kind, scheme, in_features) for scheme in schemes)), None)


def _holds(kind: AnyType, scheme: AnyScheme, in_features: int) -> bool:
    if isinstance(scheme, KQuantScheme):
        return _K_KINDS.get(kind) == scheme.bits
    if not isinstance(scheme, AffineScheme) or kind in _K_KINDS:
        return False
    group, block = in_features if scheme.group_size == -1 else scheme.group_size, SIZES[kind][0]
    if in_features % block or group % block:
        return False
    most = 2**scheme.bits - 1
    if kind == GGMLQuantizationType.Q1_0:
        return most == 1 and not scheme.has_zero
    if kind not in _REACH:  # Q4_1's offsets are float16 by chance
        return False
    least, greatest = _REACH[kind]
    if not scheme.has_zero:
        return least <= -most and most <= greatest
    zeros = [int(scheme.centre)] if scheme.symmetric else range(most + 1)
    return all(
        any(least <= -low and high <= greatest for low, high in ((zero, most - zero), (most - zero, zero)))
        for zero in zeros
    )


def encode(
    scheme: AnyScheme, packed: Mapping[str, torch.Tensor], in_features: int, kinds: Sequence[AnyType] = KINDS
) -> Blocks | None:
    """A packed matrix in the first of these types that decodes to the same weights, to the bit; None for none."""
    if isinstance(scheme, KQuantScheme):
        kind = next((kind for kind in kinds if _holds(kind, scheme, in_features)), None)
        return (
            None if kind is None else Blocks(_super_blocks(scheme, k_quant.unpack(scheme, packed, in_features)), kind)
        )
    if not isinstance(scheme, AffineScheme):
        return None
    group = in_features if scheme.group_size == -1 else scheme.group_size
    codes, scales, zeros = affine.unpack(scheme, packed, in_features)
    offsets = None
    if not scheme.has_zero:  # odd multiples of s/2, in whole steps
        steps, scales = codes.float() * 2 - 2 * scheme.centre, scales * 0.5
    else:
        steps = (codes.view(*zeros.shape, -1).float() - zeros.unsqueeze(-1)).flatten(1)
        offsets = scales * -zeros
    exact = formats.dequantize(scheme, packed, in_features).numpy()
    for kind in kinds:
        block = SIZES[kind][0]
        if kind in _K_KINDS or in_features % block or group % block:
            continue
        factors = scales.repeat_interleave(group // block, 1)
        if kind == GGMLQuantizationType.Q4_1:
            found = (
                None
                if offsets is None
                else _offset(
                    codes.view(*factors.shape, block).numpy(),
                    factors.numpy(),
                    offsets.repeat_interleave(group // block, 1).numpy(),
                )
            )
        else:
            found = _centred(steps.view(*factors.shape, block).to(torch.int16).numpy(), factors.numpy(), kind)
        if found is not None and np.array_equal(dequantize(found, kind), exact):
            return Blocks(found, kind)
    return None


def _centred(steps: np.ndarray, factors: np.ndarray, kind: AnyType) -> np.ndarray | None:
    """``[out, blocks, block]`` steps in a type with one factor a block; None where they reach too far."""
    if kind == GGMLQuantizationType.Q1_0:
        if not (np.abs(steps) == 1).all():
            return None
        parts = [factors.astype("<f2")[..., None].view(np.uint8), np.packbits(steps > 0, axis=-1, bitorder="little")]
        return np.concatenate(parts, axis=-1).reshape(len(steps), -1)
    least, greatest = _REACH[kind]
    # A block that reaches too far one way is stored mirrored.
    sign = np.where((steps.max(-1) > greatest) | (steps.min(-1) < least), -1, 1).astype(np.int16)
    steps, d = steps * sign[..., None], (factors * sign).astype("<f2")
    if steps.min() < least or steps.max() > greatest:
        return None
    parts = [d[..., None].view(np.uint8)]
    unsigned = (steps - least).astype(np.uint8)
    if kind == GGMLQuantizationType.Q8_0:
        parts.append(steps.astype(np.int8).view(np.uint8))
    elif kind == NewType.Q2_0:
        parts.append(_quarters(unsigned))
    elif kind == GGMLQuantizationType.Q6_K:
        # The factor of the block comes last here.
        parts = [_sixths(unsigned), np.ones((*d.shape, 16), np.uint8), *parts]
    else:
        if kind == GGMLQuantizationType.Q5_0:
            parts.append(np.packbits(unsigned >> 4, axis=-1, bitorder="little"))
        parts.append(_nibbles(unsigned & 15))
    return np.concatenate(parts, axis=-1).reshape(len(steps), -1)


def _offset(codes: np.ndarray, factors: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
    """``[out, blocks, 32]`` codes as Q4_1; None where they need more than four bits."""
    if codes.max() > 15:
        return None
    d, m = (values.astype("<f2")[..., None].view(np.uint8) for values in (factors, offsets))
    return np.concatenate([d, m, _nibbles(codes)], axis=-1).reshape(len(codes), -1)


def _super_blocks(scheme: KQuantScheme, matrix: KQuant) -> np.ndarray:
    """The blocks of a K type, uint8 ``[out, bytes a row]`` (ggml-common.h)."""
    blocks = (len(matrix.codes), -1, SUPER_BLOCK)
    codes = matrix.codes.numpy().reshape(blocks)
    in_groups = (*codes.shape[:2], -1)
    scales = (matrix.sub_scales - scheme.sub_range[0]).to(torch.uint8).numpy().reshape(in_groups)
    minima = matrix.sub_minima.to(torch.uint8).numpy().reshape(in_groups)
    d, e = (values.numpy().astype("<f2")[..., None].view(np.uint8) for values in (matrix.factors, matrix.minima))
    if scheme.bits == 4:
        # 64 codes are 32 bytes, the first 32 of them below.
        nibbles = _nibbles(codes.reshape(*codes.shape[:2], 4, 64)).reshape(in_groups)
        parts = [d, e, _sixes(scales, minima), nibbles]
    else:
        # 128 codes are 32 bytes, code 32i + k in bits 2i and 2i + 1 of byte k.
        low = _quarters(codes.reshape(*codes.shape[:2], 2, 4, 32).swapaxes(-1, -2) & 3).reshape(in_groups)
        if scheme.bits == 2:
            parts = [scales | minima << 4, low, d, e]
        else:
            high = np.packbits(codes.reshape(*codes.shape[:2], 8, 32) >> 2, axis=-2, bitorder="little")
            parts = [high.reshape(in_groups), low, _signed_sixes(scales), d]
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def _sixes(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of six bits in twelve bytes, as Q4_K has them."""
    above = [values[..., :4] | values[..., 4:] >> 4 << 6 for values in (scales, minima)]
    return np.concatenate([*above, scales[..., 4:] & 15 | minima[..., 4:] << 4], axis=-1)


def _signed_sixes(scales: np.ndarray) -> np.ndarray:
    """Sixteen scales of six bits in twelve bytes, as Q3_K has them: all their low four bits, then the two above."""
    above = _quarters((scales >> 4).reshape(*scales.shape[:-1], 4, 4).swapaxes(-1, -2))
    return np.concatenate([_nibbles(scales & 15), above[..., 0]], axis=-1)


def _nibbles(values: np.ndarray) -> np.ndarray:
    """Two four-bit values a byte: the first half of a block below, the second above."""
    low, high = np.split(values, 2, axis=-1)
    both: np.ndarray = low | (high << 4)
    return both


def _sixths(values: np.ndarray) -> np.ndarray:
    """256 six-bit values a block: for each half the low four bits of its quarters, two a byte; then the high two."""
    low, high = (part.reshape(*values.shape[:-1], 2, 4, 32) for part in (values & 15, values >> 4))
    nibbles = np.concatenate([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], axis=-1)
    shifted = high << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.concatenate(
        [part.reshape(*values.shape[:-1], -1) for part in (nibbles, np.bitwise_or.reduce(shifted, axis=-2))], axis=-1
    )


def _quarters(values: np.ndarray) -> np.ndarray:
    """Four two-bit values a byte, one behind the other from the lowest bits on."""
    apart = values.reshape(*values.shape[:-1], -1, 4) << np.array([0, 2, 4, 6], np.uint8)
    together: np.ndarray = np.bitwise_or.reduce(apart, axis=-1)
    return together
