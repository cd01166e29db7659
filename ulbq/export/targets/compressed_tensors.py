"""compressed-tensors' layout ``pack-quantized``, which vLLM, SGLang and transformers read.

:mod:`ulbq.models.foreign.compressed_tensors` tells it. What lies in the words is our unsigned codes as they are, at 3
bits as the library packs them since June 2026 (before, ten to a word); 2, 4 and 8 bits are the same in every version.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ulbq.export import packed, rules
from ulbq.export.fit import Candidate, affine_schemes
from ulbq.export.rules import Obstacle, Reader
from ulbq.export.targets.base import Conversion, Target, Written
from ulbq.formats import AffineScheme, AnyScheme, affine
from ulbq.formats.bits import groups_of
from ulbq.formats.streams import pack_stream
from ulbq.models.foreign.compressed_tensors import decode

BITS = (2, 3, 4, 8)
"""Widths of ours that the layout has."""


def unsupported_reason(scheme: AnyScheme, shape: tuple[int, int]) -> str | None:
    """Why a layer ``(out, in)`` cannot be stored so; None where it can."""
    if not isinstance(scheme, AffineScheme):
        return "compressed-tensors' pack-quantized stores integer codes with one scale and zero point a group"
    if not scheme.has_zero:
        return "compressed-tensors' zero points are integers, and those of a mid-rise grid lie between two codes"
    if scheme.bits not in BITS:
        return f"engines read 2 to 8 bits of it, not {scheme.bits}"
    if any(size % 32 for size in shape):
        return f"engines read whole words of 32 values, and {shape[0]}×{shape[1]} does not divide"
    return None


def stored_bits(scheme: AffineScheme, shape: tuple[int, int]) -> int:
    """What :func:`encode` makes of a layer ``(out, in)``."""
    out, columns = shape
    of_group = 16 if scheme.symmetric else 16 + scheme.bits
    return out * columns * scheme.bits + groups_of(columns, scheme.group_size) * out * of_group + 128


def encode(
    scheme: AffineScheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """A layer ``(out, in)`` in this layout; ``scheme`` is one that :func:`unsupported_reason` lets through."""
    codes, _, zeros = affine.unpack(scheme, tensors, shape[1])
    stored = {
        "weight_packed": pack_stream(codes.T, scheme.bits).T.contiguous(),
        "weight_scale": tensors["scales"].contiguous(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        stored["weight_zero_point"] = pack_stream(zeros, scheme.bits)
    return stored


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


def _no_zero_points(candidate: Candidate, name: str) -> Obstacle | None:
    if _is_symmetric(candidate):
        return None
    # 5.23 with compressed-tensors 0.20 makes room for unpacked zero points and refuses the packed ones.
    change = "Use `to=gptq`, or quantize with `symmetric`."
    return Obstacle(f"it has zero points, and {name} loads no packed ones", change)


def _no_adapter(candidate: Candidate, name: str) -> Obstacle | None:
    if not candidate.adapter:
        return None
    # 5.23 leaves its layers without a weight, of which peft takes the dimensions.
    return Obstacle("it has an adapter, and peft 0.21 puts none beside compressed-tensors' layers", rules.MERGE)


def _is_symmetric(candidate: Candidate) -> bool:
    return all(scheme.symmetric for scheme in affine_schemes(candidate))


class CompressedTensorsTarget(Target):
    """The artifact's own codes as ``pack-quantized``."""

    name = "compressed-tensors"
    keeps = True
    opened = packed.OPENED
    readers: ClassVar = {
        "vllm": Reader(rules.VLLM, "NVIDIA GPU", 0, (*rules.SERVED, rules.ANY_GROUPS), elsewhere=rules.ON_CPU),
        "vllm-cpu": Reader(rules.VLLM_CPU_INT4, "CPU", 0, (rules.bits(4), *rules.SERVED), needs=rules.W4A8),
        "transformers": Reader(
            rules.AUTO_MODEL,
            rank=1,
            rules=(_no_zero_points, _no_adapter),
            needs="It needs the package compressed-tensors.",
        ),
        "sglang": Reader(rules.SGLANG, "NVIDIA GPU", 0, rules.SERVED, humming=rules.beyond_marlin),
    }

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        return packed.unsupported_reason(candidate, unsupported_reason)

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return packed.bits(candidate, stored_bits)

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        layers, dense = packed.stored_layers(conversion)
        layout = packed.PackedLayout(encode, decode, configuration(layers, dense))
        return packed.write_packed(conversion, folder, layout, on_step)

    def unopened_reason(self, candidate: Candidate, folder: Path) -> str | None:
        missing = packed.unopened_reason(candidate, folder, "compressed_tensors")
        if missing is None and not _is_symmetric(candidate):
            return f"{packed.READ_BACK}; not run, for transformers reads no zero points of this layout."
        return missing


TARGET = CompressedTensorsTarget()
