"""Options of the command line itself, and the rule by which a command finds its SOURCE.

What a command asks for is declared in ``ulbq/config``. The types carry no defaults; a command's signature does.
"""

import io
import os
import stat
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ulbq import distributed
from ulbq.errors import InputError
from ulbq.progress import Progress, Silent

_LONGEST_PATH = 4096  # bytes; PATH_MAX of Linux


@dataclass
class State:
    """What the error handler must know of the command that failed."""

    debug: bool = False
    interrupted: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    """Of the command, by the fields that they stand for."""


def _remember_debug(context: typer.Context, debug: bool) -> bool:
    context.ensure_object(State).debug = debug
    return debug


Source = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="Hub id, model folder, GGUF file, artifact or smollm2-135m; '-' reads one path from standard input.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and what it will cost, then stop.", rich_help_panel="Run")
]
_TERMINAL = "Terminal"
Json = Annotated[
    bool, typer.Option("--json", help="Write the manifest instead of the path.", rich_help_panel=_TERMINAL)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors only.", rich_help_panel=_TERMINAL)
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Tracebacks, and the libraries' own logs.", callback=_remember_debug, rich_help_panel=_TERMINAL
    ),
]


def read_source(
    source: str | None,
    default: Literal["model", "newest"],
    progress: Progress | None = None,
    kinds: Collection[str] = ("quantized",),
    *,
    piped: bool = True,
) -> str | None:
    """What a command works on: its argument, one path from a pipe, or the default.

    Call it before anything heavy: a command at the end of a pipe waits here for the one before it.

    Args:
        source: the SOURCE argument; ``-`` reads standard input, None does so where that is a pipe or a file.
        default: ``model`` is the bundled model, ``newest`` the newest finished artifact in the current
            folder tree.
        progress: told which default was taken.
        kinds: manifest kinds that ``newest`` may take.
        piped: whether standard input may bring the source; not where the command reads something else from it.

    Returns:
        The source as text, or None for the bundled model.

    Raises:
        InputError: the pipe brought nothing, or something other than one path; no artifact to take.
    """
    if piped and (source == "-" or (source is None and input_is_piped())):
        return distributed.on_main(_read_path)
    if source is not None:
        return source
    progress = progress or Silent()
    if default == "model":
        progress.note("No SOURCE given: taking the default model.")
        return None
    from ulbq.artifacts.manifest import newest

    found = distributed.on_main(newest, Path(), kinds)
    if found is None:
        raise InputError(
            "No SOURCE given, and no finished artifact to take lies up to three folders below this one.",
            hint="Name a SOURCE, or run 'ulbq quantize' first.",
        )
    progress.note(f"No SOURCE given: taking the newest artifact, {found}.")
    return str(found)


def check_out(out: Path | None, *, force: bool) -> None:
    """Refuse an output that is taken, before the libraries are loaded or a pipe is waited for. Raises InputError."""
    if out is not None:
        from ulbq.artifacts.store import check_output

        check_output(out, force=force)


def input_is_piped() -> bool:
    """Whether standard input is a pipe or a file; a terminal, ``/dev/null`` or a closed one is not."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, ValueError, OSError, io.UnsupportedOperation):  # None, closed, or not a real file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_path() -> str:
    try:
        raw = sys.stdin.buffer.read(_LONGEST_PATH + 1) if sys.stdin is not None else b""
    except KeyboardInterrupt:
        # The command before this one is stopped by the same key and says how to go on.
        raise typer.Exit(130) from None
    lines = [line for line in os.fsdecode(raw).splitlines() if line.strip()]
    if not lines:
        raise InputError(
            "Nothing came through the pipe.",
            hint="The command before this one failed; see its message. Without a pipe, name a SOURCE.",
        )
    if lines[0].lstrip().startswith("{"):
        raise InputError(
            "The pipe brought JSON, but an artifact's path is wanted.",
            hint="Leave out --json in the command before this one.",
        )
    if len(lines) > 1 or len(raw) > _LONGEST_PATH:
        raise InputError(
            "The pipe brought more than one line, but one artifact's path is wanted.",
            hint="Run this command once for each artifact.",
        )
    return lines[0].strip()
