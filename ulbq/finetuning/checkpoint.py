"""How a training stands, and where its run notes that."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ulbq.artifacts.store import ArtifactWriter

_KEY = "checkpoint "


class TrainerCheckpoint(BaseModel):
    """How a training stands; its state lies in a file.

    Attributes:
        step: optimizer steps so far; of a failed training the one that could not be made.
        losses: training loss by step.
        evaluations: loss of the validation examples by step, that of the start, step 0, first.
        failed: ``loss``, ``gradient`` or ``evaluation`` where that is not finite, which ends the training.
        kept: steps whose states lie on the disk once this one is noted.
        seconds: wall time so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    evaluations: tuple[tuple[int, float], ...] = ()
    failed: str = ""
    kept: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def best(self) -> tuple[int, float]:
        """Step of the lowest validation loss, and that loss; the first of equals."""
        return min(self.evaluations, key=lambda evaluation: evaluation[1])

    def is_over(self, steps: int) -> bool:
        """Whether nothing is left to do of a training of so many steps."""
        return bool(self.failed) or self.step >= steps


def latest(writer: ArtifactWriter) -> TrainerCheckpoint | None:
    """The checkpoint that a run noted last; None for none."""
    steps = _steps(writer)
    return TrainerCheckpoint.model_validate(writer.journal[f"{_KEY}{max(steps)}"]) if steps else None


def note(writer: ArtifactWriter, checkpoint: TrainerCheckpoint, files: Iterable[Path]) -> None:
    """Note a checkpoint with the file of its state."""
    passed = [f"{_KEY}{step}" for step in _steps(writer) if step not in checkpoint.kept]
    writer.record(f"{_KEY}{checkpoint.step}", checkpoint, files=files, forgets=passed)


def _steps(writer: ArtifactWriter) -> list[int]:
    return [int(key.removeprefix(_KEY)) for key in writer.journal if key.startswith(_KEY)]
