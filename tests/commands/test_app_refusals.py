"""What is refused before a model is opened: here one that does not exist, which nobody complains of."""

from pathlib import Path

import pytest

from ulbq.commands.app import main

NO_MODEL = "no-such-model"
COMMANDS = [
    ["quantize", NO_MODEL, "--method", "rtn"],
    ["quantize", NO_MODEL, "--method", "rtn", "--dry-run"],
    ["saliency", NO_MODEL],
    ["saliency", NO_MODEL, "--dry-run"],
    ["convert", NO_MODEL],
    ["eval", NO_MODEL],
    ["finetune", NO_MODEL, "--task", "end-to-end", "--loss", "kl"],
    ["finetune", NO_MODEL, "--task", "instructions", "--data", "a.jsonl"],
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main([*words, "--offline"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert NO_MODEL not in captured.err
    assert "hint: " in captured.err
    return captured.err


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[::2]))
def test_an_output_that_is_taken(words, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "'mine' exists and is a folder that is not an artifact" in refused(capsys, 3, *words, "-o", "mine")
    assert "is not an artifact" in refused(capsys, 3, *words, "-o", "mine", "--force")
    assert "exists and is a file" in refused(capsys, 3, *words, "-o", "mine/thesis.txt")


def test_an_artifact_is_replaced_with_force_alone(tiny_llama, capsys):
    made = ["quantize", str(tiny_llama), "--method", "rtn", "--group-size", "32", "--offline", "-q", "-o", "a"]
    assert main(made) == 0
    capsys.readouterr()
    assert "replace it with --force" in refused(capsys, 3, "quantize", NO_MODEL, "--method", "rtn", "-o", "a")
    assert main([*made, "--force", "--dry-run"]) == 0


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--calibration", "no.txt"], 3, "There is no file no.txt."),
        (["--calibration", "no.safetensors"], 3, "There is no file no.safetensors."),
        (["--calibration", "wikitext"], 2, "'wikitext' is neither a calibration set nor a data file."),
        (["--calibration", "folder.txt"], 3, "folder.txt is a folder, not a file."),
        (["--calibration", "c4", "--data-dir", "folder.txt"], 4, "was found nowhere"),
        (["--calibration", "mix", "--data-dir", "folder.txt"], 4, "was found nowhere"),
        (["--calibration", "c4", "--data-dir", "nowhere"], 3, "There is no data folder nowhere."),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_samples_that_are_not_there(words, code, sentence, more, tmp_path, capsys):
    (tmp_path / "folder.txt").mkdir()
    assert sentence in refused(capsys, code, "quantize", NO_MODEL, "--method", "gptq", *words, *more)
    assert sentence in refused(capsys, code, "saliency", NO_MODEL, *words, *more)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--end-to-end-data", "no.jsonl"], 3, "There is no file no.jsonl."),
        (["--end-to-end-data", "nonsense"], 2, "'nonsense' is neither a calibration set nor a data file."),
        (["--end-to-end-data", "owner/nonsense"], 4, "was found nowhere"),
    ],
)
def test_a_text_that_is_not_there(words, code, sentence, capsys):
    start = ["quantize", NO_MODEL, "--method", "efficientqat", "--end-to-end", "kl", "--calibration", "self"]
    assert sentence in refused(capsys, code, *start, *words, "--dry-run")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--method", "rtn", "--group-size", "0"], 2, "The group size 0 makes no groups."),
        (["--method", "rtn", "--group-size", "-5"], 2, "The group size -5 makes no groups."),
        (["--method", "rtn", "--bits", "5"], 2, "bits: Input should be 1, 2, 3, 4 or 8"),
        (["--method", "claq", "--bits", "8"], 2, "--method claq cannot take --bits 8"),
        (["--method", "ulb-sapr", "--saliency", "none-such"], 3, "There is no saliency artifact 'none-such'."),
    ],
)
def test_values_that_fit_no_model(words, code, sentence, capsys):
    assert main(["quantize", NO_MODEL, "--offline", *words, "--dry-run"]) == code
    told = capsys.readouterr().err
    assert sentence in told
    assert NO_MODEL not in told
