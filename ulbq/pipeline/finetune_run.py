"""``finetune`` on a task: an artifact in, one that has learnt the task out; its weights stay packed throughout."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ulbq import __version__, distributed, runtime
from ulbq.artifacts.disk import writing
from ulbq.artifacts.manifest import SCHEMA_VERSION, QuantizedManifest, read_back
from ulbq.artifacts.records import FinetuneRecord
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter, fingerprint, free_output
from ulbq.config.finetune import NOT_IN_FINGERPRINT
from ulbq.data.instructions import filler
from ulbq.errors import NumericsError
from ulbq.models.adapter_training import (
    adapter_form,
    adapter_parameters,
    fresh_adapter,
    round_as_stored,
    trained_adapter,
)
from ulbq.models.load import load_model
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.finetune_plan import FinetuneJob
from ulbq.pipeline.finetuned import take_over, write_artifact
from ulbq.pipeline.proof import proof
from ulbq.pipeline.scales import pack_scales, restore_packed, train_scales
from ulbq.pipeline.warned import Recording
from ulbq.progress import Phase, Progress, Silent
from ulbq.training.scaled import ScaledLinear
from ulbq.training.tuner import Tuner, Watch, answer_loss

_START, _LOOK, _STEPS, _CHECKPOINT = "held out at the start", "held out at step ", "losses", "checkpoint"
_FOLDER = "checkpoint-"
_CURVE = 1000  # points of a loss curve


def finetune(
    job: FinetuneJob, progress: Progress | None = None, *, name: str | None = None
) -> tuple[Path, QuantizedManifest]:
    """Train an artifact's adapter, and its scales where that was asked for, on a task.

    A run that was stopped goes on from its last checkpoint, to the same bytes on the CPU.

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
    identity = _fingerprint(job)
    out = job.request.out or free_output(DEFAULT_ROOT, name or telling_name(job), identity)
    with ArtifactWriter(out, identity, force=job.request.force, spare=[job.source.path]) as writer:
        if writer.resumed and _CHECKPOINT in writer.journal:
            step = writer.journal[_CHECKPOINT]["step"]
            progress.note(f"Resuming {out}: {step} of {job.plan.steps} steps are done.")
        distributed.on_main(take_over, job, writer)
        with watch.phase("load"):
            model = _load(job)
        run = _Run(job, writer, model, progress)
        with watch.phase("training"):
            run.train()
        with watch.phase("finish"):
            packed = pack_scales(run.base) if job.scales else None
            if packed is not None:
                restore_packed(run.base, packed)
            round_as_stored(model)
            _check_packed(job, run.base)
            end = run.look(job.plan.steps, "Looking at what is held out")
            record = run.record(end)
            adapter = {key: parameter.detach() for key, parameter in adapter_parameters(model).items()}
        learnt = [*adapter.values(), *(tensor for tensors in (packed or {}).values() for tensor in tensors.values())]
        distributed.check_agreement(learnt, "what they learnt")
        form = adapter_form(model)
        if end >= record.start_loss:
            progress.warn(
                f"Held-out answers did not gain: loss {record.start_loss:.4f} before, {end:.4f} after. "
                "Try a lower --adapter-rate, fewer --epochs or more samples."
            )
        manifest = distributed.on_main(write_artifact, job, writer, adapter, form, packed, record, watch)
        warned = (*job.manifest.warnings, *progress.warnings)
        path = writer.finish(manifest.model_copy(update={"warnings": warned}), proof(progress))
    return path, read_back(path, QuantizedManifest)


def telling_name(job: FinetuneJob) -> str:
    """What the artifact is called where nobody says."""
    return f"{Path(job.request.source).resolve().name}-{job.request.task}"


def _fingerprint(job: FinetuneJob) -> str:
    return fingerprint(
        {
            "command": "finetune",
            "ulbq": __version__,
            "schema": SCHEMA_VERSION,
            "source": job.source.content_hash,
            "request": job.request.model_dump(mode="json", exclude=set(NOT_IN_FINGERPRINT)),
            "device": job.precision.device.type,
            "precision": job.plan.precision,
            "data": job.lessons.sha256,
        }
    )


def _load(job: FinetuneJob) -> PeftModel:
    """The packed model with the adapter that trains, and what trains marked so."""
    precision = job.precision
    model = load_model(job.source, dtype=precision.dtype, device=precision.device, adapter=False)
    if job.scales:
        train_scales(model, job.source)
    runtime.seed_everything(job.request.seed)  # a new adapter is drawn
    if job.trained is None:
        wrapped = fresh_adapter(model, job.adapter, job.linears, job.source.given)
    else:
        wrapped = trained_adapter(model, job.trained, dropout=job.request.dropout)
    for layer in wrapped.modules():
        if isinstance(layer, ScaledLinear):
            for parameter in layer.quantizer.trainable()["scales"]:
                parameter.requires_grad_(True)
    _check_packed(job, wrapped.get_base_model())
    return wrapped


def _check_packed(job: FinetuneJob, model: nn.Module) -> None:
    """That no packed layer became a dense one on its way through other people's libraries."""
    packed = [module for module in model.modules() if isinstance(module, QuantLinear | ScaledLinear)]
    if len(packed) != len(job.source.packed):
        raise RuntimeError(f"{len(job.source.packed) - len(packed)} packed layers are dense")
    if any(layer.cached_bytes for layer in packed if isinstance(layer, QuantLinear)):
        raise RuntimeError("a packed layer keeps a dense copy")


