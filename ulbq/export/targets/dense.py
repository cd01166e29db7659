"""A plain half- or full-precision model folder that transformers loads without ulbq."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ulbq.config.run import DtypeName
from ulbq.export import dense, packed
from ulbq.export.dense import open_again
from ulbq.export.fit import Candidate
from ulbq.export.rules import AUTO_MODEL, SGLANG, VLLM, VLLM_CPU, Reader
from ulbq.export.targets.base import Conversion, Target, Written, layer_reason
from ulbq.models.source import ModelSource


class DenseTarget(Target):
    """Every weight dense; packed layers are computed in float32 and rounded once."""

    name = "dense"
    keeps = True
    merges = True
    readers: ClassVar = {
        "transformers": Reader(AUTO_MODEL, rank=3),
        "vllm": Reader(VLLM, "GPU", 2),
        "vllm-cpu": Reader(VLLM_CPU, "CPU", 2),
        "sglang": Reader(SGLANG, "GPU", 2),
    }

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        return layer_reason(candidate, dense.unsupported_reason)

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return packed.bits(candidate, packed.dense_bits)

    def dtype(self, source: ModelSource, asked: DtypeName | None) -> DtypeName:
        return asked or "bf16"

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        keeps, dtype = conversion.keeps, conversion.dtype
        stored = f"what was packed in {dtype}, the rest as it is stored there" if keeps else f"all weights in {dtype}"
        return Written(stored, packed.write_folder(conversion, folder, on_step)[0])

    def load(self, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
        open_again(folder)
        return super().load(folder, dtype)


TARGET = DenseTarget()
