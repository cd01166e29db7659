"""The artifact that a fine-tuning run leaves: the base's packed weights, what learnt beside them, and a report."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ulbq import runtime
from ulbq.artifacts.disk import replace_synced, temporary, write_atomically, writing
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.records import BitsReport, FinetuneRecord
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.artifacts.store import ArtifactWriter
from ulbq.config.adapter import AdapterConfig
from ulbq.export import loading
from ulbq.export.card import Card, base_of, front_of
from ulbq.export.fit import Candidate
from ulbq.export.markdown import code, plain
from ulbq.models.adapter_files import ADAPTER_FILES, ADAPTER_FOLDER, write_adapter
from ulbq.models.side_files import check_link
from ulbq.pipeline.finetune_page import page
from ulbq.pipeline.finetune_plan import FinetuneJob, side_files

REPORT = "finetune.html"
"""The page of loss curves."""

Packed = Mapping[str, Mapping[str, torch.Tensor]]

_UNLINKABLE = frozenset({errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES, errno.ENOSYS})


def take_over(job: FinetuneJob, writer: ArtifactWriter) -> None:
    """Bring the base's files into the new folder: shards as hard links where the file system has them, else copies.

    Small files are always copied, for people edit them.
    """
    names = side_files(job.manifest)
    writer.plan(*names)
    with writing(writer.out):
        for name in names:
            source, target = job.source.path / name, writer.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            weights = name.endswith(".safetensors")
            if weights:
                LazyTensors([source])  # whose own place is free to choose, if weights are what it leads to
            else:
                check_link(source, job.source.path)
            (link_or_copy if weights else copy)(source, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be; whole or not at all."""
    try:
        # A link to the file itself: in a Hub cache, files are symbolic links.
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _UNLINKABLE:
            raise
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    scratch = temporary(target)
    shutil.copyfile(source, scratch)
    replace_synced(scratch, target)


def write_artifact(
    job: FinetuneJob,
    writer: ArtifactWriter,
    adapter: Mapping[str, torch.Tensor],
    form: AdapterConfig,
    packed: Packed | None,
    record: FinetuneRecord,
    watch: runtime.Stopwatch,
) -> QuantizedManifest:
    """Write everything that is not the base's, and describe the whole.

    Args:
        adapter: by full name of the layer, a dot and peft's short name.
        form: of the adapter.
        packed: tensors of the packed layers whose scales trained, by full name; None where the base stays.
        record: how the training went.

    Raises:
        NumericsError: the adapter does not fit float16.
        ResourceError: the disk is full.
    """
    folder, base = writer.path, job.manifest
    write_adapter(folder / ADAPTER_FOLDER, form, adapter, os.path.abspath(writer.out))
    writer.plan(*ADAPTER_FILES, "config.json", "README.md", REPORT)
    layers = base.layers
    if packed is not None:
        _write_packed(folder, job.source.path, packed)
        # The full-precision weights need not be at hand: how far the new ones are from them is not known.
        layers = tuple(layer.model_copy(update={"error": float("nan")}) for layer in layers)
    parts = {name: bits for name, bits in base.bits.parts.items() if name != "adapter"}
    stored = sum(tensor.numel() for tensor in adapter.values()) * 16
    bits = BitsReport(parts={**parts, "adapter": stored}, weights=base.bits.weights)
    manifest = QuantizedManifest(
        name=writer.name,
        request=job.request.model_dump(mode="json"),
        seed=job.request.seed,
        device=job.plan.device,
        parents=(*(parent for parent in base.parents[:1]), job.source.record()),
        phases=tuple(watch.records),
        method=base.method,
        scheme=base.scheme,
        bits=bits,
        layers=layers,
        tables=base.tables,
        blocks=base.blocks,
        temperature=base.temperature,
        end_to_end=base.end_to_end,
        finetune=record,
        skipped=base.skipped,
        coverage=None if base.coverage is None else bits.of_all(base.coverage),
        rotation=base.rotation,
        calibration=base.calibration,
    )
    with writing(writer.out):
        _write_config(folder, job.source.path)
        (folder / "README.md").write_text(_card(job, manifest, record), encoding="utf-8")
        (folder / REPORT).write_text(page(manifest, record), encoding="utf-8")
    return manifest


def _write_packed(folder: Path, base: Path, packed: Packed) -> None:
    """Write the shards that hold packed layers anew, with the layers' new tensors."""
    new = {f"{linear}.{short}": tensor for linear, tensors in packed.items() for short, tensor in tensors.items()}
    for shard in sorted(base.glob("*.safetensors")):
        stored = LazyTensors([shard])
        if stored.names.isdisjoint(new):
            continue
        tensors = {name: new[name] if name in new else stored.read(name) for name in sorted(stored.names)}
        # In place of the link, which must not be written through.
        (folder / shard.name).unlink(missing_ok=True)
        write_shard(folder / shard.name, tensors)


def _write_config(folder: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.setdefault("quantization_config", {})["adapter"] = True
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _card(job: FinetuneJob, manifest: QuantizedManifest, record: FinetuneRecord) -> str:
    """The model card; licence, language and base model are those that the base's own card names."""
    data, bits = record.data, manifest.bits.bits_per_weight
    kind: Literal["LoRA", "DoRA"] = "DoRA" if job.adapter.dora else "LoRA"
    loads = loading.of_artifact(replace(Candidate.of(job.source), adapter=kind))
    return Card(
        name=f"{manifest.name}, {bits:.2f} bits",
        base=base_of(job.source),
        front=front_of(job.source),
        made=[
            f"Quantized with ulbq, method {code(manifest.method)}",
            f"Fine-tuned from {code(job.manifest.name)} with {code(f'ulbq finetune --task {record.task}')} on "
            f"{data['samples']:,} samples of {plain(', '.join(map(str, data['sources'])))}",
            f"Weights: packed, {bits:.3f} true bits per linear weight, a {kind} adapter of rank {job.adapter.rank} "
            "included",
            *([] if manifest.coverage is None else [plain(manifest.coverage.words)]),
            f"Perplexity of {data['heldout']} held-out answers: {record.start_perplexity:.3f} before, "
            f"{record.end_perplexity:.3f} after; `{REPORT}` has the curves",
            "`manifest.json` records how it was made",
        ],
        loads=loads,
        tags=[manifest.method, manifest.scheme["format"], record.task],
    ).markdown()
