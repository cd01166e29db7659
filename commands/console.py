"""What reaches the terminal: results on standard output, everything for people on standard error.

A command opens one :func:`session`, hands its ``progress`` to the pipeline and its result to ``emit``:

    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    emit(*quantize(request, progress))
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ulbq import distributed
from ulbq.printable import printable
from ulbq.progress import Progress

from .streams import write

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

_LAY_OUT_WARNING = warnings.formatwarning
_WIDE = 200  # columns of what goes to a file or a pager
_NOISY = ("transformers", "datasets", "huggingface_hub", "lm_eval", "accelerate")
_HUSH = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Emit(Protocol):
    """Writes a finished artifact to standard output: its path, or its manifest with ``--json``."""

    def __call__(self, path: Path, manifest: "BaseModel") -> None: ...


class Session(NamedTuple):
    """One command's two ways out."""

    progress: Progress
    emit: Emit


def session(json: bool = False, quiet: bool = False, debug: bool = False) -> Session:
    """Open the way to the terminal for one command.

    Args:
        json: ``emit`` writes the manifest instead of the path.
        quiet: no progress and no notes; warnings and errors stay.
        debug: let the libraries underneath log and warn as they please.
    """
    from .progress import LiveProgress, PlainProgress, QuietProgress

    if debug:
        _disarm_libraries()
    else:
        _hush_libraries()
    console = terminal()
    progress: Progress
    if quiet:
        progress = QuietProgress(console)
    elif console.is_terminal:
        progress = LiveProgress(console)
    else:
        progress = PlainProgress(console)
    return Session(progress, _emit_manifest if json else _emit_path)


def terminal(quiet: bool | None = None) -> "Console":
    """The console for people: standard error, no colour and 120 columns where that is no terminal.

    Args:
        quiet: show nothing; None: in all processes of a run but the first.
    """
    from .printing import PrintableConsole

    quiet = not distributed.is_main() if quiet is None else quiet
    return PrintableConsole(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120, quiet=quiet)


def output() -> "Console":
    """The console of a command whose report is its output: standard output, wide where a program reads it."""
    from .printing import PrintableConsole

    return PrintableConsole(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _WIDE)


@contextlib.contextmanager
def only_main() -> Iterator[None]:
    """Of several processes the first writes to standard output, the others to nowhere."""
    if distributed.is_main():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def fail(message: str, hint: str = "") -> None:
    """Say what went wrong and, if known, what to do about it."""
    from .progress import say

    console = terminal(quiet=False)
    say(console, message, label="error: ", style="bold red")
    if hint:
        say(console, hint, label="hint: ", style="bold")


def _emit_path(path: Path, manifest: "BaseModel") -> None:
    write(str(path))


def _emit_manifest(path: Path, manifest: "BaseModel") -> None:
    write(manifest.model_dump_json(indent=2))


class _PrintableRecord(logging.LogRecord):
    """What a library logs, as text that a terminal shows and does not obey: it may name strings of files."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def _disarm_libraries() -> None:
    """Let the libraries log and warn, but in printable text."""
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = _printable_warning


def _printable_warning(*arguments: Any, **named: Any) -> str:
    return printable(_LAY_OUT_WARNING(*arguments, **named))


def _hush_libraries() -> None:
    """Keep the libraries' own logs, bars and warnings off the terminal; variables that the user set stay."""
    for variable, value in _HUSH.items():
        os.environ.setdefault(variable, value)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
