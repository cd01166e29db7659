"""An artifact with everything that is not codes in half precision.

`quantize` stores float32 parameters as bfloat16 and scales as float16. What is left in float32 came in otherwise: norms
or biases that trained after that, buffers, or an artifact that another program changed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

from ulbq import formats
from ulbq.artifacts.disk import changed, sha256_file, writing
from ulbq.artifacts.shards import INDEX_NAME, write_guard, write_index, write_shard
from ulbq.config.run import DtypeName
from ulbq.data.calibration import CALIBRATION_FILE, TEXT_FILE
from ulbq.errors import InputError, NumericsError, UsageError
from ulbq.export import packed
from ulbq.export.fit import Candidate
from ulbq.export.rules import AUTO_MODEL, VLLM, VLLM_CPU, Reader, lora_only, no_experts, no_tables
from ulbq.export.targets.base import FULL_PRECISION, Conversion, Target, Written
from ulbq.formats.rounding import vanishes
from ulbq.models.adapter_files import ADAPTER_FOLDER
from ulbq.models.blocks import skeleton, structure
from ulbq.models.load import DTYPES
from ulbq.models.side_files import check_link, is_side_file
from ulbq.models.source import ModelSource

_OWN = frozenset({"config.json", "README.md", "finetune.html", "report.html"})
_SAMPLES = frozenset({CALIBRATION_FILE, TEXT_FILE})

PLUGIN = "It needs the plug-in ulbq-vllm"
_OF_PLUGIN = (lora_only, no_experts, no_tables)


def wide_tensors(source: ModelSource) -> dict[str, torch.dtype]:
    """Stored parameters of an artifact that are wider than half precision, by name.

    Buffers are none of them: what a mixture's correction biases decide, they decide in float32.
    """
    if source.stored is None:
        return {}
    buffers = {name for name, _ in skeleton(source).named_buffers()}
    found = {name: source.stored.dtype(name) for name in sorted(source.stored.names - buffers - {*source.carried})}
    return {name: dtype for name, dtype in found.items() if dtype.is_floating_point and dtype.itemsize > 2}


def _is_copied(name: str) -> bool:
    """Whether a file of an artifact is one that ulbq itself writes, or of a kind that travels with a model."""
    return name in _OWN | _SAMPLES or name.startswith(f"{ADAPTER_FOLDER}/") or is_side_file(name)


class HalfTarget(Target):
    """A copy of an artifact, its wide parameters rounded."""

    name = "half"
    is_artifact = True
    library = "ulbq"
    readers: ClassVar = {
        "transformers": Reader(AUTO_MODEL, rank=None, needs="It needs ulbq."),
        "vllm-cpu": Reader(VLLM_CPU, "CPU", 3, _OF_PLUGIN, needs=f"{PLUGIN}."),
        "vllm": Reader(VLLM, "NVIDIA GPU", None, _OF_PLUGIN, needs=f"{PLUGIN}, which was not run on a GPU."),
    }

    def unsupported_reason(self, candidate: Candidate, *, merge_adapter: bool = False) -> str | None:
        return None if candidate.layers else FULL_PRECISION

    def bits(self, candidate: Candidate, *, merge_adapter: bool = False) -> int:
        return packed.bits(candidate, formats.total_bits)

    def dtype(self, source: ModelSource, asked: DtypeName | None) -> DtypeName:
        if asked == "fp32":
            raise UsageError("fp32 is no half precision.", hint="Use `dtype=fp16` or bf16, or leave it out.")
        return super().dtype(source, asked)

    def steps(self, source: ModelSource) -> int:
        return len(source.stored.files) if source.stored is not None else 0

    def write(self, conversion: Conversion, folder: Path, on_step: Callable[[str], None]) -> Written:
        source, dtype = conversion.source, DTYPES[conversion.dtype]
        wide, saved = wide_tensors(source), {"embeddings": 0, "other": 0}
        found = structure(skeleton(source))
        tables = {f"{name}.weight" for name in (*found.embeddings, found.head)}
        shards: dict[str, list[str]] = {}
        stored = source.stored
        if stored is None:
            raise InputError(f"'{source.given}' holds no packed weights.")
        for path in stored.files:
            tensors = {name: stored.read(name) for name in sorted(stored.names) if stored.file(name) == path}
            for name in wide.keys() & tensors.keys():
                rounded = tensors[name].to(dtype)
                if not rounded.isfinite().all():
                    raise NumericsError(f"'{name}' does not fit {dtype}.", hint="Use `dtype=bf16`.")
                if vanishes(tensors[name], rounded):
                    raise NumericsError(f"'{name}' is too small for {dtype}.", hint="Use `dtype=bf16`.")
                saved["embeddings" if name in tables else "other"] += (tensors[name].nbytes - rounded.nbytes) * 8
                tensors[name] = rounded
            write_shard(folder / path.name, tensors)
            shards[path.name] = list(tensors)
            on_step(path.name)
        files = {} if source.manifest is None else source.manifest.files
        with writing(folder):
            # What the manifest names and nothing else: the new folder may itself lie in the old one.
            copied = sorted(filter(_is_copied, files.keys() - shards.keys() - {INDEX_NAME}))
            for name in copied:
                check_link(source.path / name, source.path)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source.path / name, folder / name)
                # Who opened the source looked at all that is read of it, and samples are not.
                if name in _SAMPLES and sha256_file(folder / name) != files[name].sha256:
                    raise changed(source.path / name)
        shards |= write_guard(folder, source.packed)
        write_index(folder, shards)
        names = [*copied, *shards, INDEX_NAME]
        told = "nothing changed, all of it was in half precision already; this is a copy"
        if wide:
            told = f"{len(wide)} float32 tensors became {conversion.dtype}, {sum(saved.values()) // 8:,} bytes less"
        return Written(told, names, saved, tables=source.tables)


TARGET = HalfTarget()
