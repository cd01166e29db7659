"""The command ``saliency``: what it prints where, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ulbq.artifacts import read_manifest
from ulbq.commands.app import main


@pytest.fixture
def words(tiny_llama, tmp_path):
    tokens = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.randint(3, 250, (2, 16), dtype=torch.int32)}, tokens)
    out = ["-o", str(tmp_path / "s"), "--device", "cpu", "--offline"]
    return [
        "saliency",
        str(tiny_llama),
        "--calibration",
        str(tokens),
        "--samples",
        "2",
        "--sequence-length",
        "16",
        *out,
    ]


def test_the_path_goes_out_and_the_table_to_people(words, tmp_path, capsys):
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 's'}\n"
    manifest = read_manifest(tmp_path / "s")
    assert "mlp.down_proj" in captured.err
    assert "all weights together" in captured.err
    assert f"{manifest.top['0.1']:.1%}" in captured.err


def test_json_gives_the_manifest(words, tmp_path, capsys):
    assert main([*words, "--json", "--quiet", "--kind", "wanda", "--dtype", "fp16"]) == 0
    captured = capsys.readouterr()
    # What --quiet leaves: the samples of this test are few.
    (warning,) = captured.err.splitlines()
    assert warning.startswith("warning: The calibration holds 32 tokens")
    told = json.loads(captured.out)
    assert (told["kind"], told["score"], told["dtype"]) == ("saliency", "wanda", "fp16")
    assert told["digest"] == read_manifest(tmp_path / "s").digest


def test_a_dry_run_writes_nothing(words, tmp_path, capsys):
    assert main([*words, "--dry-run", "--activation-memory", "1M"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fisher, stored as bf16" in captured.err
    # A long path wraps.
    assert "2 × 16 tokens, seed 0" in " ".join(captured.err.split())
    assert "peak memory" in captured.err
    assert not (tmp_path / "s").exists()


def test_options_that_mean_nothing_are_refused(words, capsys):
    assert main([*words, "--kind", "magnitude"]) == 2
    assert "means nothing to --kind magnitude" in capsys.readouterr().err


def test_inspect_shows_the_scores(words, tmp_path, capsys):
    assert main([*words, "--quiet"]) == 0
    assert main(["inspect", str(tmp_path / "s"), "--verify", "--layers"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("model.layers.2.mlp.gate_proj") == 1
    assert "fisher, bf16" in captured.out
    assert main(["inspect", str(tmp_path / "s")]) == 0
    assert "model.layers.2.mlp.gate_proj" not in capsys.readouterr().out
