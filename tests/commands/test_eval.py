"""``ulbq eval``: how it finds its sources, and what it says where."""

import json
from pathlib import Path

import pytest

from tests.evaluation.sample import write_mirror
from ulbq.artifacts import read_manifest
from ulbq.commands.app import main


@pytest.fixture
def folder(tmp_path, monkeypatch, working_folder) -> Path:
    """There is a mirror, too."""
    monkeypatch.setenv("ULBQ_DATA_DIR", str(write_mirror(tmp_path / "mirror")))
    return working_folder(bits=2)


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["eval", *words, "--offline", "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def test_takes_the_newest_model_and_writes_its_path_alone(folder, capsys):
    code, out, err = run(capsys, "--limit", "2")
    assert (code, out) == (0, "artifacts/q-eval\n")
    assert "taking the newest artifact, artifacts/q." in err
    for text in ("base", "rtn w2g32", "wikitext2 ↓", "mean KL", "Report: artifacts/q-eval/report.html"):
        assert text in err


def test_an_evaluation_is_no_model_to_take(folder, capsys):
    assert run(capsys, "--limit", "2")[0] == 0
    code, out, _ = run(capsys, "--limit", "3")
    assert (code, out) == (0, "artifacts/q-eval-2\n")


def test_json_is_the_manifest(folder, capsys):
    code, out, _ = run(capsys, "artifacts/q", "--limit", "2", "--json", "-o", "e")
    assert code == 0
    assert json.loads(out) == json.loads(read_manifest(Path("e")).model_dump_json())


def test_quiet_shows_no_table(folder, capsys):
    assert run(capsys, "artifacts/q", "--limit", "2", "--quiet") == (0, "artifacts/q-eval\n", "")


def test_written_answers_need_a_name_alone(folder, capsys):
    options = ("--limit", "2", "--max-new-tokens", "3", "--template", "gsm8k", "--no-fidelity")
    code, out, err = run(capsys, "artifacts/q", "--tasks", "svamp,boolq-instruct", *options)
    assert (code, out) == (0, "artifacts/q-eval\n")
    for text in ("svamp exact_match", "boolq-instruct exact_match", "first 2 documents, laid out as gsm8k"):
        assert text in err
    assert len(Path("artifacts/q-eval/samples.jsonl").read_text().splitlines()) == 8  # the parent's too


def test_both_models_words_stand_below_the_table(folder, capsys):
    prompts = ("-p", "once upon", "--prompt", "a quick\x1b[2J fox")
    code, out, err = run(capsys, "artifacts/q", "--limit", "2", *prompts, "--max-new-tokens", "5")
    assert (code, out) == (0, "artifacts/q-eval\n")
    shown = err.splitlines()
    start = shown.index("Prompt: once upon")
    assert [line.split(":")[0] for line in shown[start : start + 3]] == ["Prompt", "  base", "  q"]
    assert all(line.split(": ")[1].strip() for line in shown[start + 1 : start + 3])
    assert "Prompt: a quick[2J fox" in shown
    assert "\x1b" not in err
    for text in ("size on disk", "weights in memory", "tokens per second ↑", "at most 5 tokens"):
        assert text in err
    assert shown[-1] == "Report: artifacts/q-eval/report.html"


def test_inspection_shows_the_same(folder, capsys):
    assert run(capsys, "artifacts/q", "--limit", "2", "-p", "once upon", "--max-new-tokens", "5")[0] == 0
    assert main(["inspect", "artifacts/q-eval"]) == 0
    out = capsys.readouterr().out
    for text in ("Prompt: once upon", "  base: ", "  q: ", "tokens per second ↑", "wikitext2 ↓", "size on disk"):
        assert text in out


def test_compares_several(folder, capsys):
    code, out, err = run(capsys, "--compare", "artifacts/q", "base", "--limit", "2")
    assert (code, out) == (0, "artifacts/comparison\n")
    assert "base" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a", "b"], "Put --compare before them"),
        (["--compare", "a"], "--compare needs two SOURCEs"),
        (["--compare", "a", "-"], "Only the first SOURCE can be '-'"),
        (["artifacts/q", "--context", "1"], "--context"),
        (["artifacts/q", "--perplexity", "wiki"], "no text set 'wiki'"),
        (["artifacts/q", "--tasks", ","], "--tasks names nothing"),
        (["artifacts/q", "--tasks", "piqa", "--template", "chat"], "--template means nothing to tasks of lm-eval"),
        (["artifacts/q", "--prompt", " "], "The prompt is empty"),
        (["artifacts/q", "--seed", str(2**64)], "seed"),
        (["artifacts/q", "--batch-size", str(10**30)], "batch-size"),
    ],
)
def test_wrong_usage_is_exit_code_two(folder, capsys, words, sentence):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert sentence in err


def test_names_come_apart_at_commas(folder, capsys):
    code, _, err = run(capsys, "artifacts/q", "--perplexity", "wikitext2, c4x")
    assert code == 2
    assert "'c4x'" in err
