"""compressed-tensors' layout ``pack-quantized``, which vLLM, SGLang and transformers read.

A layer ``[out, in]`` with ``G`` groups a row is stored as

* ``weight_packed``     int32 ``[out, in·b/32]``, the codes packed along the inputs;
* ``weight_scale``      float16 ``[out, G]``;
* ``weight_zero_point`` int32 ``[out·b/32, G]``, the zero points packed along the outputs (asymmetric only);
* ``weight_shape``      int64 ``[2]``.

Codes and zero points are signed there, and ``2^(b−1)`` is added to both for storage: what lies in the words is our
unsigned codes as they are. Values of 3 bits lie astride words, as the library packs them since June 2026 (before, ten
to a word); 2, 4 and 8 bits are the same in every version.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ulbq.export.words import pack_words, unpack_words
from ulbq.formats import AffineScheme, AnyScheme, affine

BITS = (2, 3, 4, 8)
"""Widths of ours that the layout has."""


def unfit(scheme: AnyScheme, shape: tuple[int, int]) -> str | None:
    """Why a layer ``(out, in)`` cannot be stored so; None where it can."""
    if not isinstance(scheme, AffineScheme):
        return "compressed-tensors' pack-quantized stores integer codes with one scale and zero point a group"
    if scheme.bits not in BITS:
        return f"engines read 2 to 8 bits of it, not {scheme.bits}"
    if any(size % 32 for size in shape):
        return f"engines read whole words of 32 values, and {shape[0]}×{shape[1]} does not divide"
    return None


def encode(scheme: AffineScheme, packed: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A layer's tensors in this layout; ``scheme`` is one that :func:`unfit` lets through, ``shape`` ``(out, in)``."""
    codes, _, zeros = affine.unpack(scheme, packed, shape[1])
    tensors = {
        "weight_packed": pack_words(codes.T, scheme.bits).T.contiguous(),
        "weight_scale": packed["scales"].contiguous(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack_words(zeros, scheme.bits)
    return tensors


def decode(tensors: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """``[out, in]`` float32 weights, by the layout's own rule and from nothing but what is stored."""
    outputs, inputs = tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"].float().unsqueeze(-1)
    codes = unpack_words(tensors["weight_packed"].T.contiguous(), bits, inputs).T.float()
    stored = tensors.get("weight_zero_point")
    zeros: torch.Tensor | float = float(2 ** (bits - 1))
    if stored is not None:
        zeros = unpack_words(stored, bits, outputs).float().unsqueeze(-1)
    return ((codes.reshape(*scales.shape[:2], -1) - zeros) * scales).flatten(1)


def configuration(layers: Mapping[str, AffineScheme], dense: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config``.

    Args:
        layers: schemes of the packed layers by full name.
        dense: full names of all linear layers that are not packed, the head among them.
    """
    kinds = list(dict.fromkeys(layers.values()))
    # One group takes all that is linear; several have to name their layers.
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(kinds) == 1 else [name for name, scheme in layers.items() if scheme == kind],
            "weights": _weights(kind),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for index, kind in enumerate(kinds)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(scheme: AffineScheme) -> dict[str, Any]:
    grouped = scheme.group_size != -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
