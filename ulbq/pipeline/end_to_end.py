"""The end-to-end phase of a quantization run: the packed model goes on learning as a whole.

The blocks' shards stay as they are until every block of the tuned model is written and noted; only then the new ones
take their places. A run that was killed at any point goes on from its last checkpoint, on the CPU to the same bytes.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from ulbq.artifacts.records import EndToEndRecord
from ulbq.artifacts.store import ArtifactWriter
from ulbq.blockwise.streamed import StreamedModel, whole_model
from ulbq.config.finetuning import FinetuneSettings
from ulbq.data.calibration import Calibration
from ulbq.finetuning.checkpoint import TrainerCheckpoint, latest, note
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.student import Student
from ulbq.finetuning.teacher import Asked, CachedTeacher, PassedTeacher, StreamedTeacher, Teacher
from ulbq.finetuning.trainer import Trainer
from ulbq.formats import AnyScheme
from ulbq.pipeline.finish import TUNED, layer_record, recorded_schemes
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.samples import parent_model, sharded_model
from ulbq.pipeline.student import Folders, build_student, write_tuned
from ulbq.progress import Progress
from ulbq.tracking import Log, nowhere
from ulbq.training.optimizer import lr_factor
from ulbq.training.sharding import gathered

_EXCHANGED = "tuned shards in place"


@dataclass(frozen=True)
class _Phase:
    """What the parts of the phase share."""

    job: Job
    writer: ArtifactWriter
    progress: Progress
    settings: FinetuneSettings
    examples: Examples

    @property
    def before(self) -> Folders:
        """The block phase's shards."""
        return Folders(self.writer.path, self.writer.scratch, self.schemes)

    @property
    def schemes(self) -> dict[str, AnyScheme]:
        """How each layer is stored, by full name."""
        journal, blocks = self.writer.journal, range(self.job.found.n_blocks)
        return {name: scheme for index in blocks for name, scheme in recorded_schemes(journal[str(index)], "").items()}

    @property
    def after(self) -> Folders:
        """The tuned ones, until they take the others' places."""
        folder = self.writer.scratch / "tuned"
        return Folders(folder, folder)

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        last = latest(self.writer)
        return last is not None and last.is_over(self.settings.steps(self.examples.training))

    @property
    def tuned(self) -> bool:
        """Whether every block is written and noted."""
        return all(f"{TUNED}{index}" in self.writer.journal for index in range(self.job.found.n_blocks))


def train_end_to_end(
    job: Job, writer: ArtifactWriter, text: Calibration, progress: Progress, log: Log = nowhere
) -> EndToEndRecord:
    """Train the packed model as a whole, and exchange its shards where that made it better.

    Args:
        job: the run, with settings of the phase.
        writer: with all blocks written and noted.
        text: the samples, those held out last.
        progress: told how it goes.
        log: told the losses.

    Raises:
        NumericsError: what was trained cannot be packed.
        ResourceError: the disk is full.
    """
    settings = job.method.needs.end_to_end
    if settings is None:
        raise ValueError("there is no end-to-end phase")
    phase = _Phase(job, writer, progress, settings, Examples(text.tokens, job.request.text_samples, text.mask))
    phase.after.blocks.mkdir(exist_ok=True)
    last = latest(writer)
    if last is None or not phase.over or (last.best[0] and not phase.tuned):
        last = _train(phase, log)
    if phase.tuned:
        _exchange(phase)
    record = _record(phase, last)
    return record if job.request.text is None else record.model_copy(update={"data": text.record()})


def _train(phase: _Phase, log: Log) -> TrainerCheckpoint:
    """Train what is left, and write the tuned blocks where any epoch was better than the start."""
    job, settings, writer = phase.job, phase.settings, phase.writer
    teacher = None if phase.over or not settings.needs_teacher else _teacher(phase)
    student = build_student(job, phase.before, train=settings.train, checkpointing=settings.checkpointing)
    folder = writer.scratch / "end-to-end"
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        student,
        teacher,
        phase.examples,
        settings,
        schedule=lr_factor,
        seeds=lambda epoch: job.request.seed + 104729 * epoch,
        folder=folder,
        log=log,
    )
    with phase.progress.phase("Training end to end", trainer.steps) as bar:
        last = trainer.train(latest(writer), bar, partial(note, writer))
    if said := trainer.pieces.said():
        phase.progress.note(said)
    if last.best[0]:
        _write(phase, student)
    return last


