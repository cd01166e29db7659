"""``ulbq serve``: from the shell's side."""

import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.processes import start, ulbq, wait
from ulbq.commands.app import main
from ulbq.pipeline import serve as pipeline


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
    words = ["ulbq", "serve", "artifacts/q", "--port", "0", "--device", "cpu", "--offline"]
    (told, out), (said, err) = os.pipe(), os.pipe()
    with open(os.devnull) as nothing:
        process = start(ulbq(*words), Path(), (nothing.fileno(), out, err))
    os.close(out)
    os.close(err)
    with open(told) as output, open(said) as errors:
        address = output.readline().strip()
        with urllib.request.urlopen(f"{address}/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "q"
        body = json.dumps({"prompt": "once", "max_tokens": 3}).encode()
        wanted = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(wanted) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        os.kill(process, signal.SIGINT)
        assert (wait(process), output.read()) == (130, "")
        err = errors.read()
        assert "4 tokens in, 3 out: the first after" in err
        assert "Traceback" not in err
        assert "error" not in err
