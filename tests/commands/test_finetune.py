"""The command ``finetune``: what it shows and refuses before any work, and its options' names."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.models.tiny import save_tiny
from ulbq.commands.app import app, main
from ulbq.pipeline.request import QuantizeRequest


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = save_tiny("llama", folder / "m")
    assert main(["quantize", str(source), "--method", "rtn", "--group-size", "32", "-o", str(folder / "q"), "-q"]) == 0
    return folder / "q"


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(["finetune", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_what_is_typed_reaches_the_request(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", str(artifact), "--task", "end-to-end", "--loss", "ce-kl", "--data", "a.jsonl", "--epochs", "3"]
    words += ["--template", "alpaca", "--samples", "5", "--sequence-length", "32", "--train", "scales-zeros"]
    words += ["--rate", "0.2", "--zero-rate", "0.5", "--accumulation", "4", "--clip", "2", "--no-checkpointing"]
    words += ["--teacher", "cached", "--norm-rate", "0", "--precision", "bf16", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--activation-memory", "1G", "--offline", "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    request: dict[str, Any] = json.loads(captured.out)["request"]
    expected = {
        **{"method": "apiq", "adapter": False, "bits": 4, "group_size": 32, "symmetric": False, "epochs": 0},
        **{"end_to_end": "ce-kl", "end_to_end_data": "a.jsonl", "end_to_end_template": "alpaca", "calibration": None},
        **{"end_to_end_epochs": 3, "samples": 5, "sequence_length": 32, "end_to_end_train": "scales-zeros"},
        **{"end_to_end_rate": 0.2, "end_to_end_zero_rate": 0.5, "accumulation": 4, "clip": 2, "checkpointing": False},
        **{"teacher": "cached", "norm_rate": 0, "precision": "bf16", "seed": 3, "activation_memory": 2**30},
    }
    assert {name: request[name] for name in expected} == expected
    assert "ce-kl on a.jsonl, 5 × 32 tokens, 3 epochs, 4 samples a step, trains scales-zeros" in captured.err


def test_every_option_is_one_of_a_request_or_of_all_commands() -> None:
    from ulbq.commands import finetune

    group: Any = typer.main.get_command(app)
    names = {parameter.name for parameter in group.commands["finetune"].params}
    fields = {
        finetune._FIELDS.get(name, name) for name in names - {"task", "dry_run", "json", "quiet", "debug", "help"}
    }
    assert fields <= QuantizeRequest.model_fields.keys()


def test_other_tasks_and_other_sources_are_a_sentence(
    artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(capsys, 2, str(artifact), "--task", "gsm8k")
    assert "There is no task 'gsm8k'." in said
    assert "Tasks: end-to-end." in said
    assert "--task" in refused(capsys, 2, str(artifact))
    assert "no quantized artifact" in refused(capsys, 3, str(artifact.parent / "m"), "--task", "end-to-end")
    monkeypatch.chdir(tmp_path)
    assert "holds no finished artifact" in refused(capsys, 3, "--task", "end-to-end")


def test_errors_name_the_options_of_this_command(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(artifact), "--task", "end-to-end", "--offline", "--dry-run")
    said = " ".join(refused(capsys, 2, *words, "--loss", "kl-hidden", "--teacher", "cached").split())
    assert "--loss kl-hidden wants the hidden states too" in said
    assert "--loss kl." in said
    said = " ".join(refused(capsys, 2, *words, "--zero-rate", "1").split())
    assert "Add --train scales-zeros" in said
    assert "means nothing without --data" in " ".join(refused(capsys, 2, *words, "--template", "chat").split())
    assert "end-to-end-" not in said


def test_a_bad_line_is_a_sentence_and_nothing_is_written(
    artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    words = ["--samples", "1", "--sequence-length", "32", "-o", str(tmp_path / "out"), "--device", "cpu", "-q"]
    said = refused(capsys, 3, str(artifact), "--task", "end-to-end", "--data", str(data), *words)
    assert f"{data}, line 2:" in "".join(said.split("\n")) or "line 2:" in said
    assert said.count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]
