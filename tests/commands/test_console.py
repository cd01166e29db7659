"""Results on standard output, everything for people on standard error."""

import json
import logging
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from pydantic import BaseModel

from ulbq.commands import console

WORK = """
from pathlib import Path
from pydantic import BaseModel
from ulbq.commands import console

class Manifest(BaseModel):
    pass

progress, emit = console.session()
with progress.phase("blocks", 3) as phase:
    phase.advance(3)
progress.warn("careful")
emit(Path("artifacts/q"), Manifest())
"""


class _Manifest(BaseModel):
    kind: str = "quantized"
    seed: int = 0


def test_path_and_nothing_else_on_standard_output(capsys):
    progress, emit = console.session()
    with progress.phase("blocks", 1) as phase:
        phase.advance()
    progress.note("a note")
    progress.warn("a warning")
    emit(Path("artifacts/q"), _Manifest())
    assert capsys.readouterr().out == "artifacts/q\n"


def test_json_writes_the_manifest(capsys):
    _, emit = console.session(json=True)
    emit(Path("artifacts/q"), _Manifest())
    assert json.loads(capsys.readouterr().out) == {"kind": "quantized", "seed": 0}


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_of_a_run_without_a_terminal(quiet, capfd):
    progress = console.session(quiet=quiet).progress
    with progress.phase("blocks", 2) as phase:
        phase.advance()
        phase.advance()
    progress.note("a note")
    progress.warn("careful")
    shown = capfd.readouterr().err.splitlines()
    assert shown[-1] == "warning: careful"
    if quiet:
        assert len(shown) == 1
    else:
        assert shown[0].startswith("blocks: ")
        assert "a note" in shown


def test_no_escape_codes_without_a_terminal(capfd):
    console.session().progress.warn("careful")
    console.fail("It broke.", hint="Mend it.")
    assert capfd.readouterr().err == "warning: careful\nerror: It broke.\nhint: Mend it.\n"


def test_bars_go_to_the_terminal_and_not_into_the_pipe():
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", WORK],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={key: value for key, value in environment.items() if key not in {"NO_COLOR", "CI"}},
        check=True,
    )
    os.close(terminal)
    shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert done.stdout == b"artifacts/q\n"
    assert "\x1b[" in shown
    assert "blocks: 3/3 done in" in shown


def test_libraries_are_hushed_unless_debugging(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    logger = logging.getLogger("lm_eval")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    console.session(debug=True)
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    assert logger.level == logging.NOTSET
    console.session()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert logger.level == logging.ERROR


def test_users_own_verbosity_stays(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    console.session()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_what_libraries_say_when_debugging_is_printable(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    logger = logging.getLogger("a library")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(sys.stderr)])
    try:
        console.session(debug=True)
        logger.warning("a file called %s", "\x1b[31mred")
        warned = warnings.formatwarning("\x1b]0;title\x07", UserWarning, "some\x1b.py", 1)
    finally:
        logging.setLogRecordFactory(factory)
    said = capsys.readouterr().err
    assert "a file called [31mred" in said
    assert "\x1b" not in said
    assert warned.startswith("some.py:1: UserWarning: ]0;title")
