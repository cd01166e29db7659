"""The table of contents of the command line, and the one place where errors become sentences and exit codes.

Exit codes: 0 done, 1 a defect of ulbq, 2 usage, 3 bad input or artifact, 4 environment, 5 the numbers went wrong,
130 interrupted; a reader that closes the pipe ends the command quietly with 141, as a shell reports it.
"""

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ulbq import __version__, distributed
from ulbq.errors import DiskFullError, InputError, ResourceError, UlbqError, UsageError
from ulbq.printable import printable

from . import completion, console
from .options import State
from .start import HINT, lacking
from .streams import steadied, write

INTERRUPTED = 130
BROKEN_PIPE = 141
DEFECT = 1

_UNDIVIDED = frozenset({"generate", "serve", "convert", "push", "inspect", "list", "doctor", "sweep", "recommend"})

_COMMANDS = {
    "saliency": "Score every weight of a model by how much the model depends on it.",
    "quantize": "Quantize a model to 1 to 4 bits, one block at a time.",
    "sweep": "Quantize a model by many settings, and compare what comes of them.",
    "recommend": "Find the setting that is expected to lose least within your limits, and show the command to type.",
    "eval": "Measure a model: size, perplexity, fidelity to its full-precision parent, tasks, words and speed.",
    "generate": "Let a model go on from a prompt, and tell its speed and memory.",
    "serve": "Let a model answer over HTTP, by OpenAI's API.",
    "finetune": "Teach a quantized artifact, packed as it is.",
    "convert": "Write a model in a layout that other tools load.",
    "push": "Upload an artifact with its model card to the Hugging Face Hub.",
    "list": "Show the artifacts under a folder, with bits, size, scores and ancestry.",
    "inspect": "Show an artifact: where its bits went, its errors by block and layer, its ancestry.",
    "doctor": "Show what runs on this machine, and what to install for the rest.",
}


class _Commands(Mapping[str, Any]):
    """Every command by its name. Its module, with all that it takes, is loaded when it is asked for."""

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)

    def __getitem__(self, name: str) -> Any:
        if name not in _COMMANDS:
            raise KeyError(name)
        from ulbq.runtime import calm_threads

        from .sections import SectionedCommand

        calm_threads()
        one = typer.Typer(add_completion=False, rich_markup_mode=None)
        function = getattr(import_module(f".{name}", __package__), name)
        one.command(name, cls=SectionedCommand, short_help=_COMMANDS[name])(function)
        return typer.main.get_command(one)


class _Group(TyperGroup):
    """The commands, of which a list needs no more than a sentence each."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


app = typer.Typer(
    name="ulbq",
    cls=_Group,
    help="Turn a causal language model into a 1- to 4-bit one, and show how good it is.",
    epilog="Commands chain: ulbq quantize --method db-llm | ulbq eval",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        write(f"ulbq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def ulbq(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        write(context.get_help())
        raise typer.Exit(UsageError.exit_code)
    if context.invoked_subcommand in _UNDIVIDED and distributed.size() > 1:
        raise UsageError(
            f"'ulbq {context.invoked_subcommand}' does not split its work over processes.",
            hint="Run it without torchrun.",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``ulbq``; None takes this process's own.

    Returns:
        The exit code.
    """
    if completion.ASKED in os.environ:
        completion.answer(app)
    with steadied():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(words: list[str]) -> int:
    state = State()
    command = typer.main.get_command(app)
    try:
        with _noting_interrupts(state), distributed.joined(), console.only_main():
            with command.make_context("ulbq", words, obj=state) as context:
                command.invoke(context)
            sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        _drop_standard_output()
        return BROKEN_PIPE
    except Exception as error:
        if state.debug:
            console.terminal(quiet=False).out(printable(traceback.format_exc()), end="", highlight=False)
        return _interrupted() if state.interrupted else _explain(error, state)
    except BaseException as error:
        # What Rust calls a panic, and its Python bindings no Exception; its own words are on standard error by now.
        if type(error).__name__ == "PanicException":
            hint = "Its files are damaged, or written for another version of that library."
            return _fail(InputError.exit_code, f"A library that reads the model gave up: {error}.", hint)
        raise


