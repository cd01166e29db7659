"""Where a process begins: the one place that can say in a sentence that not even the command line could be loaded."""

import errno
import sys
from collections.abc import Sequence

_ENVIRONMENT = 4
_LACKING = ("failed to map segment", "Cannot allocate memory", "Too many open files")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the console script.

    Args:
        arguments: the words after ``ulbq``; None takes this process's own.

    Returns:
        The exit code.
    """
    try:
        from .app import main as run
    except (ImportError, MemoryError, OSError, SystemError) as error:
        if (what := lacking(error)) is None:
            raise
        if sys.stderr is not None:
            sys.stderr.write(f"error: {what}\nhint: {HINT}\n")
        return _ENVIRONMENT
    return run(arguments)


HINT = "See 'ulimit -a': raise what this shell grants its processes."


def lacking(error: BaseException) -> str | None:
    """The sentence for an error that says that the process is granted too little; None for any other."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in (errno.EMFILE, errno.ENFILE) or _LACKING[2] in text:
        return "This process may not open as many files as it needs."
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in text for words in _LACKING[:2]):
        return "This process is granted too little memory."
    if "can't start new thread" in text or number == errno.EAGAIN:
        return "This process may not start as many threads as it needs."
    return None
