"""``ulbq serve``: from the shell's side."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from ulbq.commands.app import main
from ulbq.pipeline import serve as pipeline

ULBQ = [sys.executable, "-c", "import sys; from ulbq.commands.app import main; sys.exit(main())"]


@pytest.fixture
def folder(working_folder) -> Path:
    return working_folder(bits=4)


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["serve", *words, "--offline", "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def test_missing_packages_are_named_with_the_way_to_get_them(folder, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    assert run(capsys, "base") == (
        4,
        "",
        "error: Serving needs starlette and uvicorn, which are not installed.\nhint: pip install 'ulbq[serve]'\n",
    )
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert "error: Serving needs uvicorn, which is not installed." in run(capsys, "base")[2]


def test_a_taken_port_is_a_sentence(folder, capsys):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, err = run(capsys, "base", "--port", port, "-q")
    assert (code, out) == (4, "")
    assert err == f"error: Port {port} of 127.0.0.1 is taken.\nhint: Take another --port.\n"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["base", "--port", "70000"], 2, "port"),
        (["base", "--host", ""], 2, "host"),
        (["base", "--temperature", "0", "--top-p", "0.5"], 2, "nothing to draw from"),
        (["./nowhere"], 3, "There is no file or folder './nowhere'"),
    ],
)
def test_bad_input_has_its_exit_code(folder, capsys, words, code, sentence):
    pytest.importorskip("uvicorn")
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "")
    assert sentence in err


def test_from_the_address_to_the_interrupt(folder):
    pytest.importorskip("uvicorn")
    words = ["serve", "artifacts/q", "--port", "0", "--device", "cpu", "--offline"]
    # What a script starts in the background ignores the signal, and so do its tests.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*ULBQ, *words], preexec_fn=heard, **pipes)
    address = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{address}/models") as answer:
        assert json.load(answer)["data"][0]["id"] == "q"
    body = json.dumps({"prompt": "once", "max_tokens": 3}).encode()
    wanted = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(wanted) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 3
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "4 tokens in, 3 out: the first after" in err
    assert "Traceback" not in err
    assert "error" not in err
