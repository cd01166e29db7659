"""``ulbq generate``: what goes where."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from ulbq.commands.app import main
from ulbq.errors import UlbqError
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline import generate as pipeline


@pytest.fixture
def folder(working_folder) -> Path:
    return working_folder(bits=4)


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


def end_at_once(folder: Path, prompt: str) -> None:
    """Make the token that comes first after a prompt one that ends the text and shows nothing."""
    source = resolve(folder)
    tokens = source.tokenizer()(prompt, return_tensors="pt").input_ids
    first = int(load_model(source, dtype=torch.bfloat16)(tokens).logits[0, -1].argmax())
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {first}}}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = [source.tokenizer().convert_ids_to_tokens(first)]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_an_answer_of_nothing_says_so(folder, capsys):
    end_at_once(folder / "base", "once upon")
    sentence = "The model ended its answer at once; try another prompt, --temperature 0.7, or a model of more bits."
    code, out, err = run(capsys, "base", "-p", "once upon")
    assert (code, out) == (0, "\n")
    assert f"warning: {sentence}\n" in err
    assert run(capsys, "base", "-p", "once upon", "-q") == (0, "\n", f"warning: {sentence}\n")
    code, out, err = run(capsys, "base", "-p", "once upon", "--json", "-q")
    assert (code, json.loads(out)["text"], err) == (0, "", f"warning: {sentence}\n")


def test_a_chat_of_nothing_names_the_way_without_one(folder, capsys):
    end_at_once(folder / "base", "user: hello\n")
    code, out, err = run(capsys, "base", "-p", "hello", "--chat", "-q")
    assert (code, out) == (0, "\n")
    assert "try the bare text, without --chat" in err


def test_blanks_alone_say_so(folder, capsys, monkeypatch):
    values = {"model": "m", "device": "cpu", "prompt_tokens": 2, "new_tokens": 3, "prefill_seconds": 1.0}
    values |= {"decode_seconds": 1.0, "tokens_per_second": 2.0, "weight_memory": 1, "cache_memory": 0, "peak_memory": 1}
    blank = pipeline.Generation(text=" \n", **values)
    monkeypatch.setattr(pipeline, "generate", lambda request, on_text, progress: blank)
    code, _, err = run(capsys, "base", "-p", "x", "-q")
    assert code == 0
    assert err.startswith("warning: The model wrote 3 tokens that show nothing; try another prompt")


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
