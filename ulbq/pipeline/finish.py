"""The end of a quantization run: what lies beside the tensors, and the manifest's records."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ulbq import formats, runtime
from ulbq.artifacts.disk import writing
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.records import (
    BitsReport,
    BlockRecord,
    Coverage,
    EndToEndRecord,
    ExpertsRecord,
    LayerRecord,
    Parent,
    TemperatureRecord,
)
from ulbq.artifacts.shards import LazyTensors
from ulbq.artifacts.store import ArtifactWriter
from ulbq.data.calibration import Calibration
from ulbq.export.card import quantized_card
from ulbq.export.fit import Candidate, Layer, left_dense, nameless
from ulbq.formats import AnyScheme, read_scheme
from ulbq.formats.bits import stored_bits
from ulbq.formats.rounding import relative_error
from ulbq.methods.base import BlockTask, Packed
from ulbq.models.adapter_files import ADAPTER_FILES, ADAPTER_FOLDER, write_adapter
from ulbq.nn.experts import place_of
from ulbq.pipeline import layout
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.quantize_page import REPORT, page
from ulbq.pipeline.tables import table_records
from ulbq.training.block import TrainOutcome

TUNED = "tuned "
"""Journal keys of blocks that the end-to-end phase changed, before their index."""

TEMPERATURE = "temperature"
"""Journal key of the temperature that was fitted."""


def layer_record(
    job: Job, name: str, original: torch.Tensor, packed: Packed, scheme: AnyScheme | None = None
) -> LayerRecord:
    """What the manifest says of a layer.

    Args:
        job: the run.
        name: full name of the layer.
        original: its full-precision weight ``[out, in]``.
        packed: what is stored.
        scheme: how; None where it is the method's.
    """
    scheme, shape = scheme or job.method.scheme, (original.shape[0], original.shape[1])
    # What an artifact has stored, and a run leaves as it is, was read into the host's memory.
    packed = {role: tensor.to(original.device) for role, tensor in packed.items()}
    error = relative_error(original, formats.dequantize(scheme, packed, shape[1]))
    sparsity = formats.sparsity(scheme, packed, shape[1])
    bits = {str(role): count for role, count in stored_bits(scheme.tensors(*shape)).items()}
    described = scheme.model_dump(mode="json")
    return LayerRecord(name=name, shape=shape, scheme=described, bits=bits, error=error, sparsity=sparsity)


def recorded_schemes(entry: Mapping[str, Any], prefix: str) -> dict[str, AnyScheme]:
    """Schemes of a finished block's layers, by name inside the block.

    Args:
        entry: the block's step in the journal.
        prefix: full name of the block, with the dot.
    """
    layers = [LayerRecord.model_validate(layer) for layer in entry["layers"]]
    return {layer.name.removeprefix(prefix): read_scheme(layer.scheme) for layer in layers}


def block_record(index: int, outcome: TrainOutcome, seconds: float) -> BlockRecord:
    """What the manifest says of a block's training."""
    return BlockRecord(
        index=index,
        start_error=outcome.start_error,
        end_error=outcome.end_error,
        steps=outcome.steps,
        retries=outcome.retries,
        fallback=outcome.fallback,
        spurious_sinks=outcome.sinks,
        seconds=round(seconds, 3),
    )


def mixture_records(task: BlockTask) -> list[ExpertsRecord]:
    """What the manifest says of the tokens that a block's experts saw."""
    found: dict[str, dict[int, int]] = {}
    for linear, count in task.tokens.items():
        if (place := place_of(task.block, linear)) is not None:
            found.setdefault(place.owner, {})[place.expert] = count
    return [
        ExpertsRecord(name=task.prefix + owner, tokens=tuple(counts[number] for number in sorted(counts)))
        for owner, counts in found.items()
    ]


def mixtures(journal: Mapping[str, Any], blocks: int) -> list[ExpertsRecord]:
    """Those of all blocks that are done."""
    found = [one for index in range(blocks) for one in journal[str(index)].get("experts", ())]
    return [ExpertsRecord.model_validate(one) for one in found]


