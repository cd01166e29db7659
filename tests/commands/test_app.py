"""Exit codes, sentences and speed of the command line's frame."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field

import ulbq
from ulbq.commands import app as app_module
from ulbq.commands.options import Debug
from ulbq.errors import InputError, NumericsError, ResourceError, UsageError

ULBQ = [sys.executable, "-c", "import sys; from ulbq.commands.app import main; sys.exit(main())"]
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "numpy", "rich"}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    group_size: int = Field(gt=0)


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException, bool], int]:
    """Run a command that raises the given error; returns the exit code."""

    def run(error: BaseException, debug: bool = False) -> int:
        app = typer.Typer(rich_markup_mode=None)

        @app.callback()
        def group() -> None: ...

        @app.command()
        def work(debug: Debug = False) -> None:
            raise error

        monkeypatch.setattr(app_module, "app", app)
        return app_module.main(["work", "--debug"] if debug else ["work"])

    return run


class TorchOutOfMemoryError(RuntimeError):
    """Stands in for torch's, which is told by its name because torch may not be imported."""


TorchOutOfMemoryError.__name__ = "OutOfMemoryError"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UsageError("Two things at once."), 2, "Two things at once."),
        (InputError("No such folder.", hint="Name another."), 3, "No such folder."),
        (ResourceError("No network."), 4, "No network."),
        (NumericsError("Loss is not finite."), 5, "Loss is not finite."),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (MemoryError(), 4, "Out of memory."),
        (TorchOutOfMemoryError("CUDA out of memory"), 4, "The GPU has no room left."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "Out of memory."),
        (OSError(errno.ENOSPC, "No space left on device", "q/x"), 3, "The disk is full (q/x)."),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 4, "Permission denied (/root/x)."),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_is_one_message_and_its_exit_code(fail_with, capsys, error, code, sentence):
    assert fail_with(error) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == f"error: {sentence}"
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines) <= 2


def test_hint_follows_the_message(fail_with, capsys):
    fail_with(InputError("No such folder.", hint="Name another."))
    assert capsys.readouterr().err == "error: No such folder.\nhint: Name another.\n"


def test_long_sentences_are_not_folded_and_brackets_are_no_markup(fail_with, capsys):
    message = "The file " + "folder[1]/" * 30 + "x is corrupt."
    fail_with(InputError(message))
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_interrupt_that_a_library_swallowed_is_one_still(monkeypatch, capsys):
    app = typer.Typer(rich_markup_mode=None)

    @app.callback()
    def group() -> None: ...

    @app.command()
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    monkeypatch.setattr(app_module, "app", app)
    # A shell starts background jobs with the signal ignored, and the test may run in one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert app_module.main(["work"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Interrupted" in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(fail_with, capsys):
    fail_with(KeyboardInterrupt())
    assert "run the same command again" in capsys.readouterr().err


def test_traceback_only_with_debug(fail_with, capsys):
    fail_with(InputError("No such folder."))
    assert "Traceback" not in capsys.readouterr().err
    assert fail_with(InputError("No such folder."), debug=True) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: No such folder.\n")


def test_request_that_does_not_hold_together_is_a_usage_error(fail_with, capsys):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  pydantic's own error is what is handed on
        _Request(group_size=-1)
    assert fail_with(caught.value) == 2
    assert capsys.readouterr().err == "error: --group-size: Input should be greater than 0\n"


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["no-such-command"]])
def test_usage_errors_name_the_help(capsys, arguments):
    assert app_module.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: No such [^\n]+\nhint: See ulbq --help\.\n", captured.err)


def test_no_command_shows_the_help(capsys):
    assert app_module.main([]) == 2
    assert capsys.readouterr().out.startswith("Usage: ulbq")


def test_version(capsys):
    assert app_module.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ulbq {ulbq.__version__}\n"


def test_help_lists_every_command(capsys):
    assert app_module.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("quantize", "eval", "convert", "inspect"):
        assert re.search(rf"^  {name} ", shown, flags=re.MULTILINE), name


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["eval", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys; from ulbq.commands.app import main; code = main(sys.argv[1:]); "
        "print('\\nimported:', *sorted({name.partition('.')[0] for name in sys.modules})); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    help_text, _, imported = done.stdout.partition("\nimported:")
    assert help_text.startswith("Usage: ulbq")
    assert not HEAVY & set(imported.split())


def test_the_help_costs_less_than_three_times_a_bare_typer(tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text(
        "import typer\napp = typer.Typer(add_completion=False, rich_markup_mode=None)\n"
        "@app.callback()\ndef group(): ...\n@app.command()\ndef work(): ...\napp()\n"
    )

    def seconds(*program: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, *program, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Of processor time, and the least of several: other people's work makes either longer, never shorter.
    assert min(seconds("-m", "ulbq") for _ in range(5)) < 3 * min(seconds(str(bare)) for _ in range(5))


def test_the_list_of_commands_says_of_each_what_its_own_help_does():
    group = typer.main.get_command(app_module.app)
    assert list(group.commands) == list(app_module._COMMANDS)
    for name, sentence in app_module._COMMANDS.items():
        assert " ".join(group.commands[name].help.split()).startswith(sentence)


def test_an_error_names_fields_as_they_are_typed(capsys):
    words = ["quantize", "no-such-model", "--offline", "--method", "apiq", "--no-adapter", "--rank", "4"]
    assert app_module.main(words) == 2
    told = capsys.readouterr().err
    assert told == ("error: --rank means nothing without --adapter.\nhint: Add --adapter, or leave out --rank.\n")


def test_reader_that_closes_the_pipe_ends_the_command_quietly():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([*ULBQ, "--help"], stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_behind_standard_output():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*ULBQ, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: The disk is full")


def test_what_is_wrong_in_a_list_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    from ulbq.commands.app import main

    assert main(["sweep", "nowhere", "--method", "rtn", "--bits", "4", "--seeds", "-1"]) == 2
    assert capsys.readouterr().err == "error: --seeds: Input should be greater than or equal to 0\n"
