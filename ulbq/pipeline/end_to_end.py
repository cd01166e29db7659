"""The end-to-end phase of a quantization run: the packed model goes on learning as a whole.

The blocks' shards stay as they are until every block of the tuned model is written and noted; only then the new ones
take their places. A run that was killed at any point goes on from its last finished epoch, to the same bytes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from ulbq.artifacts.records import EndToEndRecord
from ulbq.artifacts.store import ArtifactWriter
from ulbq.config.end_to_end import EndToEndSettings
from ulbq.data.calibration import Calibration
from ulbq.formats import AnyScheme
from ulbq.models.load import load_model
from ulbq.pipeline.finish import TUNED, layer_record, recorded_schemes
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.student import Folders, build_student, write_tuned
from ulbq.progress import Progress
from ulbq.training.end_to_end import EndToEndTrainer, Epoch
from ulbq.training.samples import Samples
from ulbq.training.student import Student
from ulbq.training.teacher import CachedTeacher, StreamedTeacher, Teacher

_EPOCH, _EXCHANGED = "end to end ", "tuned shards in place"


@dataclass(frozen=True)
class _Phase:
    """What the parts of the phase share."""

    job: Job
    writer: ArtifactWriter
    progress: Progress
    settings: EndToEndSettings
    samples: Samples

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
    def epochs(self) -> list[Epoch]:
        """What the journal holds."""
        journal = self.writer.journal
        found = [Epoch.model_validate(value) for key, value in journal.items() if key.startswith(_EPOCH)]
        return sorted(found, key=lambda epoch: epoch.number)

    @property
    def over(self) -> bool:
        """Whether no epoch is left."""
        epochs = self.epochs
        return bool(epochs) and (not epochs[-1].finite or epochs[-1].number >= self.settings.epochs)

    @property
    def tuned(self) -> bool:
        """Whether every block is written and noted."""
        return all(f"{TUNED}{index}" in self.writer.journal for index in range(self.job.found.n_blocks))


def train_end_to_end(job: Job, writer: ArtifactWriter, text: Calibration, progress: Progress) -> EndToEndRecord:
    """Train the packed model as a whole, and exchange its shards where that made it better.

    Args:
        job: the run, with settings of the phase.
        writer: with all blocks written and noted.
        text: the samples, those held out last.
        progress: told how it goes.

    Raises:
        NumericsError: what was trained cannot be packed.
        ResourceError: the disk is full.
    """
    settings = job.method.needs.end_to_end
    if settings is None:
        raise ValueError("there is no end-to-end phase")
    samples = Samples(text.tokens, job.text_samples, text.taught)
    phase = _Phase(job, writer, progress, settings, samples)
    phase.after.blocks.mkdir(exist_ok=True)
    if not phase.tuned and not (phase.over and not phase.epochs[-1].best):
        _train(phase)
    if phase.tuned:
        _exchange(phase)
    record = _record(phase)
    return record if job.request.text is None else record.model_copy(update={"data": text.record()})


def _train(phase: _Phase) -> None:
    """Train what is left, and write the tuned blocks where any epoch was better than the start."""
    job, settings, writer = phase.job, phase.settings, phase.writer
    teacher = None if phase.over or not settings.taught else _teacher(phase)
    student = build_student(job, phase.before, train=settings.train, checkpointing=settings.checkpointing)
    folder = writer.scratch / "end-to-end"
    folder.mkdir(exist_ok=True)
    trainer = EndToEndTrainer(student, teacher, phase.samples, settings, folder=folder, seed=job.request.seed)

    done = phase.epochs
    with phase.progress.phase("Training end to end", settings.epochs * trainer.steps_per_epoch) as bar:
        if done and done[-1].steps:
            bar.advance(done[-1].steps, f"epoch {done[-1].number} was done")

        def on_epoch(epoch: Epoch, files: list[Path]) -> None:
            # The trainer keeps the best epoch's state and the last one's.
            passed = [f"{_EPOCH}{number}" for number in range(epoch.number) if number != epoch.best]
            writer.record(f"{_EPOCH}{epoch.number}", epoch, files=files, forgets=passed)
            bar.advance(0, f"epoch {epoch.number}, held-out loss {epoch.error:.4f}")

        last = trainer.train(done, on_epoch, lambda loss: bar.advance(1, f"loss {loss:.4f}"))
    if last.best:
        _write(phase, student)


def _teacher(phase: _Phase) -> Teacher:
    """The full-precision model in the dtype of the run's products, or what a pass through it left."""
    job, settings, samples = phase.job, phase.settings, phase.samples
    model = load_model(job.source, dtype=job.precision.dtype, device=job.precision.device)
    streamed = StreamedTeacher(model, samples, job.precision, hidden=settings.loss == "kl-hidden")
    if settings.teacher == "streamed":
        return streamed
    with phase.progress.phase("Asking the teacher", len(samples.tokens)) as bar:
        return CachedTeacher(
            streamed,
            samples,
            top_k=settings.top_k,
            device=job.precision.device,
            limit=job.request.activation_memory,
            directory=phase.writer.scratch,
            on_sample=lambda: bar.advance(1),
        )


def _write(phase: _Phase, student: Student) -> None:
    """Pack the blocks one by one, and note each with the records of its layers."""
    job = phase.job
    last = torch.tensor([len(phase.samples.tokens) - 1])
    sizes, schemes = student.input_sizes(phase.samples.batch(last).tokens), phase.schemes
    for index in range(job.found.n_blocks):
        if f"{TUNED}{index}" in phase.writer.journal:
            continue
        prefix, linears = job.names(index)
        packed = write_tuned(job, student, index, phase.before, phase.after, sizes)
        names = {linear: prefix + linear for linear in linears}
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


def _record(phase: _Phase) -> EndToEndRecord:
    """What came of it, for the manifest; says aloud what a person must know."""
    first, last = phase.epochs[0], phase.epochs[-1]
    if not last.finite:
        phase.progress.warn(f"The end-to-end training diverged in epoch {last.number}: try a lower --end-to-end-rate.")
    if not last.best:
        phase.progress.warn("The end-to-end training did not improve the model: the blocks' result stays.")
    return EndToEndRecord(
        loss=phase.settings.loss,
        start_error=first.error,
        end_error=last.best_error,
        epochs=last.best,
        steps=last.steps,
        finite=last.finite,
        seconds=round(sum(epoch.seconds for epoch in phase.epochs), 3),
    )
