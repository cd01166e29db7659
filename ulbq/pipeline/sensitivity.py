"""What is measured before the first block is quantized: saliency, what errors cost, what a method decides by both."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from pydantic import TypeAdapter

from ulbq.artifacts.saliency import BlockScores
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.artifacts.store import ArtifactWriter
from ulbq.config.saliency import SaliencyKind
from ulbq.data.calibration import Calibration
from ulbq.methods.base import DecidedMethod
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.survey import survey
from ulbq.progress import Progress
from ulbq.sensitivity import Saliency, SaliencySettings, block_file, compute_saliency
from ulbq.sensitivity.outputs import OutputCosts, OutputSettings, output_file, read_outputs, weigh_outputs

_SCORES = "saliency of block "
_OUTPUTS = "outputs of block "
_DECISIONS = "decisions"


def score_weights(job: Job, writer: ArtifactWriter, calibration: Calibration | None, progress: Progress) -> Saliency:
    """Scores of the model's weights, computed into the scratch folder on the samples that train."""
    settings = SaliencySettings(
        kind=TypeAdapter(SaliencyKind).validate_python(job.method.needs.saliency),
        precision=job.precision,
        activation_memory=job.request.activation_memory,
    )
    folder = writer.scratch / "saliency"
    folder.mkdir(exist_ok=True)
    done = {
        scores.index: scores
        for key, value in writer.journal.items()
        if key.startswith(_SCORES)
        for scores in [BlockScores.model_validate(value)]
    }

    def note(scores: BlockScores) -> None:
        writer.record(f"{_SCORES}{scores.index}", scores, files=[folder / block_file(scores.index)])

    blocks = compute_saliency(
        job.model,
        job.source,
        job.found,
        None if calibration is None else calibration.drawn[: job.request.samples],
        settings,
        folder,
        scratch=writer.scratch,
        progress=progress,
        done=done,
        on_block=note,
    )
    return Saliency(folder, [layer for block in blocks for layer in block.layers])


def weigh_layer_outputs(job: Job, writer: ArtifactWriter, calibration: Calibration, progress: Progress) -> None:
    """Write what errors at the outputs of all layers cost into the scratch folder, by the samples that train."""
    needs, folder = job.method.needs, writer.scratch
    settings = OutputSettings(
        precision=job.precision,
        activation_memory=job.request.activation_memory,
        groups=needs.output_groups,
        between=needs.between_outputs,
        # A product of two sides is taken for the Hessian of the KL divergence, for which the model's own tokens count.
        seed=job.request.seed if needs.between_outputs else None,
    )
    weigh_outputs(
        job.model,
        job.source,
        job.found,
        calibration.drawn[: job.request.samples],
        settings,
        folder,
        scratch=folder,
        progress=progress,
        done={int(key.removeprefix(_OUTPUTS)) for key in writer.journal if key.startswith(_OUTPUTS)},
        on_block=lambda index: writer.record(f"{_OUTPUTS}{index}", {}, files=[folder / output_file(index)]),
    )


def output_costs(job: Job, scratch: Path, index: int) -> dict[str, OutputCosts] | None:
    """What errors at the outputs of a block's layers cost; None where that was not asked for."""
    if not job.method.needs.output_groups or job.start is not None:
        return None
    return read_outputs(scratch, index, job.names(index)[1], job.precision.device)


def decided(
    job: Job, writer: ArtifactWriter, calibration: Calibration, saliency: Saliency | None, progress: Progress
) -> Job:
    """The run, once its method has looked at all blocks; a resumed one goes by what the first one decided."""
    shard = writer.scratch / "decisions.safetensors"
    if _DECISIONS not in writer.journal:
        scores = partial(layer_scores, saliency, job.precision.device)
        outputs = partial(output_costs, job, writer.scratch)
        write_shard(shard, survey(job, calibration.drawn, scores, outputs, writer.scratch, progress))
        writer.record(_DECISIONS, {}, files=[shard])
    stored = LazyTensors([shard])
    decisions = {name: stored.read(name) for name in sorted(stored.names)}
    widths = {name.removesuffix(".bits"): int(bits) for name, bits in decisions.items() if name.endswith(".bits")}
    schemes = {
        name: job.schemes.get(name, job.method.scheme).model_copy(update={"bits": bits})
        for name, bits in widths.items()
    }
    method = job.method if widths else cast(DecidedMethod, job.method).decided(decisions)
    return dataclasses.replace(job, method=method, schemes={**job.schemes, **schemes})


def layer_scores(saliency: Saliency | None, device: torch.device, prefix: str) -> Callable[[str], torch.Tensor] | None:
    """Reads scores of a block's layers, by name inside the block; None where there are none."""
    return None if saliency is None else lambda linear: saliency.score(prefix + linear).to(device)