class _Run:
    """The training, its journal and its curves."""

    def __init__(self, job: FinetuneJob, writer: ArtifactWriter, model: PeftModel, progress: Progress) -> None:
        self._job = job
        self._writer = writer
        self._model = model
        self._progress = progress
        self._losses: dict[int, float] = {}
        self._started = time.monotonic()
        self._bar: Phase | None = None

    @property
    def base(self) -> nn.Module:
        """The model without peft's wrapper."""
        return self._model.get_base_model()

    def train(self) -> None:
        """Train what is left, from the last checkpoint that is noted."""
        job, writer = self._job, self._writer
        if _START not in writer.journal:
            writer.record(_START, self._measure("Looking at what is held out, first"))
        noted = writer.journal.get(_CHECKPOINT)
        folder = writer.scratch / "checkpoints"
        tuner = Tuner(
            self._model,
            job.lessons.train,
            job.settings,
            job.precision,
            scales=frozenset(name for name, p in self._model.named_parameters() if _is_scale(name) and p.requires_grad),
            filler=filler(job.source.tokenizer()),
            folder=folder,
            seed=job.request.seed,
            watch=Watch(self._on_step, self._on_look, self._on_save),
        )
        trained = sum(parameter.numel() for parameter in tuner.trained.values())
        if trained != job.plan.parameters:
            raise RuntimeError(f"{trained:,} parameters train, not {job.plan.parameters:,}")
        with self._progress.phase(f"Learning {job.request.task}", job.plan.steps) as bar:
            self._bar = bar
            if noted is not None:
                self._losses = {int(step): loss for step, loss in noted["losses"]}
                self._started -= noted["seconds"]
                bar.advance(noted["step"], f"{noted['step']} steps were done")
            with writing(writer.out), distributed.together():
                tuner.train(resume_from_checkpoint=None if noted is None else str(folder / _checkpoint(noted)))
        self._seconds = time.monotonic() - self._started

    def look(self, step: int, words: str) -> float:
        """Loss of what is held out, noted."""
        loss = self._measure(words)
        self._writer.record(f"{_LOOK}{step}", loss)
        return loss

    def record(self, end: float) -> FinetuneRecord:
        """How the training went, for the manifest."""
        job, journal = self._job, self._writer.journal
        looks = {int(key.removeprefix(_LOOK)): float(loss) for key, loss in journal.items() if key.startswith(_LOOK)}
        start = float(journal[_START])
        return FinetuneRecord(
            task=job.request.task,
            template=job.lessons.template,
            data=job.lessons.record(),
            train=job.request.train,
            start=job.plan.start,
            parameters=job.plan.parameters,
            epochs=job.request.epochs,
            steps=job.plan.steps,
            start_loss=start,
            end_loss=end,
            losses=tuple(_thinned(sorted(self._losses.items()))),
            evaluations=((0, start), *sorted({**looks, job.plan.steps: end}.items())),
            seconds=round(self._seconds, 3),
        )

    def _measure(self, words: str) -> float:
        lessons = distributed.own(self._job.lessons.heldout)
        with self._progress.phase(words, len(lessons)) as bar:
            loss = answer_loss(self._model, _counted(lessons, bar), self._job.precision)
        if loss != loss or loss == float("inf"):
            raise NumericsError(
                "The loss of the held-out answers is not finite.",
                hint="Look at the artifact with 'ulbq eval'; or try a lower --adapter-rate.",
            )
        return loss

    def _on_step(self, step: int, loss: float) -> None:
        self._losses[step] = loss
        if self._bar is not None:
            self._bar.advance(1, f"loss {loss:.4f}")

    def _on_look(self, step: int) -> None:
        loss = self.look(step, f"Held out, step {step}")
        if self._bar is not None:
            self._bar.advance(0, f"held-out loss {loss:.4f}")

    def _on_save(self, folder: Path) -> None:
        step = int(folder.name.removeprefix(_FOLDER))
        losses = [(at, loss) for at, loss in sorted(self._losses.items()) if at <= step]
        noted: dict[str, Any] = {"step": step, "losses": losses}
        noted["seconds"] = round(time.monotonic() - self._started, 3)
        distributed.barrier()  # each process leaves the state of its own generators there
        files = distributed.on_main(lambda: [path for path in folder.iterdir() if path.is_file()])
        self._writer.record(_CHECKPOINT, noted, files=files)


def _checkpoint(noted: Mapping[str, Any]) -> str:
    """Name of the folder that a checkpoint lies in."""
    return f"{_FOLDER}{int(noted['step'])}"


def _is_scale(name: str) -> bool:
    return ".quantizer." in name


def _counted(lessons: Sequence[Any], bar: Phase) -> Any:
    for lesson in lessons:
        yield lesson
        bar.advance(1)


def _thinned(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most so many points: means of equal runs of steps, each at its last step."""
    width = -(-len(losses) // _CURVE)
    runs = [losses[start : start + width] for start in range(0, len(losses), width or 1)]
    return [(run[-1][0], sum(loss for _, loss in run) / len(run)) for run in runs]
