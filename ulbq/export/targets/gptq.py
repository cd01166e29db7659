"""GPTQ's layout: what AutoGPTQ wrote first, and gptqmodel, transformers, vLLM, SGLang and exllamav2 read.

:mod:`ulbq.models.foreign.gptq` tells it. ``scales`` are float16 here, and ``g_idx`` is ``0 … 0 1 … 1 …``: nothing is
reordered. There are two readings of ``qzeros``. The older, ``checkpoint_format: gptq`` ("v1"), stores ``zero − 1``; a
zero point of 0 has no such word, and loaders disagree on what its wrapped around bits mean (AutoGPTQ's own 3-bit path
takes them for 8). ``gptq_v2`` stores ``zero``. So what is symmetric is written as v1, which everything reads and where
the zero point is always ``2^(b−1)``, and what is asymmetric as v2.

A symmetric grid of ours keeps its codes and scales as they are. Where it is mirrored its scale is negative, which the
layout stores and every reader multiplies by.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ulbq import __version__
from ulbq.artifacts.disk import write_atomically, writing
from ulbq.export import packed, rules
from ulbq.export.fit import Candidate, affine_schemes
from ulbq.export.rules import Obstacle, Reader
from ulbq.export.targets.base import Conversion, Target, Written
from ulbq.formats import AffineScheme, AnyScheme, affine
from ulbq.formats.bits import groups_of
from ulbq.formats.streams import pack_stream
from ulbq.models.blocks import block_list, skeleton
from ulbq.models.foreign.gptq import decode

BITS = (2, 3, 4, 8)
"""Widths that the layout has."""

_MULTIPLE = 32
"""Of both dimensions: words are filled along either."""


def unsupported_reason(scheme: AnyScheme, shape: tuple[int, int]) -> str | None:
    """Why a layer ``(out, in)`` cannot be stored so; None where it can."""
    if not isinstance(scheme, AffineScheme):
        return "GPTQ stores integer codes with one scale and zero point a group"
    if not scheme.has_zero:
        return "GPTQ's zero points are integers, and those of a mid-rise grid lie between two codes"
    if scheme.bits not in BITS:
        return f"GPTQ stores 2, 3, 4 or 8 bits, not {scheme.bits}"
    if any(size % _MULTIPLE for size in shape):
        return f"GPTQ fills words of {_MULTIPLE} values, and {shape[0]}×{shape[1]} does not divide"
    return None


def stored_bits(scheme: AffineScheme, shape: tuple[int, int]) -> int:
    """What :func:`encode` makes of a layer ``(out, in)``."""
    out, columns = shape
    return out * columns * scheme.bits + groups_of(columns, scheme.group_size) * out * (16 + scheme.bits) + 32 * columns


def encode(
    scheme: AffineScheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], *, v1: bool
) -> dict[str, torch.Tensor]:
    """A layer's tensors in this layout.

    Args:
        scheme: one that :func:`unsupported_reason` lets through.
        tensors: as packed.
        shape: ``(out, in)``.
        v1: store ``zero − 1``.

    Raises:
        ValueError: a zero point of 0 in v1.
    """
    codes, _, zeros = affine.unpack(scheme, tensors, shape[1])
    stored = zeros.to(torch.int32) - int(v1)
    if stored.amin() < 0:
        raise ValueError("v1 has no word for a zero point of 0")
    groups = groups_of(shape[1], scheme.group_size)
    return {
        "qweight": pack_stream(codes.T, scheme.bits),
        "qzeros": pack_stream(stored, scheme.bits).T.contiguous(),
        "scales": tensors["scales"].T.contiguous(),
        "g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(shape[1] // groups),
    }


def configuration(layers: Mapping[str, AffineScheme], dense: tuple[str, ...]) -> dict[str, Any]:
    """The ``quantization_config``, which is also the content of ``quantize_config.json``.

    Args:
        layers: schemes of the packed layers by full name.
        dense: full names of the linear layers inside the blocks that are not packed.
    """
    shared = most_frequent(layers)
    # What the layers do not share, and what stays dense, is written as gptqmodel and vLLM read it: by pattern.
    dynamic: dict[str, dict[str, Any]] = {f"-:^{_pattern(name)}$": {} for name in dense}
    for name, scheme in layers.items():
        if scheme != shared:
            fields = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
            dynamic[f"+:^{_pattern(name)}$"] = fields
    return {
        "quant_method": "gptq",
        "bits": shared.bits,
        "group_size": shared.group_size,
        "sym": is_v1(layers),
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if is_v1(layers) else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"ulbq:{__version__}"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }


def is_v1(layers: Mapping[str, AffineScheme]) -> bool:
    """Whether a model is written in the older reading: where every layer is symmetric."""
    return all(scheme.symmetric for scheme in layers.values())


def most_frequent(layers: Mapping[str, AffineScheme]) -> AffineScheme:
    """The scheme that most layers have, the first of them where several do."""
    schemes = list(layers.values())
    return max(schemes, key=schemes.count)


def _pattern(name: str) -> str:
    return name.replace(".", r"\.")


_AUTO_GPTQ = ("llama", "mistral", "qwen2", "gemma", "gpt_neox", "falcon", "opt", "gpt2", "gptj", "bloom", "mixtral")


def _known_to_auto_gptq(candidate: Candidate, name: str) -> Obstacle | None:
    kind = candidate.config.model_type
    if kind in _AUTO_GPTQ:
        return None
    return Obstacle(f"{name} 0.7.1 has no '{kind}'", "Use gptqmodel, which succeeds it: `engine=gptqmodel`.")


def _wants_humming(candidate: Candidate) -> bool:
    return rules.beyond_marlin(candidate) or not all(scheme.symmetric for scheme in affine_schemes(candidate))


_ALIKE = (rules.symmetric, rules.uniform)
_FOUR = (rules.bits(4), *_ALIKE, rules.MARLIN_GROUPS)
_SERVED = (rules.uniform, *rules.SERVED)


def _no_dora(candidate: Candidate, name: str) -> Obstacle | None:
    if candidate.adapter != "DoRA":
        return None
    return Obstacle("its adapter is a DoRA, and peft 0.21 puts none beside GPTQ's layers", rules.MERGE)


class GptqTarget(Target):
    """The artifact's own codes in GPTQ's layout."""

    name = "gptq"
    keeps = True
    opened = packed.OPENED
    readers: ClassVar = {
        "gptqmodel": Reader("GPTQModel.load(DIR)", rules=(rules.ANY_GROUPS,)),
        "transformers": Reader(
            rules.AUTO_MODEL, rules=(rules.uniform, _no_dora), needs="It needs the packages optimum and gptqmodel."
        ),
        "vllm": Reader(rules.VLLM, "NVIDIA GPU", 1, _SERVED, humming=_wants_humming, elsewhere=rules.ON_CPU),
        "vllm-cpu": Reader(rules.VLLM_CPU_INT4, "CPU", 1, (*_FOUR, *rules.SERVED), needs=rules.W4A8),
        "sglang": Reader(rules.SGLANG, "NVIDIA GPU", 1, _SERVED, humming=_wants_humming),
        # AutoGPTQ computes with an empty head where that is tied.
        "auto-gptq": Reader(
            "AutoGPTQForCausalLM.from_quantized(DIR, use_safetensors=True)",
            rules=(_known_to_auto_gptq, *_ALIKE),
            untie=True,
        ),
        "exllamav2": Reader("ExLlamaV2Config(DIR)", "NVIDIA GPU", 0, _FOUR),
    }

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        return packed.unsupported_reason(candidate, unsupported_reason)

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return packed.bits(candidate, stored_bits)

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        layers, beside = packed.stored_layers(conversion)
        v1, inside = is_v1(layers), f"{block_list(skeleton(conversion.source))[0]}."
        dense = tuple(name for name in beside if name.startswith(inside))
        layout = packed.PackedLayout(
            functools.partial(encode, v1=v1), functools.partial(decode, v1=v1), configuration(layers, dense)
        )
        written = packed.write_packed(conversion, folder, layout, on_step)
        with writing(folder):
            text = json.dumps(layout.configuration, indent=2) + "\n"
            write_atomically(folder / "quantize_config.json", text.encode())
        written.names.append("quantize_config.json")
        return written

    def unopened_reason(self, candidate: Candidate, folder: Path) -> str | None:
        return packed.unopened_reason(candidate, folder, "optimum", "gptqmodel")


TARGET = GptqTarget()
