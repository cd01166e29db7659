"""Losses of a training, sent to a tracker of experiments as they come, through accelerate's trackers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from ulbq import distributed
from ulbq.errors import ResourceError

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step, which never goes back within a run, and values by name."""

FOLDER = "runs"
"""Where TensorBoard's files go, and is told to look."""

_PROJECT = "ulbq"


def nowhere(step: int, values: Mapping[str, float]) -> None:
    """Tracks nothing."""


def shifted(log: Log, by: int) -> Log:
    """The same with steps that are counted on from another training's."""
    return lambda step, values: log(by + step, values)


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is missing. Raises ResourceError."""
    if name is not None and find_spec(name) is None:
        raise ResourceError(
            f"`log_to={name}` wants the package {name}, which is not installed.", hint=f"pip install {name}"
        )


@contextmanager
def tracked(tracker: str | None, run: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Track a run while the body lasts, by the first of several processes.

    Args:
        tracker: ``tensorboard``, ``wandb``, ``trackio`` or ``mlflow``, whose package is there; None for none.
        run: what it is called.
        settings: of the run, for JSON.
    """
    if tracker is None or not distributed.is_main():
        yield nowhere
        return
    made = _tracker(tracker, run)
    made.start()
    try:
        plain = {name: value if isinstance(value, _PLAIN) else str(value) for name, value in settings.items()}
        made.store_init_configuration({name: value for name, value in plain.items() if value is not None})
        yield lambda step, values: made.log(dict(values), step=step)
    finally:
        made.finish()


_PLAIN = (bool, int, float, str, type(None))


def _tracker(name: str, run: str) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # whose logger the trackers write to
    match name:
        case "tensorboard":
            return tracking.TensorBoardTracker(run, FOLDER)
        case "wandb":
            return tracking.WandBTracker(_PROJECT, name=run)
        case "trackio":
            return tracking.TrackioTracker(_PROJECT, name=run)
    return tracking.MLflowTracker(_PROJECT, run_name=run)
