"""The command ``finetune``: what it shows and refuses before any work, and its options' names."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import save_tiny
from ulbq.commands.app import main


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


def test_what_is_typed_reaches_the_request(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    words = ["finetune", str(artifact), "--task", "end-to-end", "--loss", "ce-kl", "--data", "a.jsonl", "--epochs", "3"]
    words += ["--template", "alpaca", "--samples", "5", "--sequence-length", "32", "--train", "scales-zeros"]
    words += [
        "--lr-factor",
        "0.2",
        "--zero-lr",
        "0.5",
        "--gradient-accumulation",
        "4",
        "--clip",
        "2",
        "--no-checkpointing",
    ]
    words += ["--teacher", "cached", "--norm-lr", "0", "--precision", "bf16", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--activation-memory", "1G", "--offline", "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    request: dict[str, Any] = json.loads(captured.out)["request"]
    expected = {
        **{"method": "apiq", "adapter": False, "bits": 4, "group_size": 32, "symmetric": False, "epochs": 0},
        **{"end_to_end": "ce-kl", "end_to_end_data": "a.jsonl", "end_to_end_template": "alpaca", "calibration": None},
        **{"end_to_end_epochs": 3, "samples": 5, "sequence_length": 32, "end_to_end_train": "scales-zeros"},
        **{
            "end_to_end_lr_factor": 0.2,
            "end_to_end_zero_lr": 0.5,
            "gradient_accumulation": 4,
            "clip": 2,
            "checkpointing": False,
        },
        **{"teacher": "cached", "norm_lr": 0, "precision": "bf16", "seed": 3, "activation_memory": 2**30},
    }
    assert {name: request[name] for name in expected} == expected
    told = " ".join(captured.err.split())
    assert "ce-kl, data a.jsonl, template alpaca, epochs 3, lr factor 0.2, train scales-zeros, zero lr 0.5" in told
    assert "no-checkpointing, gradient accumulation 4, teacher cached" in told


def test_what_is_typed_for_a_task_reaches_the_request(
    artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n' * 20)
    words = ["finetune", str(artifact), "--task", "arithmetic", "--data", str(data), "--template", "chat"]
    words += ["--samples", "6", "--validation-samples", "3", "--sequence-length", "64", "--train", "adapter-scales"]
    words += ["--epochs", "4", "--batch-size", "2", "--micro-batch", "1", "--eval-every", "5", "--save-every", "7"]
    words += ["--no-checkpointing", "--clip", "0.5", "--precision", "fp32", "--adapter-lr", "0.1", "--warmup", "0"]
    words += [
        "--adapter-weight-decay",
        "0.2",
        "--scale-lr",
        "0.3",
        "--scale-weight-decay",
        "0.4",
        "--schedule",
        "constant",
    ]
    words += ["--rank", "3", "--alpha", "5", "--dora", "--dropout", "0.25", "--targets", "q_proj, o_proj"]
    words += ["--seed", "9", "--device", "cpu", "--offline", "-o", str(tmp_path / "ft")]
    assert main([*words, "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    plan: dict[str, Any] = json.loads(captured.out)
    expected = {
        **{"task": "arithmetic", "data": [str(data)], "template": "chat", "samples": 6, "validation_samples": 3},
        **{"sequence_length": 64, "train": "adapter-scales", "epochs": 4, "batch_size": 2, "micro_batch": 1},
        **{"eval_every": 5, "save_every": 7, "checkpointing": False, "clip": 0.5, "precision": "fp32"},
        **{"adapter_lr": 0.1, "warmup": 0, "adapter_weight_decay": 0.2, "scale_lr": 0.3, "scale_weight_decay": 0.4},
        **{"schedule": "constant", "rank": 3, "alpha": 5, "dora": True, "dropout": 0.25, "seed": 9},
        **{"targets": ["q_proj", "o_proj"]},
    }
    assert {name: plan["request"][name] for name in expected} == expected
    assert plan["request"]["recipe"]["name"] == "arithmetic"
    assert (plan["steps"], plan["linears"], plan["template"]) == (12, 6, "chat")
    assert plan["cost"]["peak_memory"] > plan["cost"]["training"] > 16 * plan["parameters"] - 1
    assert "DoRA, rank 3, alpha 5, dropout 0.25, on 6 layers, new" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_task_writes_its_artifact_and_nothing_but_the_path(
    artifact: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n' * 20)
    words = ["finetune", str(artifact), "--task", "instructions", "--data", str(data), "--rank", "1", "--device", "cpu"]
    words += ["--samples", "4", "--batch-size", "2", "--sequence-length", "64", "--epochs", "1", "--eval-every", "1"]
    assert main([*words, "-o", str(tmp_path / "ft"), "--offline"]) == 0
    captured = capfd.readouterr()
    assert captured.out == f"{tmp_path / 'ft'}\n"
    assert "Learning instructions: 2/2 done" in captured.err
    assert "warning" not in captured.err.lower()


def test_options_of_the_other_kind_and_unknown_tasks_are_refused(
    artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(capsys, 2, str(artifact), "--task", "knitting")
    assert "There is no task 'knitting'." in said
    assert "end-to-end, arithmetic, commonsense, gsm8k, instructions, wikitext2" in " ".join(said.split())
    assert "--task" in refused(capsys, 2, str(artifact))
    assert "no data of its own" in refused(capsys, 2, str(artifact), "--task", "instructions")
    said = refused(capsys, 2, str(artifact), "--task", "gsm8k", "--rate", "0.1")
    assert "--lr-factor means nothing to --task gsm8k." in said
    assert "--adapter-lr" in said
    said = refused(capsys, 2, str(artifact), "--task", "end-to-end", "--rank", "4")
    assert "--rank means nothing to --task end-to-end." in said
    assert "Take adapter" in refused(capsys, 2, str(artifact), "--task", "gsm8k", "--train", "all")
    assert "Take scales" in refused(capsys, 2, str(artifact), "--task", "end-to-end", "--train", "adapter")
    assert "cosine or constant" in refused(capsys, 2, str(artifact), "--task", "end-to-end", "--schedule", "linear")
    for option in ("--scale-lr", "--scale-weight-decay"):
        said = refused(capsys, 2, str(artifact), "--task", "gsm8k", option, "0.1")
        assert f"{option} means nothing where no scales train." in said
        assert "--train adapter-scales" in said
    words = ("--batch-size", "6", "--micro-batch", "4")
    assert "does not divide" in refused(capsys, 2, str(artifact), "--task", "gsm8k", *words)
    for task in ("end-to-end", "gsm8k"):
        assert "no quantized artifact" in refused(capsys, 3, str(artifact.parent / "m"), "--task", task)
    monkeypatch.chdir(tmp_path)
    assert "no finished artifact" in refused(capsys, 3, "--task", "end-to-end")


def test_tasks_are_listed_and_read_from_files(
    artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["finetune", "--list-tasks"]) == 0
    assert "gsm8k" in capsys.readouterr().out
    file = tmp_path / "own.yaml"
    file.write_text("name: own\ndescription: d\nsource: s\noptions:\n  rate: 1\n")
    assert "unknown option 'rate'" in refused(capsys, 2, str(artifact), "--task", str(file))
    file.write_text("name: own\noptions: {}\n")
    assert "is no task" in refused(capsys, 3, str(artifact), "--task", str(file))
    file.write_text("name: own\ndescription: d\nsource: s\noptions:\n  epochs: none\n")
    assert "'epochs' of task 'own'" in refused(capsys, 2, str(artifact), "--task", str(file))
    assert "no task file" in refused(capsys, 3, str(artifact), "--task", str(tmp_path / "other.yaml"))


def test_both_doors_call_the_samples_of_a_step_alike(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(artifact), "--task", "end-to-end", "--batch-size", "3", "--offline", "--dry-run"]
    assert main(["finetune", *words, "--data", "self", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["gradient_accumulation"] == 3
    assert "--gradient-accumulation and --batch-size are one setting" in refused(
        capsys, 2, *words, "--gradient-accumulation", "3"
    )


def test_errors_name_the_options_of_this_command(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(artifact), "--task", "end-to-end", "--offline", "--dry-run")
    said = " ".join(refused(capsys, 2, *words, "--loss", "kl-hidden", "--teacher", "cached").split())
    assert "--loss kl-hidden wants the hidden states too" in said
    assert "--loss kl." in said
    said = " ".join(refused(capsys, 2, *words, "--zero-lr", "1").split())
    assert "Add --train scales-zeros" in said
    assert "means nothing without --data" in " ".join(refused(capsys, 2, *words, "--template", "chat").split())
    assert "end-to-end-" not in said


@pytest.mark.parametrize("task", ["end-to-end", "instructions"])
def test_a_bad_line_is_a_sentence_and_nothing_is_written(
    artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, task: str
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    words = ["--samples", "1", "--sequence-length", "32", "-o", str(tmp_path / "out"), "--device", "cpu", "-q"]
    said = refused(capsys, 3, str(artifact), "--task", task, "--data", str(data), *words)
    assert f"{data}, line 2:" in "".join(said.split("\n")) or "line 2:" in said
    assert said.count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]
