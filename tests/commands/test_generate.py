"""``ulbq generate``: what goes where."""

import io
import json
import sys
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny
from ulbq.commands.app import main
from ulbq.errors import UlbqError
from ulbq.pipeline import generate as pipeline
from ulbq.pipeline.quantize import QuantizeRequest, quantize


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Working folder with ``base`` and an artifact ``artifacts/q`` made from it; no standard input."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    save_tiny("llama", tmp_path / "base", tied=False)
    quantize(QuantizeRequest(source="base", method="rtn", bits=4, group_size=32, out=Path("artifacts/q")))
    return tmp_path


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["generate", *words, "--offline", "--device", "cpu", "--max-new-tokens", "5"])
    out, err = capsys.readouterr()
    return code, out, err


def type_in(monkeypatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_the_text_alone_on_standard_output_and_the_figures_beside_it(folder, capsys):
    code, out, err = run(capsys, "base", "--prompt", "once upon")
    assert code == 0
    assert out.endswith("\n")
    assert "tokens per second" not in out
    for text in ("Loading base", "5 tokens, the first after", "tokens per second (cpu, ", "Weights 0 MB; the process"):
        assert text in err
    assert run(capsys, "base", "--prompt", "once upon", "-q") == (0, out, "")


def test_without_a_source_it_takes_the_newest(folder, capsys):
    _, expected, _ = run(capsys, "artifacts/q", "-p", "once upon")
    code, out, err = run(capsys, "-p", "once upon")
    assert (code, out) == (0, expected)
    assert "taking the newest artifact, artifacts/q." in err


def test_the_prompt_comes_from_standard_input_where_asked(folder, capsys, monkeypatch):
    _, expected, _ = run(capsys, "artifacts/q", "-p", "once upon")
    for words in (["artifacts/q"], []):
        type_in(monkeypatch, b"once upon\n")
        assert run(capsys, *words, "-p", "-")[:2] == (0, expected)


def test_json_is_one_object(folder, capsys):
    _, text, _ = run(capsys, "base", "-p", "once upon", "-q")
    code, out, _ = run(capsys, "base", "-p", "once upon", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["text"] == text.removesuffix("\n")
    assert (found["model"], found["new_tokens"], found["cache_memory"]) == ("base", 5, 0)


def test_the_cache_is_told(folder, capsys):
    _, _, err = run(capsys, "artifacts/q", "-p", "ab " * 60, "--prefill-cache")
    assert "prefill cache 0 MB" in err


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["base"], "--prompt", 2),
        (["base", "-p", " "], "prompt is empty", 2),
        (["-", "-p", "-"], "either the SOURCE or the prompt", 2),
        (["base", "-p", "x", "--temperature", "-1"], "--temperature", 2),
        (["base", "-p", "x", "--top-p", "2"], "top-p", 2),
        (["./nowhere", "-p", "x"], "There is no file or folder './nowhere'", 3),
    ],
)
def test_bad_input_has_its_exit_code(folder, capsys, words, sentence, code):
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "")
    assert sentence in err


def test_a_prompt_that_is_no_text(folder, capsys, monkeypatch):
    type_in(monkeypatch, b"\xff\xfe")
    code, out, err = run(capsys, "base", "-p", "-")
    assert (code, out) == (3, "")
    assert "not UTF-8" in err


def test_who_has_heard_enough_leaves_without_a_word(folder, capsys, monkeypatch):
    def interrupt(request, on_text, progress):
        on_text("so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate", interrupt)
    assert run(capsys, "base", "-p", "x", "-q") == (130, "so far\n", "")


def test_errors_while_speaking_are_sentences(folder, capsys, monkeypatch):
    def fail(request, on_text, progress):
        on_text("so far")
        raise UlbqError("No more.")

    monkeypatch.setattr(pipeline, "generate", fail)
    code, out, err = run(capsys, "base", "-p", "x", "-q")
    assert (code, out, err) == (3, "so far", "error: No more.\n")
