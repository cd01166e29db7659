"""MLX's affine layout, which mlx-lm reads.

:mod:`ulbq.models.foreign.mlx` tells it: a weight is ``scale · code + bias``.

A bias is our ``−scale · zero``. Without zero points that is a float16; with them it has more digits, and both are
float32, in which MLX then computes. Groups that are longer than MLX's repeat what they have. Layout and names were read
from mlx 0.32 and mlx-lm 0.32 (``mlx_lm/utils.py``, ``mlx_lm/models``).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from ulbq.config.run import DtypeName
from ulbq.export import packed
from ulbq.export.fit import Candidate
from ulbq.export.rules import Reader, plain_reason
from ulbq.export.targets.base import Conversion, Target, Written
from ulbq.formats import AffineScheme, AnyScheme, affine
from ulbq.formats.streams import pack_stream
from ulbq.models.foreign.mlx import decode
from ulbq.models.rope_factors import rope_type
from ulbq.models.source import ModelSource
from ulbq.models.stored_names import StoredNames

BITS = (2, 3, 4, 6, 8)
"""Widths of ours that the layout has."""
GROUPS = (128, 64, 32)
"""Columns of a group in MLX."""
MODELS = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
"""Model types that were run."""


def unsupported_reason(scheme: AnyScheme, shape: tuple[int, int]) -> str | None:
    """Why a layer ``(out, in)`` cannot be stored so; None where it can."""
    if not isinstance(scheme, AffineScheme):
        return "MLX's affine layout stores integer codes with one scale and bias a group"
    if scheme.bits not in BITS:
        return f"MLX has 2, 3, 4, 6 and 8 bits, not {scheme.bits}"
    if not group_of(scheme, shape[1]):
        return "MLX has groups of 32, 64 and 128 weights"
    return None


def group_of(scheme: AffineScheme, in_features: int) -> int:
    """The longest of MLX's groups that divides ours; 0 for none."""
    group = in_features if scheme.group_size == -1 else scheme.group_size
    return next((size for size in GROUPS if group % size == 0), 0)


def stored_bits(scheme: AffineScheme, shape: tuple[int, int]) -> int:
    """What :func:`encode` makes of a layer ``(out, in)``, or more than that where zero points happen to allow less."""
    out, columns = shape
    # A bias of −scale · 2ⁿ is a float16, and one of any other multiple of a scale by chance alone.
    each = 32 if scheme.symmetric and scheme.has_zero else 64
    return out * columns * scheme.bits + out * columns // group_of(scheme, columns) * each


def encode(
    scheme: AffineScheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """A layer ``(out, in)`` in this layout; ``scheme`` is one that :func:`unsupported_reason` lets through."""
    codes, scales, zeros = affine.unpack(scheme, tensors, shape[1])
    biases = scales * -(zeros.float() if scheme.has_zero else scheme.centre)
    dtype = torch.float16 if torch.equal(biases.half().float(), biases) else torch.float32
    repeats = shape[1] // scales.shape[1] // group_of(scheme, shape[1])
    return {
        "weight": pack_stream(codes.T, scheme.bits).T.contiguous().view(torch.uint32),
        "scales": scales.to(dtype).repeat_interleave(repeats, 1),
        "biases": biases.to(dtype).repeat_interleave(repeats, 1),
    }


def configuration(layers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What ``config.json`` says as ``quantization``: the width and group that most layers have, and those of others.

    Args:
        layers: group size and bits by the layer's stored name.
    """
    (group, bits), _ = Counter(layers.values()).most_common(1)[0]
    others = {name: {"group_size": g, "bits": b} for name, (g, b) in layers.items() if (g, b) != (group, bits)}
    return {"group_size": group, "bits": bits, "mode": "affine"} | others


def model_reason(config: PreTrainedConfig) -> str | None:
    """Why mlx-lm would not compute a model as transformers does; None where it does."""
    kind = config.model_type
    if kind not in MODELS:
        return f"models of the type '{kind}' were not run in mlx-lm ({', '.join(MODELS)} were)"
    rope = rope_type(config)
    if rope not in (("default",) if kind == "mixtral" else ("default", "linear", "llama3")):
        return f"its rotary embedding is of the type '{rope}'"
    if kind == "qwen3" and getattr(config, "attention_bias", False):
        return "its attention has biases, which mlx-lm does not read for 'qwen3'"
    width = config.hidden_size // config.num_attention_heads
    if kind in ("mixtral", "qwen2") and (getattr(config, "head_dim", None) or width) != width:
        return f"its heads have {config.head_dim} values, and mlx-lm's {width}"
    return plain_reason(config, "mlx-lm")


class MlxTarget(Target):
    """The artifact's own codes for mlx-lm."""

    name = "mlx"
    varies = True
    library = "mlx"
    readers: ClassVar = {"mlx": Reader("mlx_lm.server --model DIR", "Apple silicon")}

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        if (why := model_reason(candidate.config)) is not None:
            return why
        if candidate.adapter:
            return "it has an adapter, and mlx-lm reads none in peft's form"
        if candidate.routers and len(candidate.schemes) > 1:
            return "its layers have several widths, and mlx-lm stacks experts of one"
        return packed.unsupported_reason(candidate, unsupported_reason)

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return packed.bits(candidate, stored_bits)

    def dtype(self, source: ModelSource, asked: DtypeName | None) -> DtypeName:
        return asked or "fp16"

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        candidate, naming = conversion.candidate, StoredNames(conversion.source.config)
        tables = {name: one for name, one in candidate.tables.items() if unsupported_reason(*one) is None}
        layers = {
            naming.layer(name) or name: (group_of(layer.scheme, layer.shape[1]), layer.scheme.bits)
            for name, layer in (*candidate.layers.items(), *tables.items())
            if isinstance(layer.scheme, AffineScheme)
        }
        layout = packed.PackedLayout(encode, decode, configuration(layers), key="quantization", tables=tables)
        return packed.write_packed(conversion, folder, layout, on_step)

    def unopened_reason(self, candidate: Candidate, folder: Path) -> str | None:
        return f"{packed.READ_BACK}; not run, for transformers does not read MLX's layout."


TARGET = MlxTarget()
