"""Standard streams that hold whatever they are connected to, and text that a terminal shows and does not obey."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

from ulbq.errors import ResourceError
from ulbq.printable import encodable, printable


def write(text: str, end: str = "\n") -> None:
    """Write to standard output: as it is where a program reads it, printable where a terminal shows it."""
    shown = printable(text) if sys.stdout.isatty() else encodable(text)
    try:
        sys.stdout.write(shown + end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _to_nowhere(1)
        raise ResourceError(f"Standard output cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def steadied() -> Iterator[None]:
    """While it lasts, every standard stream is open, and what happens to standard error ends no command.

    A closed standard error would leave its number to the next file that is opened, into which libraries then write.
    """
    _open_missing()
    with contextlib.suppress(AttributeError, ValueError):  # a stand-in, as in tests
        # A path need not be UTF-8, and goes to the next command as the bytes that it is.
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    given = sys.stderr
    sys.stderr = _Steady(given)
    try:
        yield
    finally:
        sys.stderr = given


def _open_missing() -> None:
    """Connect standard streams that are closed to nowhere."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - open as long as the process


class _Steady:
    """Standard error that takes everything: where its disk is full or its reader is gone, the rest goes nowhere."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _to_nowhere(2)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _to_nowhere(2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_nowhere(number: int) -> None:
    """Let what is buffered, and all that follows, be written to nowhere: Python itself flushes once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
