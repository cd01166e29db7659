"""AutoRound's form of GPTQ's layout: zero points as they are, and no ``g_idx``.

It is what auto-round 0.16 writes as ``packing_format: auto_round``. Its own kernels, which transformers calls, round
the inputs to half precision. vLLM and SGLang read ``auto_round:auto_gptq`` alone, which stores ``zero − 1``: they get
:mod:`~ulbq.export.targets.gptq` and :mod:`~ulbq.export.targets.compressed_tensors`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from ulbq.export import packed, rules
from ulbq.export.fit import Candidate
from ulbq.export.rules import Reader
from ulbq.export.targets import gptq
from ulbq.export.targets.base import Conversion, Target, Written
from ulbq.formats import AffineScheme
from ulbq.models.blocks import block_list, skeleton
from ulbq.models.foreign.gptq import decode


def stored_bits(scheme: AffineScheme, shape: tuple[int, int]) -> int:
    """What :func:`encode` makes of a layer ``(out, in)``."""
    return gptq.stored_bits(scheme, shape) - 32 * shape[1]


def encode(
    scheme: AffineScheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """A layer ``(out, in)`` in this layout; ``scheme`` is one that :func:`gptq.unsupported_reason` lets through."""
    stored = gptq.encode(scheme, tensors, shape, v1=False)
    del stored["g_idx"]
    return stored


def configuration(layers: Mapping[str, AffineScheme], dense: tuple[str, ...], blocks: str) -> dict[str, Any]:
    """The ``quantization_config``.

    Args:
        layers: schemes of the packed layers by full name.
        dense: full names of the linear layers inside the blocks that are not packed.
        blocks: name of the list that holds the blocks.
    """
    shared = gptq.most_frequent(layers)
    others = {name: _settings(scheme) for name, scheme in layers.items() if scheme != shared}
    others |= {name: {"bits": 16} for name in dense}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        **_settings(shared),
        "data_type": "int",
        "block_name_to_quantize": blocks,
        **({"extra_config": others} if others else {}),
    }


def _settings(scheme: AffineScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


class AutoRoundTarget(Target):
    """The artifact's own codes for auto-round's part of transformers."""

    name = "auto-round"
    keeps = True
    opened = packed.OPENED
    readers: ClassVar = {"transformers": Reader(rules.AUTO_MODEL, rank=2, needs="It needs the package auto-round.")}

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        if candidate.adapter:
            return "it has an adapter, and peft 0.21 puts none beside auto-round's layers"
        return packed.unsupported_reason(candidate, gptq.unsupported_reason)

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return packed.bits(candidate, stored_bits)

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        layers, beside = packed.stored_layers(conversion)
        blocks = block_list(skeleton(conversion.source))[0]
        dense = tuple(name for name in beside if name.startswith(f"{blocks}."))
        layout = packed.PackedLayout(encode, partial(decode, v1=False), configuration(layers, dense, blocks))
        return packed.write_packed(conversion, folder, layout, on_step)

    def unopened_reason(self, candidate: Candidate, folder: Path) -> str | None:
        return packed.unopened_reason(candidate, folder, "auto_round")


TARGET = AutoRoundTarget()
