"""How long-running library code tells its caller where it stands, without knowing about terminals."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Phase(Protocol):
    """One bounded piece of work inside a run."""

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Count ``steps`` finished steps; ``detail`` replaces the short text shown beside the bar."""
        ...


class Progress(Protocol):
    """What a pipeline function reports to."""

    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> AbstractContextManager[Phase]:
        """Open a phase of ``total`` steps (None: unknown).

        Where steps differ but come in so many ``rounds`` that are alike, as a block's epochs and its packing do, the
        time left is told by whole rounds.
        """
        ...

    def note(self, text: str) -> None:
        """Say a fact that a person wants to know (a default that was chosen, a resumed run)."""
        ...

    def warn(self, text: str) -> None:
        """Say a fact that a person must know (a fallback, a block that did not train)."""
        ...


class _SilentPhase:
    def advance(self, steps: int = 1, detail: str = "") -> None:
        return None


class Silent:
    """Reports nothing; the default of every library function."""

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Iterator[Phase]:
        yield _SilentPhase()

    def note(self, text: str) -> None:
        return None

    def warn(self, text: str) -> None:
        return None
