"""``finetune`` on a task: an artifact in, one that has learnt the task out; its weights stay packed throughout."""

import math
import operator
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ulbq import distributed, runtime
from ulbq.artifacts.disk import writing
from ulbq.artifacts.manifest import SCHEMA_VERSION, QuantizedManifest, read_back
from ulbq.artifacts.records import FinetuneRecord
from ulbq.artifacts.store import ArtifactWriter
from ulbq.config.finetune import NOT_IN_FINGERPRINT
from ulbq.data.examples import ExampleSet, padding
from ulbq.errors import NumericsError
from ulbq.finetuning.checkpoint import TrainerCheckpoint, latest, note
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.trainer import Trainer
from ulbq.models.adapter_training import (
    adapter_form,
    adapter_parameters,
    fresh_adapter,
    round_as_stored,
    trained_adapter,
)
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.finetune_plan import FinetuneJob
from ulbq.pipeline.finetuned import take_over, write_artifact
from ulbq.pipeline.proof import proof
from ulbq.pipeline.scales import adapter_student, pack_scales, shard_packed, train_scales
from ulbq.pipeline.warned import Recording
from ulbq.progress import Progress, Silent
from ulbq.tracking import Log, tracked
from ulbq.training.linear import TrainedLinear
from ulbq.training.optimizer import task_lr_factor
from ulbq.training.sharding import whole

_CURVE = 1000  # points of a loss curve


def finetune(
    job: FinetuneJob, progress: Progress | None = None, *, name: str | None = None
) -> tuple[Path, QuantizedManifest]:
    """Train an artifact's adapter, and its scales where that was asked for, on a task.

    A run that was stopped goes on from its last checkpoint, on the CPU to the same bytes.

    Args:
        job: as :func:`~ulbq.pipeline.finetune_plan.prepare` settled it.
        progress: told how it goes.
        name: of the artifact where the request names no folder.

    Returns:
        The artifact's folder and its manifest.

    Raises:
        InputError: the artifact is damaged, or the output is taken or another run's.
        NumericsError: a loss is not finite, or what was learnt cannot be stored. The checkpoints stay.
        ResourceError: memory or disk are missing.
    """
    progress = Recording(progress or Silent())
    watch = runtime.Stopwatch()
    place: dict[str, Any] = {"force": job.request.force, "spare": [job.source.path]}
    with (
        runtime.deterministic(job.request.deterministic),
        ArtifactWriter.begin(job.request.out, name or telling_name(job), _decisive(job), **place) as writer,
        tracked(job.request.log_to, writer.name, job.request.model_dump(mode="json")) as log,
    ):
        noted = latest(writer)
        if noted is not None:
            writer.tell(progress, f"{noted.step} of {job.plan.steps} steps")
        distributed.on_main(take_over, job, writer)
        with watch.phase("load"):
            model = _load(job)
            trainer = _trainer(job, model, writer.scratch, log)
        with watch.phase("training"):
            last = _train(job, trainer, writer, progress)
        with watch.phase("finish"):
            base = _base(model)
            packed = pack_scales(base) if job.scales else None
            round_as_stored(model)
            _check_packed(job, base)
            record = _record(job, last, _measure(trainer, progress))
            adapter = {key: whole(parameter.detach()) for key, parameter in adapter_parameters(model).items()}
        learnt = list(adapter.values())
        if not job.plan.sharded:
            learnt += [tensor for tensors in (packed or {}).values() for tensor in tensors.values()]
        distributed.check_agreement(learnt, "what they learnt")
        form = adapter_form(model)
        if record.end_loss >= record.start_loss:
            progress.warn(
                f"Held-out answers did not gain: loss {record.start_loss:.4f} before, {record.end_loss:.4f} after. "
                "Try a lower `adapter_lr`, fewer `epochs` or more samples."
            )
        manifest = distributed.on_main(write_artifact, job, writer, adapter, form, packed, record, watch)
        warned = (*job.manifest.warnings, *progress.warnings)
        path = writer.finish(manifest.model_copy(update={"warnings": warned}), proof(progress))
    return path, read_back(path, QuantizedManifest)


def telling_name(job: FinetuneJob) -> str:
    """What the artifact is called where nobody says."""
    return f"{Path(job.request.source).resolve().name}-{job.request.task}"


def _decisive(job: FinetuneJob) -> dict[str, Any]:
    """What decides the result."""
    return {
        "command": "finetune",
        "schema": SCHEMA_VERSION,
        "source": job.source.content_hash,
        "request": job.request.model_dump(mode="json", exclude=set(NOT_IN_FINGERPRINT)),
        "device": job.precision.device.type,
        "precision": job.plan.precision,
        "data": job.examples.sha256,
    }


