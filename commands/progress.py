"""Renderers of a pipeline's progress: bars on a terminal, whole lines in a log, warnings alone when quiet.

Imported when a command runs, not before: rich alone costs a third of the time of ``--help``.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ulbq.progress import Phase, Silent

from .fields import as_typed


def say(console: Console, text: str, *, label: str = "", style: str = "") -> None:
    """Print one line for people, ``label`` in front of it in ``style``; fields that it names are shown as flags."""
    # Text objects, not markup: a path such as model[1] is no tag. Lines are not folded, so that logs can be searched.
    console.print(Text.assemble((label, style), as_typed(text, {})), soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as people write them: ``4.2 s``, ``42 s``, ``9:40``, ``1:02:03``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """How far a phase is, and when it will end.

    What a round takes is told by the later half of the rounds so far: the first ones load, compile and warm up, and an
    estimate that kept them would be wrong to the end. What is left of a round is told by the same rounds from the same
    step on. Rounds that arrive within the first second count as done before: a resumed run skips its finished steps at
    once, and they say nothing about the speed of the rest.

    Args:
        total: steps; None where nobody knows.
        rounds: into how many rounds alike they fall; None for as many as steps.
        clock: seconds.
    """

    _HEAD_START = 1.0  # seconds
    _FEW = 10  # rounds, of which the first alone tells the speed
    _LIKE_THE_FIRST = 0.5  # of what a round's first step takes, those behind it: it loads what all of them work on

    def __init__(
        self, total: int | None, rounds: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.done = 0
        self._rounds = rounds or total or 0
        self._clock = clock
        self._started = clock()
        self._head_start = 0
        self._marks = [0.0]  # when so many steps were done

    def advance(self, steps: int) -> None:
        """Count ``steps`` finished steps."""
        before, now = self._marks[-1], self.elapsed
        self.done += steps
        if now < self._HEAD_START:
            self._head_start = self.done
        if not self.done:
            self._marks = [now]  # a word before the first step tells of what is none: a validation, for one
        # Several at once took alike. None at all is a word about a step that goes on.
        self._marks += [now - (now - before) * i / steps for i in reversed(range(steps))]

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return self._clock() - self._started

    @property
    def left(self) -> float | None:
        """Seconds until the end, or None while nothing is known about the speed."""
        if self.total is None or self.done <= self._head_start:
            return None
        whole, before = (steps * self._rounds // self.total for steps in (self.done, self._head_start))
        if whole == self._rounds:
            return 0.0
        if whole > before:
            if whole == before + 1 and self._rounds > self._FEW:
                return None
            present, each = self._by_rounds(max(before, whole // 2), whole)
        elif self._rounds == self.total:
            return None
        else:
            present, each = self._by_steps(whole)
        # However long this round takes, those after it are still to come.
        return max(present - (self.elapsed - self._marks[-1]), 0.0) + each * (self._rounds - whole - 1)

    def _by_rounds(self, since: int, whole: int) -> tuple[float, float]:
        """What is left of the present round, and what one takes, by those between two numbers of whole rounds."""
        first, last = (self._marks[self._steps(number)] for number in (since, whole))
        each = (last - first) / (whole - since)
        inside = self.done - self._steps(whole)
        if not inside:
            return each, each
        alike = range(since, whole)
        rest = (self._marks[self._steps(number + 1)] - self._marks[self._steps(number) + inside] for number in alike)
        return mean(rest), each

    def _by_steps(self, whole: int) -> tuple[float, float]:
        """The same by the steps of the first round alone."""
        passed, own = self._marks[-1] - self._marks[self._head_start], self.done - self._head_start
        after_first = passed - (self._marks[self._head_start + 1] - self._marks[self._head_start])
        step = after_first / (own - 1) if own > 1 else passed * self._LIKE_THE_FIRST
        present = (self._steps(whole + 1) - self.done) * step
        return present, passed + present

    def _steps(self, rounds: int) -> int:
        """Steps that are done when so many rounds are."""
        return -(-rounds * (self.total or 0) // self._rounds)

    def __str__(self) -> str:
        return str(self.done) if self.total is None else f"{self.done}/{self.total}"


class QuietProgress:
    """Says nothing but warnings."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> AbstractContextManager[Phase]:
        return Silent().phase(name, total)

    def note(self, text: str) -> None:
        return None

    def warn(self, text: str) -> None:
        say(self._console, text, label="warning: ", style="yellow")


class PlainProgress:
    """Progress for logs and pipes: whole lines, at most one every ``interval`` seconds, and one as a phase ends."""

    def __init__(
        self, console: Console, *, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock
        self._depth = 0
        self._last_line = clock()

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Iterator[Phase]:
        pace = Pace(total, rounds, self._clock)

        def show(detail: str) -> None:
            if self._clock() - self._last_line >= self._interval:
                self._last_line = self._clock()
                say(self._console, _line(name, pace, detail))

        self._depth += 1
        try:
            yield _CountedPhase(pace, show)
        finally:
            self._depth -= 1
        if self._depth == 0:
            self._last_line = self._clock()
            say(self._console, _ending(name, pace))

    def note(self, text: str) -> None:
        say(self._console, text)

    def warn(self, text: str) -> None:
        say(self._console, text, label="warning: ", style="yellow")


class LiveProgress:
    """Progress for a terminal: a bar per open phase, replaced by one line when the outermost phase ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._depth = 0
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
            # standard output may be the same terminal, or a pipe that must get the artifact's path and nothing else
            redirect_stdout=False,
        )

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Iterator[Phase]:
        pace = Pace(total, rounds)
        task = self._bars.add_task(name, total=total, detail="", pace=pace)
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        try:
            yield _CountedPhase(pace, lambda detail: self._show(task, pace, detail))
        finally:
            self._depth -= 1
            self._bars.remove_task(task)
            if self._depth == 0:
                self._bars.stop()
        if self._depth == 0:
            say(self._console, _ending(name, pace), label="✓ ", style="green")

    def _show(self, task: TaskID, pace: Pace, detail: str) -> None:
        if detail:
            self._bars.update(task, completed=pace.done, detail=detail)
        else:
            self._bars.update(task, completed=pace.done)

    def note(self, text: str) -> None:
        say(self._console, text)

    def warn(self, text: str) -> None:
        say(self._console, text, label="warning: ", style="yellow")


class _CountedPhase:
    def __init__(self, pace: Pace, show: Callable[[str], None]) -> None:
        self._pace = pace
        self._show = show

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self._pace.advance(steps)
        self._show(detail)


class _TimeLeft(ProgressColumn):
    """Time left where it is known, else the time passed."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        left = pace.left
        return Text(duration(pace.elapsed) if left is None else f"{duration(left)} left", style="cyan")


def _line(name: str, pace: Pace, detail: str) -> str:
    parts = [f"{name}: {pace}", f"{duration(pace.elapsed)} passed"]
    if pace.left is not None:
        parts.append(f"{duration(pace.left)} left")
    if detail:
        parts.append(detail)
    return ", ".join(parts)


def _ending(name: str, pace: Pace) -> str:
    steps = f" {pace}" if pace.done else ""
    return f"{name}:{steps} done in {duration(pace.elapsed)}"