def _teacher(phase: _Phase) -> Teacher:
    """The full-precision model in the dtype of the run's products, or what a pass through it left."""
    job, settings, examples = phase.job, phase.settings, phase.examples
    if job.plan.sharded and settings.teacher == "streamed" and not job.streamed:
        parts = sharded_model(job.source, job.precision)
        return StreamedTeacher(parts, examples, job.precision, hidden=settings.loss == "kl-hidden")
    model = parent_model(job.request, job.source, job.precision, phase.writer, phase.progress, streamed=job.streamed)
    if settings.teacher == "streamed":
        hidden = settings.loss == "kl-hidden"
        return StreamedTeacher(whole_model(model), examples, job.precision, hidden=hidden)
    asked: Asked
    if isinstance(model, StreamedModel):
        asked = PassedTeacher(model, examples)
    else:
        asked = StreamedTeacher(model, examples, job.precision)
    with phase.progress.phase("Asking the teacher", len(examples)) as bar:
        return CachedTeacher(
            asked,
            examples,
            top_k=settings.teacher_top_k,
            device=job.precision.device,
            limit=job.request.activation_memory,
            directory=phase.writer.scratch,
            on_sample=lambda: bar.advance(1),
        )


def _write(phase: _Phase, student: Student) -> None:
    """Pack the blocks one by one, and note each with the records of its layers."""
    job = phase.job
    last = torch.tensor([len(phase.examples) - 1])
    sizes, schemes = student.input_sizes(phase.examples.batch(last).tokens), phase.schemes
    for index in range(job.found.n_blocks):
        if f"{TUNED}{index}" in phase.writer.journal:
            continue
        prefix, linears = job.names(index)
        names = {linear: prefix + linear for linear in linears}
        with gathered(student.blocks[index]):
            packed = write_tuned(job, student, index, phase.before, phase.after, sizes)
            layers = [
                layer_record(job, name, _original(job, name), packed[linear], schemes[name])
                for linear, name in names.items()
            ]
        files = [phase.after.block(index)]
        if job.method.needs.adapter is not None:
            files.append(phase.after.adapter(index))
        phase.writer.record(f"{TUNED}{index}", {"layers": layers}, files=files)


def _original(job: Job, linear: str) -> torch.Tensor:
    return job.source.read(f"{linear}.weight").to(job.precision.device, torch.float32)


def _exchange(phase: _Phase) -> None:
    """Move the tuned shards over the block phase's; those that a killed run moved already are there."""
    before, after, blocks = phase.before, phase.after, range(phase.job.found.n_blocks)
    moves = {after.block(index): before.block(index) for index in blocks}
    if phase.job.method.needs.adapter is not None:
        moves |= {after.adapter(index): before.adapter(index) for index in blocks}
    phase.writer.move(_EXCHANGED, moves)


def _record(phase: _Phase, last: TrainerCheckpoint) -> EndToEndRecord:
    """What came of it, for the manifest; says aloud what a person must know."""
    steps_an_epoch = phase.settings.steps(phase.examples.training) // phase.settings.epochs
    best, error = last.best
    if last.failed:
        epoch = math.ceil(last.step / steps_an_epoch)
        phase.progress.warn(f"The end-to-end training diverged in epoch {epoch}: try a lower `end_to_end_lr_factor`.")
    if not best:
        phase.progress.warn("The end-to-end training did not improve the model: the blocks' result stays.")
    return EndToEndRecord(
        loss=phase.settings.loss,
        start_error=last.evaluations[0][1],
        end_error=error,
        epochs=best // steps_an_epoch,
        steps=len(last.losses),
        finite=not last.failed,
        seconds=last.seconds,
    )
