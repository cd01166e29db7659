"""Steps that a device has no room for, taken in pieces."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ulbq import distributed

T = TypeVar("T")


class Pieces:
    """How many samples of a step run at once: half as many whenever the device has no room for them.

    Gradients add up over the pieces, so a step is the same but for the order of its sums. One object goes with a whole
    run: what did not fit once is not tried again.

    Attributes:
        most: samples at once; None as long as everything fitted.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def fewest(self) -> int:
        """Samples at once in the process that has the least room, 0 where all fitted; all processes take part."""
        return min((most for most in distributed.gather(self.most) if most is not None), default=0)

    def said(self) -> str:
        """What a person has to know; empty where everything fitted. All processes take part."""
        fewest = self.fewest()
        return f"The device had no room for a step's samples: {fewest} ran at a time." if fewest else ""

    def split(self, samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Samples that should run at once, in pieces for which there is room."""
        found: tuple[torch.Tensor, ...] = samples.split(self.most or len(samples))
        return found

    def run(self, at_once: int, step: Callable[[], T], undo: Callable[[], object]) -> T:
        """Take a step, which splits its samples; where memory is missing undo it, and take it in smaller pieces.

        Args:
            at_once: the most samples that should run together.
            step: takes it.
            undo: forgets what a step has left behind that did not come to its end. What torch's own generators drew is
                drawn again, so that dropout is that of a run which took these pieces from the first.

        Raises:
            torch.OutOfMemoryError: there is no room for a single sample.
        """
        drawn = _drawn()
        while True:
            try:
                return step()
            except torch.OutOfMemoryError:
                largest = min(self.most or at_once, at_once)
                if largest <= 1:
                    raise
                self.most = -(-largest // 2)
            # Not while the error is handled: its traceback holds on to what the step has allocated.
            undo()
            _draw_again(drawn)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _drawn() -> list[torch.Tensor]:
    """How far torch's own generators are: the CPU's, and those of all GPUs: the current one may not be at work."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _draw_again(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:])