def _load(job: FinetuneJob) -> PeftModel:
    """The packed model with the adapter that trains; scales that train in layers that let them."""
    precision = job.precision
    # A GPU gets the blocks one by one, when it need not hold all of them.
    device = torch.device("cpu") if job.plan.sharded else precision.device
    model = load_model(job.source, dtype=precision.dtype, device=device, adapter=False)
    if job.scales:
        train_scales(model, job.source)
    runtime.seed_everything(job.request.seed)  # a new adapter is drawn
    if job.trained is None:
        wrapped = fresh_adapter(model, job.adapter, job.linears, job.source.given)
    else:
        wrapped = trained_adapter(model, job.trained, dropout=job.request.dropout)
    base = _base(wrapped)
    _check_packed(job, base)
    if job.plan.sharded:
        shard_packed(base, precision.device)
    return wrapped


def _base(model: PeftModel) -> PreTrainedModel:
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise TypeError("no model of transformers")
    return base


def _check_packed(job: FinetuneJob, model: nn.Module) -> None:
    """That no packed layer became a dense one on its way through other people's libraries."""
    packed = [module for module in model.modules() if isinstance(module, QuantLinear | TrainedLinear)]
    if lost := len(job.source.packed) + len(job.source.tables) - len(packed):
        raise RuntimeError(f"{lost} packed layers are dense")
    if any(layer.cached_bytes for layer in packed if isinstance(layer, QuantLinear)):
        raise RuntimeError("a packed layer keeps a dense copy")


def examples_of(given: ExampleSet, source: ModelSource) -> Examples:
    """What a run learns from, as its trainer takes it."""
    behind, rows = padding(source.tokenizer()), (*given.train, *given.validation)
    # Behind each end one token more, which is not learnt: what comes after an answer is nobody's business.
    return Examples(
        [torch.tensor([*row.tokens, behind]) for row in rows],
        len(given.train),
        [torch.tensor([*row.mask, False]) for row in rows],
        padding=behind,
    )


def _trainer(job: FinetuneJob, model: PeftModel, folder: Path, log: Log) -> Trainer:
    """The trainer of what the run trains."""
    student = adapter_student(model, job.precision, checkpointing=job.settings.checkpointing)
    examples = examples_of(job.examples, job.source)
    seeds = partial(operator.add, job.request.seed - 1)
    trainer = Trainer(
        student, None, examples, job.settings, schedule=task_lr_factor, seeds=seeds, folder=folder, log=log
    )
    trained = sum(parameter.numel() for parameter in trainer.trained)
    if trained != job.plan.parameters:
        raise RuntimeError(f"{trained:,} parameters train, not {job.plan.parameters:,}")
    return trainer


def _train(job: FinetuneJob, trainer: Trainer, writer: ArtifactWriter, progress: Progress) -> TrainerCheckpoint:
    """Train what is left, from the last checkpoint that is noted. Raises NumericsError."""

    def on_checkpoint(checkpoint: TrainerCheckpoint, files: list[Path]) -> None:
        if checkpoint.failed == "evaluation":
            raise _not_finite()
        if checkpoint.failed:
            raise NumericsError(
                f"The {checkpoint.failed} is not finite in step {checkpoint.step} of the fine-tuning.",
                hint="Try a lower `adapter_lr`, a longer `warmup` or `precision=fp32`, with another `out`.",
            )
        note(writer, checkpoint, files)

    with progress.phase(f"Learning {job.request.task}", job.plan.steps) as bar, writing(writer.out):
        last = trainer.train(latest(writer), bar, on_checkpoint)
    if said := trainer.pieces.said():
        progress.note(said)
    return last


def _measure(trainer: Trainer, progress: Progress) -> float:
    """Loss of what is held out, by the model as it is now. Raises NumericsError."""
    with progress.phase("Looking at what is held out") as bar:
        loss = trainer.evaluate(bar)
    if not math.isfinite(loss):
        raise _not_finite()
    return loss


def _not_finite() -> NumericsError:
    return NumericsError(
        "The loss of the held-out answers is not finite.",
        hint="Look at the artifact with 'ulbq eval'; or try a lower `adapter_lr`.",
    )


def _record(job: FinetuneJob, last: TrainerCheckpoint, end: float) -> FinetuneRecord:
    """How the training went, for the manifest."""
    return FinetuneRecord(
        task=job.request.task,
        template=job.examples.template,
        data=job.examples.record(),
        train=job.request.train,
        start=job.plan.start,
        parameters=job.plan.parameters,
        epochs=job.request.epochs,
        steps=job.plan.steps,
        start_loss=last.evaluations[0][1],
        end_loss=end,
        losses=tuple(_thinned(last.losses)),
        evaluations=(*last.evaluations, (job.plan.steps, end)),
        seconds=last.seconds,
    )


def _thinned(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most so many points: means of equal runs of steps, each at its last step."""
    width = -(-len(losses) // _CURVE)
    runs = [losses[start : start + width] for start in range(0, len(losses), width or 1)]
    return [(run[-1][0], sum(loss for _, loss in run) / len(run)) for run in runs]
