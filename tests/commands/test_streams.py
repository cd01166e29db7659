"""Standard streams that are closed, full or terminals; and escape sequences that must not reach one."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.artifacts.sample import edit, write_artifact
from ulbq.commands import console as console_module
from ulbq.commands.app import main
from ulbq.commands.streams import write
from ulbq.printable import printable

EVIL = "\x1b]0;OWNED\x07\x1b[2J\x9b31m\u202eback\r"
ULBQ = [sys.executable, "-c", "import sys; from ulbq.commands.app import main; sys.exit(main())"]


def shell(words: str, redirection: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    command = f'{sys.executable} -m ulbq {words} {redirection}; echo "exit $?" >&3'
    return subprocess.run(["bash", "-c", f"exec 3>&1; {command}"], cwd=folder, capture_output=True, check=False)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-"])
def test_a_lost_standard_error_ends_no_command(redirection: str, tmp_path: Path) -> None:
    write_artifact(tmp_path / "q")
    done = shell("inspect q --json", redirection, tmp_path)
    text, _, code = done.stdout.decode().rpartition("exit ")
    assert code.strip() == "0"
    assert json.loads(text)["name"] == "tiny-w2g64"
    # With the descriptor free, the first file that is opened would get it.
    assert b"".join(path.read_bytes() for path in tmp_path.glob("*") if path.is_file()) == b""


def test_errors_keep_their_exit_code_without_anybody_to_tell(tmp_path: Path) -> None:
    for redirection in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        assert shell("inspect nothing", redirection, tmp_path).stdout.decode().strip() == "exit 3"


def test_a_full_standard_output_is_a_sentence(tmp_path: Path) -> None:
    write_artifact(tmp_path / "q")
    done = shell("inspect q -q", ">/dev/full", tmp_path)
    assert done.stdout == b"exit 4\n"
    assert done.stderr == b"error: Standard output cannot be written: No space left on device.\n"


def test_names_reach_the_terminal_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(tmp_path / "q")

    def change(manifest: dict) -> None:
        manifest.update(name=f"n{EVIL}", method=f"m{EVIL}", skipped=[f"x{EVIL}"], device=f"d{EVIL}")
        manifest["layers"][0]["name"] = f"a.0.b{EVIL}"
        manifest["parents"] = [{"kind": f"k{EVIL}", "name": f"p{EVIL}", "path": f"q{EVIL}", "sha256": EVIL}]
        manifest["request"] = {EVIL: EVIL}

    edit(tmp_path / "q", change, reseal=True)
    for words in (["inspect", str(tmp_path / "q"), "--layers"], ["inspect", f"{tmp_path}/none{EVIL}"],
                  ["inspect", f"--{EVIL}"], ["quantize", EVIL, "--method", "rtn", "--debug"]):  # fmt: skip
        main(words)
        out, err = capsys.readouterr()
        assert "OWNED" in out + err
        assert set(EVIL) & set(out + err) <= set("]0;OWNED[2J31mback")


def test_a_terminal_is_shown_text_and_a_pipe_gets_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdout", stream)
        write(f"one\n\ttwo{EVIL}", end="")
        assert stream.getvalue() == (f"one\n\ttwo{printable(EVIL)}" if terminal else f"one\n\ttwo{EVIL}")
    assert printable(EVIL) == "]0;OWNED[2J31mback"
    assert printable("ü 漢 👍🏽 \u00a0 \ud83d") == "ü 漢 👍🏽 \u00a0 \ufffd"


def test_the_consoles_own_colours_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    terminal = console_module.terminal()
    table = Table()
    table.add_column(Text(f"a{EVIL}"))
    terminal.print(table, Text(EVIL, style="bold red"))
    assert "\x1b[1;31m" in stream.getvalue()
    assert "\x1b]0" not in stream.getvalue()


def test_a_path_that_is_no_utf8_goes_on_as_its_bytes(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/q\xff"
    write_artifact(tmp_path / "q")
    os.rename(tmp_path / "q", folder)
    done = subprocess.run([*ULBQ, "inspect", "-q", folder], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, folder + b"\n", b"")


@pytest.mark.parametrize("limit", ["-v 60000", "-v 400000"])
def test_a_process_that_is_granted_too_little_memory_says_so(limit: str, tmp_path: Path) -> None:
    command = f"ulimit {limit}; exec {sys.executable} -m ulbq generate {tmp_path} -p hi"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("error: This process is granted too little memory.\nhint: See 'ulimit -a'")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(24, "Too many open files", "x"), "files"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory"),
        (ImportError("x.so: cannot open shared object file: Too many open files"), "files"),
        (RuntimeError("can't start new thread"), "threads"),
        (RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"), "memory"),
    ],
)
def test_what_the_environment_lacks(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("ulbq.commands.inspect.read_source", fail)
    assert main(["inspect", "x"]) == 4
    assert sentence in capsys.readouterr().err
