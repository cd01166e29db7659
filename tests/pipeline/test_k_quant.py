"""Scales in two levels, from the weights to llama.cpp's file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import save_tiny
from tests.pipeline.runs import TOKENS, logits, request, simulated_logits
from ulbq.config.convert import ConvertRequest
from ulbq.config.methods import GptqOptions
from ulbq.errors import InputError, UsageError
from ulbq.models.gguf_header import read_header
from ulbq.pipeline.convert import convert
from ulbq.pipeline.finetune import end_to_end_request
from ulbq.pipeline.quantize import quantize

BITS = {2: 2.625, 3: 3.4375, 4: 4.5}
HOW: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "efficientqat": {"method": "efficientqat", "epochs": 1},
    "efficientqat from gptq": {"method": "efficientqat", "start": "gptq", "epochs": 1},
}


def _wide() -> None:
    save_tiny("llama", Path("dense"), hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)
    drawn = torch.randint(3, 250, (40, 48), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": drawn.int()}, "tokens.safetensors")


@pytest.fixture
def wide(made_once: Callable[..., Path]) -> Path:
    return made_once(_wide)


def packed(wide: Path, out: Path, how: str, bits: int = 2) -> Path:
    drawn = {"calibration": str(wide / "tokens.safetensors"), "samples": 36, "sequence_length": 48, "precision": "fp32"}
    options = HOW[how] | ({} if how == "rtn" else drawn)
    path, manifest = quantize(request(wide / "dense", out, k_quant=True, bits=bits, **options))
    assert manifest.bits.bits_per_weight == BITS[bits]
    return path


@pytest.mark.parametrize(
    ("how", "bits"), [*((how, 2) for how in HOW), ("rtn", 3), ("gptq", 3), ("rtn", 4), ("gptq", 4)]
)
def test_the_file_for_llama_cpp_holds_the_artifacts_own_weights(
    how: str, bits: int, wide: Path, tmp_path: Path
) -> None:
    source = packed(wide, tmp_path / "q", how, bits)
    assert torch.allclose(logits(source), simulated_logits(wide / "dense", source), atol=1e-4)
    path, _ = convert(ConvertRequest(source=str(source), to="gguf", dtype="fp32", out=tmp_path / "g"))
    kinds = {one.kind.name for name, one in read_header(path / "model.gguf").tensors.items() if "ffn_down" in name}
    assert kinds == {f"Q{bits}_K"}
    torch.testing.assert_close(logits(path / "model.gguf"), logits(source), atol=1e-4, rtol=0)


def test_the_factors_learn_end_to_end(wide: Path, tmp_path: Path) -> None:
    first = packed(wide, tmp_path / "first", "gptq")
    asked = {"end_to_end": "ce", "end_to_end_epochs": 2, "end_to_end_data": str(wide / "tokens.safetensors")}
    size = {"samples": 8, "sequence_length": 48, "precision": "fp32", "device": "cpu", "offline": True}
    path, manifest = quantize(end_to_end_request(str(first), {**asked, **size, "out": tmp_path / "second"}))
    assert manifest.method == "gptq"
    before, after = (load_file(folder / "model-block-00001.safetensors") for folder in (first, path))
    moved = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert {"scales", "minima"} <= moved
    assert not moved & {"codes", "sub_scales", "sub_minima"}


def test_widths_that_256_does_not_divide_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="super-blocks of 256 do not divide its 64 inputs") as refused:
        quantize(request(tiny_llama, tmp_path / "q", method="rtn", k_quant=True, bits=2))
    assert "without `k_quant`" in refused.value.hint
    assert not (tmp_path / "q").exists()


def test_a_request_of_a_manifest_is_the_same_run(wide: Path, tmp_path: Path) -> None:
    source = packed(wide, tmp_path / "q", "rtn")
    again, _ = quantize(request(wide / "dense", tmp_path / "r", method="rtn", k_quant=True, bits=2, group_size=16))
    assert torch.equal(logits(again, TOKENS), logits(source, TOKENS))


def test_no_budget_gives_out_k_types() -> None:
    with pytest.raises(UsageError, match="not of K types"):
        GptqOptions(k_quant=True, bits=2, target_bits=2.5)
