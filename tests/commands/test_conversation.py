"""``ulbq generate --chat`` without a prompt: a conversation by lines."""

import contextlib
import io
import os
import pty
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.processes import start, wait
from ulbq.commands import conversation
from ulbq.commands.app import main
from ulbq.commands.conversation import Questions
from ulbq.progress import Silent

SAID = ["--chat", "--offline", "--device", "cpu", "-n", "5"]


@pytest.fixture
def folder(working_folder) -> Path:
    return working_folder(bits=4)


@pytest.fixture(autouse=True)
def usual_interrupts():
    """A conversation takes the signal for itself, and the command line gives it back; here nobody does."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def pipe(monkeypatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["generate", *words, *SAID])
    out, err = capsys.readouterr()
    return code, out, err


def test_lines_of_a_pipe_are_messages_and_answers_lines(folder, capsys, monkeypatch):
    pipe(monkeypatch, b"hello\n\nand you")
    code, out, err = run(capsys, "base")
    assert code == 0
    assert err.count("(cut after 5 tokens; --max-new-tokens allows more)") == 2
    pipe(monkeypatch, b"hello\n")
    first = run(capsys, "base", "-q")
    assert first[0] == 0
    assert first[2] == ""
    assert out.startswith(first[1])
    assert len(out) > len(first[1]) + 1
    assert out.endswith("\n")


@pytest.mark.parametrize(
    ("words", "raw", "code", "sentence"),
    [
        (["-"], b"base\n", 2, "either the SOURCE or the conversation"),
        (["base", "--json"], b"hi\n", 2, "--json tells of one prompt"),
        (["base"], b"", 3, "Standard input brought no message"),
        (["base"], b"\xff\xfe\n", 3, "not UTF-8"),
        (["base"], b"a" * (conversation._LONGEST_LINE + 1), 3, "longer than any message"),
        (["base"], b"a" * 600, 2, "and 'base' holds 256"),
    ],
)
def test_what_is_no_conversation_is_a_sentence(folder, capsys, monkeypatch, words, raw, code, sentence):
    pipe(monkeypatch, raw)
    found, out, err = run(capsys, *words, "-q")
    assert (found, out) == (code, "")
    assert sentence in err


def test_a_pipe_without_a_source_is_not_taken_for_messages(folder, capsys, monkeypatch):
    with open(folder / "path.txt", "w+") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        code, _, err = run(capsys)
    assert code == 2
    assert "Name the SOURCE" in err


def test_without_chat_a_prompt_is_wanted(folder, capsys):
    assert main(["generate", "base", "--device", "cpu"]) == 2
    assert "Missing option '--prompt'." in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Standard streams that are a terminal, and what is typed there, or raised, one after the other."""
    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr(sys, "stdout", _Terminal())

    def types(*events: str | type[BaseException]) -> None:
        waiting = iter(events)

        def read(sign: str = "") -> str:
            event = next(waiting)
            if isinstance(event, str):
                return event
            raise event

        monkeypatch.setattr("builtins.input", read)

    return types


def test_the_end_of_input_ends_and_so_does_an_interrupt_on_nothing(terminal, monkeypatch):
    terminal("hello", EOFError)
    ask = Questions(Silent())
    assert [ask(), ask()] == ["hello", None]
    begun = iter([True, False])
    monkeypatch.setattr(conversation, "_begun", lambda: next(begun))
    terminal(KeyboardInterrupt, "hello", KeyboardInterrupt)
    ask = Questions(Silent())
    assert ask() == "hello"
    with pytest.raises(KeyboardInterrupt):
        ask()


class _Typist:
    """A process at a terminal of its own."""

    def __init__(self, *words: str) -> None:
        controller, terminal = pty.openpty()
        self.process = start(partial(_at_terminal, words), Path(), (terminal,) * 3)
        os.close(terminal)
        self._controller = controller
        self.shown = ""

    def wait_for(self, text: str, count: int = 1) -> None:
        with contextlib.suppress(OSError):  # as soon as it has ended
            while self.shown.count(text) < count:
                self.shown += os.read(self._controller, 4096).decode(errors="replace")
        assert self.shown.count(text) >= count, self.shown

    def type(self, text: str) -> None:
        os.write(self._controller, text.encode())

    def end(self) -> int:
        """The exit code; what else is shown is read."""
        with contextlib.suppress(OSError):
            while more := os.read(self._controller, 4096):
                self.shown += more.decode(errors="replace")
        os.close(self._controller)
        return wait(self.process)


def _at_terminal(words: tuple[str, ...]) -> int:
    """A command that Ctrl-C of the terminal reaches."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.update(TERM="dumb", INPUTRC=os.devnull)
    return main(words)


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of Unix")
def test_at_a_terminal(folder):
    there = _Typist("generate", "base", *SAID, "-q")
    there.wait_for("> ")
    there.type("hello\n")
    there.wait_for("> ", 2)
    there.type("half a line")
    there.wait_for("half a line")
    time.sleep(1)  # Python waits for the next key when the signal comes while readline still draws the line
    there.type("\x03")
    there.wait_for("> ", 3)
    there.type("\x04")
    assert there.end() == 0
    assert "Traceback" not in there.shown
