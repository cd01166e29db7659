"""The rule by which a command finds its SOURCE."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from ulbq.commands import options
from ulbq.commands.app import main
from ulbq.commands.options import read_source
from ulbq.errors import InputError
from ulbq.progress import Silent

READ = """
import sys
from ulbq.commands.options import read_source
from ulbq.errors import UlbqError
try:
    print(repr(read_source(sys.argv[1] if sys.argv[1:] else None, "model")))
except UlbqError as error:
    print(error.message, error.hint, sep="\\n")
    sys.exit(error.exit_code)
"""


def _read(*arguments: str, **streams: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", READ, *arguments], stdout=subprocess.PIPE, text=True, check=False, **streams
    )


class _Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A standard input that is a terminal."""
    controller, terminal = os.openpty()
    with open(terminal) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield
    os.close(controller)


@pytest.mark.parametrize("text", ["artifacts/q", "artifacts/q\n", "  artifacts/q\r\n\n"])
def test_pipe_brings_one_path(text):
    assert _read(input=text).stdout == "'artifacts/q'\n"


def test_path_may_hold_spaces_and_letters_of_any_language():
    assert _read(input="mój model/q 2\n").stdout == "'mój model/q 2'\n"


def test_file_on_standard_input_counts_as_a_pipe(tmp_path):
    listed = tmp_path / "path.txt"
    listed.write_text("artifacts/q\n")
    with listed.open() as stream:
        assert _read(stdin=stream).stdout == "'artifacts/q'\n"


def test_named_source_leaves_the_pipe_alone():
    assert _read("model/", input="artifacts/q\n").stdout == "'model/'\n"


def test_dash_reads_standard_input(tmp_path):
    assert _read("-", input="artifacts/q\n").stdout == "'artifacts/q'\n"


def test_dash_without_a_pipe_is_refused():
    done = _read("-", stdin=subprocess.DEVNULL)
    assert done.returncode == 3
    assert "Nothing came through the pipe." in done.stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Nothing came through the pipe."),
        ("\n \n", "Nothing came through the pipe."),
        ("a\nb\n", "more than one line"),
        ("x" * 5000, "more than one line"),
        ('{\n  "kind": "quantized"\n}\n', "Leave out --json"),
    ],
    ids=["empty", "blank", "two lines", "endless", "json"],
)
def test_pipe_that_brings_something_else(text, sentence):
    done = _read(input=text)
    assert done.returncode == 3
    assert sentence in done.stdout


def test_no_input_falls_to_the_default():
    assert _read(stdin=subprocess.DEVNULL).stdout == "None\n"


def test_closed_input_falls_to_the_default():
    closed = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" <&-', sys.executable, READ], stdout=subprocess.PIPE, text=True, check=False
    )
    assert closed.stdout == "None\n"


@pytest.mark.usefixtures("terminal")
def test_default_model_is_said():
    progress = _Notes()
    assert read_source(None, "model", progress) is None
    assert progress.notes == ["No SOURCE given: taking the default model."]


@pytest.mark.usefixtures("terminal")
def test_newest_artifact_is_taken_and_said(monkeypatch):
    asked: list[tuple[Path, object]] = []

    def newest(root: Path, kinds: object) -> Path:
        asked.append((root, kinds))
        return root / "artifacts/b"

    monkeypatch.setattr("ulbq.artifacts.manifest.newest", newest)
    progress = _Notes()
    assert read_source(None, "newest", progress, kinds=("quantized", "converted")) == "artifacts/b"
    assert asked == [(Path(), ("quantized", "converted"))]
    assert progress.notes == ["No SOURCE given: taking the newest artifact, artifacts/b."]


@pytest.mark.usefixtures("terminal")
def test_no_artifact_to_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no finished artifact to take") as caught:
        read_source(None, "newest")
    assert "ulbq quantize" in caught.value.hint


def test_interrupt_while_waiting_is_left_to_the_command_before(monkeypatch):
    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise KeyboardInterrupt

    monkeypatch.setattr(options.sys, "stdin", io.TextIOWrapper(Interrupted()))
    with pytest.raises(typer.Exit) as caught:
        read_source("-", "model")
    assert caught.value.exit_code == 130


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantize", "--bits", "x"], "--bits takes a number, and 'x' is none."),
        (["quantize", "--samples", "0"], "--samples: "),
        (["quantize", "--set", "samples=0"], "--samples: "),
        (["quantize", "--recipe", "nothing"], "'nothing'"),
        (["saliency", "--samples", "0"], "--samples: "),
        (["eval", "--limit", "-1"], "--limit: "),
        (["generate", "-p", "x", "--max-new-tokens", "0"], "--max-new-tokens: "),
        (["finetune", "--task", "gsm8k", "--epochs", "0"], "--epochs: "),
        (["convert", "--to", "x"], "'--to'"),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_what_was_typed_is_checked_before_a_pipe_is_waited_for(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait() -> str:
        raise AssertionError("waited")

    monkeypatch.setattr(options, "input_is_piped", lambda: True)
    monkeypatch.setattr(options, "_read_path", wait)
    assert main(words) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("error: ")
    assert said in first
