"""GPTQ's layout: what AutoGPTQ wrote first, and gptqmodel, transformers, vLLM, SGLang and exllamav2 read.

A layer ``[out, in]`` with ``G`` groups a row is stored as

* ``qweight`` int32 ``[in·b/32, out]``, the codes packed along the inputs;
* ``qzeros``  int32 ``[G, out·b/32]``, the zero points packed along the outputs;
* ``scales``  float16 ``[G, out]``;
* ``g_idx``   int32 ``[in]``, the group of each input: ``0 … 0 1 … 1 …``, nothing is reordered.

``Ŵ = scales · (q − zero)``, as ours. There are two readings of ``qzeros``. The older, ``checkpoint_format:
gptq`` ("v1"), stores ``zero − 1``; a zero point of 0 has no such word, and loaders disagree on what its wrapped around
bits mean (AutoGPTQ's own 3-bit path takes them for 8). ``gptq_v2`` stores ``zero``. So what is symmetric is written as
v1, which everything reads and where the zero point is always ``2^(b−1)``, and what is asymmetric as v2.

A symmetric grid of ours keeps its codes and scales as they are. Where it is mirrored its scale is negative, which the
layout stores and every reader multiplies by.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ulbq import __version__
from ulbq.export.words import pack_words, unpack_words
from ulbq.formats import AffineScheme, AnyScheme, affine
from ulbq.formats.bits import groups_of

BITS = (2, 3, 4, 8)
"""Widths that the layout has."""

_MULTIPLE = 32
"""Of both dimensions: words are filled along either."""


def unfit(scheme: AnyScheme, shape: tuple[int, int]) -> str | None:
    """Why a layer ``(out, in)`` cannot be stored so; None where it can."""
    if not isinstance(scheme, AffineScheme):
        return "GPTQ stores integer codes with one scale and zero point a group"
    if scheme.bits not in BITS:
        return f"GPTQ stores 2, 3, 4 or 8 bits, not {scheme.bits}"
    if any(size % _MULTIPLE for size in shape):
        return f"GPTQ fills words of {_MULTIPLE} values, and {shape[0]}×{shape[1]} does not divide"
    return None


def encode(
    scheme: AffineScheme, packed: Mapping[str, torch.Tensor], shape: tuple[int, int], *, v1: bool
) -> dict[str, torch.Tensor]:
    """A layer's tensors in this layout.

    Args:
        scheme: one that :func:`unfit` lets through.
        packed: our tensors.
        shape: ``(out, in)``.
        v1: store ``zero − 1``.

    Raises:
        ValueError: a zero point of 0 in v1.
    """
    codes, _, zeros = affine.unpack(scheme, packed, shape[1])
    stored = zeros.to(torch.int32) - int(v1)
    if stored.amin() < 0:
        raise ValueError("v1 has no word for a zero point of 0")
    groups = groups_of(shape[1], scheme.group_size)
    return {
        "qweight": pack_words(codes.T, scheme.bits),
        "qzeros": pack_words(stored, scheme.bits).T.contiguous(),
        "scales": packed["scales"].T.contiguous(),
        "g_idx": torch.arange(groups, dtype=torch.int32).repeat_interleave(shape[1] // groups),
    }


def decode(tensors: Mapping[str, torch.Tensor], bits: int, *, v1: bool) -> torch.Tensor:
    """``[out, in]`` float32 weights, by the layout's own rule and from nothing but what is stored."""
    groups = tensors["g_idx"].long()
    inputs, outputs = len(groups), tensors["scales"].shape[1]
    codes = unpack_words(tensors["qweight"], bits, inputs).float()
    zeros = unpack_words(tensors["qzeros"].T.contiguous(), bits, outputs).T.float() + int(v1)
    return ((codes - zeros[groups]) * tensors["scales"].float()[groups]).T.contiguous()


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
