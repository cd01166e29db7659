"""EXL3's layout, which exllamav3 reads: the format ``trellis`` with 16-bit states, under other names.

:mod:`ulbq.models.exl3` tells the layout. What exllamav3 makes has Hadamard blocks of 128 everywhere, so only layers of
such widths are written. A head that is not quantized stays as it is, and a tied one is the embedding.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from ulbq import __version__, formats
from ulbq.config.run import DtypeName
from ulbq.export import packed, rules
from ulbq.export.dense import open_again
from ulbq.export.fit import Candidate
from ulbq.export.rules import Obstacle, Reader
from ulbq.export.targets.base import Conversion, Target, Written
from ulbq.formats import AnyScheme, TrellisScheme, trellis
from ulbq.models import exl3
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource

_LAYOUT_OF = "1.6.5"
"""The exllamav3 that the layout was read from."""
_STATE_BITS = 16


def unsupported_reason(scheme: AnyScheme, shape: tuple[int, int]) -> str | None:
    """Why a layer ``(out, in)`` cannot be stored so; None where it can."""
    if not isinstance(scheme, TrellisScheme):
        return "EXL3 stores trellis codes"
    if scheme.state_bits != _STATE_BITS:
        return f"EXL3's states have {_STATE_BITS} bits: quantize with `state_bits={_STATE_BITS}`"
    if any(size % exl3.WIDTH for size in shape):
        return f"EXL3 has Hadamard blocks of {exl3.WIDTH}, which do not divide {shape[0]}×{shape[1]}"
    return None


def stored_bits(scheme: AnyScheme, shape: tuple[int, int]) -> int:
    """What :func:`encode` makes of a layer ``(out, in)``: what the artifact has, and one word for the code."""
    return formats.total_bits(scheme, shape) + 32


def encode(scheme: AnyScheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A layer ``(out, in)`` in this layout; ``scheme`` is one that :func:`unsupported_reason` lets through."""
    return exl3.to_tensors(tensors)


def decode(tensors: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """``[out, in]`` float32 weights; values are not rounded to float16 on the way, as exllamav3 does it."""
    scheme = TrellisScheme.model_validate({"bits": bits, "state_bits": _STATE_BITS})
    return trellis.dequantize(scheme, exl3.from_tensors(tensors), len(tensors["suh"]))


def configuration(source: ModelSource, candidate: Candidate) -> dict[str, Any]:
    """The ``quantization_config``, as exllamav3 writes it; ``bits`` are those of a mean weight."""
    sizes = {name: layer.shape[0] * layer.shape[1] for name, layer in candidate.layers.items()}
    bits = sum(layer.scheme.bits * sizes[name] for name, layer in candidate.layers.items()) / sum(sizes.values())
    data = source.quantized.calibration if source.quantized else {}
    rows = {"rows": data.get("samples", 0), "cols": data.get("sequence_length", 0)}
    return {
        "quant_method": exl3.METHOD,
        "version": _LAYOUT_OF,
        "bits": int(bits) if bits == int(bits) else round(bits, 2),
        "head_bits": 16,
        "calibration": rows,
        "out_scales": "always",
        "codebook": "mul1",
        "quantizer": f"ulbq:{__version__}",
    }


_MODELS = (
    *("arcee", "apertus", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma2", "gemma3_text", "llama", "mistral"),
    *("ministral3", "olmo3", "qwen2", "qwen3", "seed_oss", "smollm3"),
)


def _known(candidate: Candidate, name: str) -> Obstacle | None:
    """The dense text models whose layers exllamav3 has by the names that transformers gives them."""
    kind = candidate.config.model_type
    if kind in _MODELS:
        return None
    return Obstacle(f"{name} {_LAYOUT_OF} has no '{kind}' with these layers", "Use `to=dense`.")


class Exl3Target(Target):
    """The artifact's own codes as EXL3."""

    name = exl3.METHOD
    library = "exllamav3"
    opened = f"{packed.READ_BACK}; opened again"
    readers: ClassVar = {
        "exllamav3": Reader("Config.from_directory(DIR)", "NVIDIA GPU", rules=(_known, rules.lora_only))
    }

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        return packed.unsupported_reason(candidate, unsupported_reason)

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return packed.bits(candidate, stored_bits)

    def dtype(self, source: ModelSource, asked: DtypeName | None) -> DtypeName:
        return asked or "fp16"

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        layout = packed.PackedLayout(encode, decode, configuration(conversion.source, conversion.candidate))
        return packed.write_packed(conversion, folder, layout, on_step)

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        return load_model(open_again(folder), dtype=dtype)


TARGET = Exl3Target()
