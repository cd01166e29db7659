"""FP8 and MXFP4 checkpoints are read as transformers dequantizes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.models.scaled_folders import save_fp8, save_mxfp4
from ulbq.errors import InputError
from ulbq.models.scaled import eight_bits, four_bits
from ulbq.models.source import resolve

EVEN = (16, 32)


@pytest.mark.parametrize("kind", ["blocks", "one scale", "exponents", "mxfp4"])
def test_every_parameter_is_what_transformers_dequantizes(kind: str, tmp_path: Path) -> None:
    said: Any
    if kind == "mxfp4":
        folder, said = save_mxfp4(tmp_path), Mxfp4Config(dequantize=True)
    else:
        block = None if kind == "one scale" else EVEN
        family = "qwen3_moe" if kind == "blocks" else "qwen3"
        folder = save_fp8(family, tmp_path, block=block, exponents=kind == "exponents")
        said = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    source = resolve(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype=torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(source.read(name), parameter), name
    assert source.stored_as is not None
    assert source.stored_as[0] == ("MXFP4" if kind == "mxfp4" else "FP8")
    assert source.stored_as[1] == pytest.approx(4.25 if kind == "mxfp4" else 8, rel=0.01)
    assert getattr(source.config, "quantization_config", None) is None


@pytest.mark.parametrize("shape", [(50, 70), (3, 50, 70)])
def test_blocks_that_do_not_divide_a_matrix(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand((*shape[:-2], 3, 2), generator=generator)
    expected = _dequantize_fp8_weight(codes, scales, [24, 48], torch.float32)
    assert torch.equal(eight_bits(codes, scales, (24, 48)), expected.bfloat16())


def test_a_scale_for_each_of_several_matrices() -> None:
    codes = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.tensor([1.0, 2.0, 4.0])
    assert torch.equal(eight_bits(codes, scales, None), (codes.float() * scales.view(3, 1, 1)).bfloat16())


def test_words_of_mxfp4_by_hand() -> None:
    blocks, scales = torch.zeros(1, 1, 1, 16, dtype=torch.uint8), torch.tensor([[[128]]], dtype=torch.uint8)
    blocks[..., 0] = 0xF1  # 0.5, then -6; both doubled
    assert four_bits(blocks, scales).flatten().tolist() == [1.0, -12.0, *[0.0] * 30]
    every = torch.arange(256, dtype=torch.uint8).view(2, 4, 2, 16)
    scales = torch.randint(0, 255, (2, 4, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(four_bits(every, scales), convert_moe_packed_tensors(every, scales))


def _change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    stored = load_file(folder / "model.safetensors")
    stored.pop(name)
    save_file(stored | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"
GATE = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}_scale_inv", torch.ones(2, 2), "stored otherwise than FP8"),
        (f"{Q}_scale_inv", torch.ones(8, 2).long(), "stored otherwise than FP8"),
        (f"{Q}_scale_inv", None, "eight-bit floats"),
        (Q, torch.ones(128, 64), "stored otherwise than FP8"),
    ],
)
def test_damaged_fp8(name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    _change(save_fp8("qwen3", tmp_path, block=EVEN), name, tensor)
    with pytest.raises(InputError, match=message):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [(f"{GATE}_scales", None), (f"{GATE}_scales", torch.ones(4, 64, 1).byte()), (f"{GATE}_blocks", torch.ones(4))],
)
def test_damaged_mxfp4(name: str, tensor: torch.Tensor | None, tmp_path: Path) -> None:
    _change(save_mxfp4(tmp_path), name, tensor)
    with pytest.raises(InputError, match="stored otherwise than MXFP4"):
        resolve(tmp_path)


@pytest.mark.parametrize("block", [128, [128], [128, 0], ["a", 1]])
def test_a_block_that_is_none(block: Any, tmp_path: Path) -> None:
    config = save_fp8("qwen3", tmp_path) / "config.json"
    read = json.loads(config.read_text())
    read["quantization_config"]["weight_block_size"] = block
    config.write_text(json.dumps(read))
    with pytest.raises(InputError, match="weight_block_size"):
        resolve(tmp_path)
