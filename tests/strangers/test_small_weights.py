"""Weights below float16's range: refused, never stored as zeros; and errors that are told whatever the magnitude."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.told import Ulbq
from ulbq.formats.rounding import relative_error, vanishes

LAYER = "model.layers.1.self_attn.q_proj.weight"


def scaled(folder: Path, name: str, factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].float() * factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", ["rtn", "gptq", "db-llm", "claq", "apiq", "binary-mos", "efficientqat"])
@pytest.mark.parametrize("factor", [1e-9, 1e-30])
def test_a_layer_that_would_vanish_is_refused(
    method: str, factor: float, dense: Path, ulbq: Ulbq, tmp_path: Path
) -> None:
    scaled(dense, LAYER, factor)
    (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)))
    drawn = ["--samples", 2, "--sequence-length", 32, "--calibration", tmp_path / "text.txt"]
    trained = ["--epochs", 1] if method not in ("rtn", "gptq", "claq") else []
    told = ulbq("quantize", dense, "--method", method, *(drawn if method != "rtn" else []), *trained,
                "-o", tmp_path / "q", "-q")  # fmt: skip
    assert "too small for scales in float16" in told.refused(5)
    assert LAYER.removesuffix(".weight") in told.err


@pytest.mark.parametrize("factor", [0.0, 1e-2])
def test_zeros_and_small_weights_are_stored(factor: float, dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    scaled(dense, LAYER, factor)
    told = ulbq("quantize", dense, "--method", "rtn", "--bits", 4, "-o", tmp_path / "q", "-q")
    assert told.code == 0, told.err


@pytest.mark.parametrize(("name", "factor"), [(LAYER, 1e-7), ("model.embed_tokens.weight", 1e-7)])
@pytest.mark.parametrize("target", ["dense", "gguf"])
def test_a_conversion_does_not_lose_a_tensor(
    name: str, factor: float, target: str, dense: Path, ulbq: Ulbq, tmp_path: Path
) -> None:
    scaled(dense, name, factor)
    words = ("convert", dense, "--to", target, "-o", tmp_path / "c", "-q")
    assert f"'{name}' is too small for torch.float16" in ulbq(*words, "--dtype", "fp16").refused(5)
    assert ulbq(*words, "--dtype", "bf16", "--force").code == 0


def test_errors_of_any_magnitude() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    for factor in (1e30, 1.0, 1e-20, 1e-37):
        assert relative_error(weight * factor, torch.zeros(8, 8)) == 1
        assert relative_error(weight * factor, weight * factor) == 0
        assert relative_error(weight * factor, weight * factor * 1.5) == pytest.approx(0.25, rel=1e-4)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.zeros(2, 2), torch.ones(2, 2)) == float("inf")
    assert vanishes(weight * 1e-7, (weight * 1e-7).half())
    assert not vanishes(weight, weight.half())
    assert not vanishes(weight, weight.bfloat16())


@pytest.mark.parametrize("rate", ["1e38", "1e300"])
def test_rates_beyond_all_are_usage_errors(rate: str, packed: Path, dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say", "output": "it"}\n' * 8)
    data = ("--data", tmp_path / "rows.jsonl", "--samples", 4, "--sequence-length", 64, "-o", tmp_path / "out")
    assert "adapter" in ulbq("finetune", packed, "--task", "instructions", "--adapter-lr", rate, *data).refused(2)
    told = ulbq("quantize", dense, "--method", "efficientqat", "--weight-lr", rate, "-o", tmp_path / "out")
    assert "weight-lr" in told.refused(2)


def test_a_rate_that_ruins_the_numbers_is_told(packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say", "output": "it"}\n' * 8)
    data = ("--data", tmp_path / "rows.jsonl", "--samples", 4, "--sequence-length", 64, "-o", tmp_path / "out")
    ulbq("finetune", packed, "--task", "instructions", "--adapter-lr", "1e9", *data, "-q").refused(5)


def test_wide_checkpoints_are_stored_in_half_precision(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    told = ulbq("quantize", dense, "--method", "rtn", "--bits", 4, "-o", tmp_path / "q", "-q")
    assert told.code == 0, told.err
    outer = load_file(tmp_path / "q" / "model-outer.safetensors")
    assert {tensor.dtype for tensor in outer.values()} == {torch.bfloat16}