@contextmanager
def _noting_interrupts(state: State) -> Iterator[None]:
    """Note Ctrl-C in ``state``: torch, for one, may swallow KeyboardInterrupt and raise an error of its own instead."""

    def note(number: int, frame: FrameType | None) -> None:
        state.interrupted = True
        signal.default_int_handler(number, frame)

    # Who ignores the signal, as nohup does, or handles it already, goes on doing so; only the main thread may ask.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted() -> int:
    return _fail(INTERRUPTED, "Interrupted.", "Finished steps are kept: run the same command again to go on.")


def _explain(error: Exception, state: State) -> int:
    """Say an error as one message and one hint, fields as they are typed; return its exit code."""
    from .fields import as_typed

    known = _as_ulbq_error(error)
    if known is not None:
        return _fail(known.exit_code, *(as_typed(text, state.parameters) for text in (known.message, known.hint)))
    hint = "This is a defect of ulbq. Run again with --debug and report what it shows."
    return _fail(DEFECT, f"{type(error).__name__}: {error}", hint)


def _fail(code: int, message: str, hint: str) -> int:
    """Say why the command fails, once however many processes it has; return the exit code."""
    return distributed.end_together(code, lambda: console.fail(message, hint=hint))


def _as_ulbq_error(error: Exception) -> UlbqError | None:
    """The sentence for an error of Python's, Typer's, pydantic's or torch's own; None for one that nobody foresaw."""
    from pydantic import ValidationError

    match error:
        case UlbqError():
            return error
        case typer.TyperException():
            message = error.format_message().replace(": Value error, ", ": ")
            return UsageError(message, hint=f"{_meant(message)}{_help_hint(error)}")
        case ValidationError():  # a request that does not hold together; manifests have their own sentences
            first: dict[tuple[int | str, ...], str] = {}  # what is wrong in a list is said once
            for problem in error.errors():
                first.setdefault(problem["loc"][:1], _complaint(problem["loc"], problem["msg"]))
            return UsageError("; ".join(first.values()))
        case MemoryError():
            return _out_of_memory()
        case OSError() | ImportError() | RuntimeError() | SystemError() if (what := lacking(error)) is not None:
            return ResourceError(what, hint=HINT)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DiskFullError(
                f"The disk is full{_at(error)}.", hint="Make room and run the same command again, or choose another -o."
            )
        case OSError():
            return ResourceError(f"{error.strerror or error}{_at(error)}.")
        case RuntimeError() if (early := distributed.ended_early(error)) is not None:
            return early
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError":  # torch may not even be imported
            return ResourceError(
                "The GPU has no room left.",
                hint="Finished steps are kept: run again with a shorter `sequence_length` or a smaller `batch_size`; "
                "end to end `checkpointing` and `teacher=cached` take less. See what else uses the GPU.",
            )
        case RuntimeError() if "can't allocate memory" in str(error):
            return _out_of_memory()
    return None


def _meant(message: str) -> str:
    """The choice closest to a word that is none of an option's; empty where none is close."""
    found = re.search(r"'([^']*)' is not one of (.*)", message)
    close = get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), n=1) if found else []
    return f"Did you mean {close[0]}? " if close else ""


def _help_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f"See {context.command_path if context else 'ulbq'} --help."


def _complaint(location: tuple[int | str, ...], message: str) -> str:
    parts = [part for part in location if isinstance(part, str)]  # not where in a list
    name = "".join(f".{part}" if index else f"`{part}`" for index, part in enumerate(parts))
    text = message.removeprefix("Value error, ")
    return f"{name}: {text}" if name else text


def _at(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _out_of_memory() -> ResourceError:
    return ResourceError(
        "Out of memory.",
        hint="Finished steps are kept: free memory, or ask for fewer or shorter samples, and run again.",
    )


def _drop_standard_output() -> None:
    """Let Python flush into nothing at exit instead of failing once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