def finish(
    job: Job,
    writer: ArtifactWriter,
    calibration: Calibration | None,
    outer: Mapping[str, int],
    watch: runtime.Stopwatch,
    end_to_end: EndToEndRecord | None = None,
    warned: tuple[str, ...] = (),
) -> QuantizedManifest:
    """Write everything beside the tensors, and describe the whole.

    Args:
        outer: stored bits outside the blocks.
        warned: what the run warned of.
    """
    folder, source = writer.path, job.source
    entries = [writer.journal[str(index)] for index in range(job.found.n_blocks)]
    last = [writer.journal.get(f"{TUNED}{index}", entry) for index, entry in enumerate(entries)]
    layers = [LayerRecord.model_validate(layer) for entry in last for layer in entry["layers"]]
    shards = [folder / layout.block_shard(index) for index in range(job.found.n_blocks)]
    adapter, tables = _write_adapter(job, writer), table_records(writer.journal)
    bits = layout.bits_report(layers, shards, outer, adapter)
    covered = bits.of_all(job.plan.coverage)
    card = _card(job, bits, covered, layers, warned)
    weights = [shard.name for shard in shards] + [name for name in writer.planned if name.startswith("model-")]
    scheme = job.method.scheme
    writer.plan(*layout.write_folder(folder, source, scheme, job.made_by, bits, layers, card, weights, tables))
    writer.plan(REPORT)
    manifest = QuantizedManifest(
        name=writer.name,
        request=job.request.record.model_dump(mode="json"),
        seed=job.request.seed,
        device=job.plan.device,
        parents=_parents(job),
        phases=tuple(watch.records),
        method=job.made_by,
        scheme=job.method.scheme.model_dump(mode="json"),
        bits=bits,
        layers=tuple(layers),
        tables=tables,
        blocks=tuple(BlockRecord.model_validate(entry["block"]) for entry in entries if "block" in entry),
        experts=tuple(mixtures(writer.journal, job.found.n_blocks)),
        temperature=_temperature(job, writer),
        end_to_end=end_to_end,
        skipped=job.found.skipped,
        coverage=covered,
        rotation=job.source.rotation,
        warnings=warned,
        calibration=calibration.record() if calibration else {},
    )
    with writing(writer.out):
        (folder / REPORT).write_text(page(manifest), encoding="utf-8")
    return manifest


def _card(job: Job, bits: BitsReport, covered: Coverage, layers: Sequence[LayerRecord], warned: tuple[str, ...]) -> str:
    """The model card."""
    packed = {layer.name: Layer(read_scheme(layer.scheme), layer.shape) for layer in layers}
    adapter = job.method.needs.adapter
    inside, routers = left_dense(job.found.skipped, packed)
    candidate = Candidate(
        given=job.source.given,
        config=job.source.config,
        layers=packed,
        adapter="" if adapter is None else "DoRA" if adapter.dora else "LoRA",
        unpacked=nameless(inside, job.model),
        routers=routers,
    )
    recipe = job.request.recipe
    return quantized_card(
        job.source,
        candidate,
        method=job.made_by,
        recipe=None if recipe is None else recipe.name,
        bits_per_weight=bits.bits_per_weight,
        counted=[part for part in bits.parts if bits.counts(part)],
        covered=covered,
        warned=warned,
    )


def _temperature(job: Job, writer: ArtifactWriter) -> TemperatureRecord | None:
    """What was fitted in this run, or lies in the artifact that it went on from."""
    if TEMPERATURE in writer.journal:
        return TemperatureRecord.model_validate(writer.journal[TEMPERATURE])
    manifest = None if job.start is None else job.start.source.quantized
    return None if manifest is None else manifest.temperature


def _write_adapter(job: Job, writer: ArtifactWriter) -> int:
    """Gather the blocks' adapters in one folder, as peft has it; returns their stored bits."""
    config = job.method.needs.adapter
    if config is None:
        return 0
    shards = [writer.scratch / layout.adapter_shard(index) for index in range(job.found.n_blocks)]
    stored = LazyTensors(shards)
    tensors = {name: stored.read(name) for name in sorted(stored.names)}
    write_adapter(writer.path / ADAPTER_FOLDER, config, tensors, os.path.abspath(writer.out))
    writer.plan(*ADAPTER_FILES)
    return sum(tensor.nbytes for tensor in tensors.values()) * 8


def _parents(job: Job) -> tuple[Parent, ...]:
    """What the artifact was made from: the model first, then what it went on from or was weighted by."""
    found = [job.source.record()]
    if job.start is not None:
        found.append(job.start.source.record())
    if job.saliency is not None and job.saliency.manifest is not None:
        manifest, path = job.saliency.manifest, str(job.method.needs.saliency)
        absolute = os.path.realpath(Path(path).expanduser())
        digest = manifest.digest
        found.append(Parent(kind=manifest.kind, name=manifest.name, path=path, sha256=digest, absolute=absolute))
    return tuple(found)
