"""Whole runs of the methods that make errors good column by column, on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import save_tiny
from tests.pipeline.runs import StopAt, logits, request, shards, simulated_logits
from ulbq.artifacts.whole import verify
from ulbq.config.quantize import QuantizeRequest
from ulbq.pipeline.quantize import plan, quantize


def asked(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    size = {"samples": 8, "sequence_length": 32, "precision": "fp32", "group_size": 32, "bits": 3}
    return request(source, out, **{"method": "gptq", "calibration": str(samples), **size, **changes})


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "mixtral", "deepseek"])
def test_families_are_packed_and_reload_to_the_simulated_model(
    family: str,
    samples: Path,
    tmp_path: Path,
) -> None:
    dense = save_tiny(family, tmp_path / family, num_hidden_layers=2)
    path, manifest = quantize(asked(dense, tmp_path / "q", samples))
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    assert manifest.method == "gptq"
    assert manifest.bits.bits_per_weight == pytest.approx(3 + (16 + 3) / 32)
    assert manifest.blocks == ()
    assert all(0 < layer.error < 0.5 for layer in manifest.layers)
    verify(path)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_comes_closer_than_rounding(bits: int, tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    tokens = load_file(samples)["tokens"][:8].long()
    exact = logits(tiny_llama, tokens)
    path, _ = quantize(asked(tiny_llama, tmp_path / "q", samples, bits=bits))
    rounded, _ = quantize(request(tiny_llama, tmp_path / "r", method="rtn", bits=bits, group_size=32))
    assert (logits(path, tokens) - exact).norm() < 0.9 * (logits(rounded, tokens) - exact).norm()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    straight, _ = quantize(asked(tiny_llama, tmp_path / "straight", samples))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked(tiny_llama, out, samples), StopAt(out, 1))
    resumed, _ = quantize(asked(tiny_llama, out, samples))
    assert shards(resumed) == shards(straight)
    disk, _ = quantize(asked(tiny_llama, tmp_path / "disk", samples, activation_memory=0))
    assert shards(disk) == shards(straight)


def test_every_option_reaches_the_weights(samples: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "symmetric": {"symmetric": True},
        "one pass": {"true_sequential": False},
        "order": {"act_order": False},
        "search": {"search": False},
        "damping": {"damping": 0.1},
        "tokens": {"token_weighting": "uniform"},
    }
    made = {}
    for name, changes in variants.items():
        folder, _ = quantize(asked(dense, tmp_path / name, samples, **changes))
        made[name] = (folder / "model-block-00000.safetensors").read_bytes()
    assert len(set(made.values())) == len(variants)


def test_the_plan_counts_the_second_moments(samples: Path, tmp_path: Path) -> None:
    wide = save_tiny("llama", tmp_path / "wide", intermediate_size=2048, num_hidden_layers=1)

    def peak(**changes: Any) -> int:
        return plan(asked(wide, tmp_path / "q", samples, **changes)).cost.peak_memory

    one, whole = peak(), peak(true_sequential=False)
    assert whole - one == pytest.approx(4 * 3 * 64**2, abs=2**21)
    few = {"samples": 1, "sequence_length": 16, "group_size": 32}
    trained = plan(request(wide, tmp_path / "t", method="apiq", calibration=str(samples), adapter=False, **few))
    assert one - trained.cost.peak_memory > 4 * 2048**2
