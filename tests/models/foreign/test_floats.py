"""Floats of eight and four bits are read as transformers and compressed-tensors dequantize them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.models.foreign.float_folders import eight_bits, pairs, save_deepseek_v4, save_fp8, save_mxfp4
from tests.models.foreign.packing import LAYER, change, read_back, refused, save_packed, some_scales
from ulbq.errors import InputError
from ulbq.models.foreign.floats import decode, read_mxfp4
from ulbq.models.source import resolve

EVEN = (16, 32)
Made = tuple[dict[str, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("kind", ["blocks", "one scale", "exponents", "mxfp4", "fp4"])
def test_every_parameter_is_what_transformers_dequantizes(kind: str, tmp_path: Path) -> None:
    said: Any
    if kind == "mxfp4":
        folder, said = save_mxfp4(tmp_path), Mxfp4Config(dequantize=True)
    elif kind == "fp4":
        folder = save_deepseek_v4(tmp_path)
        said = FineGrainedFP8Config(dequantize=True, weight_block_size=EVEN, scale_fmt="ue8m0", expert_dtype="fp4")
    else:
        block = None if kind == "one scale" else EVEN
        family = "qwen3_moe" if kind == "blocks" else "qwen3"
        folder = save_fp8(family, tmp_path, block=block, exponents=kind == "exponents")
        said = FineGrainedFP8Config(dequantize=True, weight_block_size=block)
    source = resolve(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=said, dtype=torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(source.read(name).to(parameter.dtype), parameter), name
    # Of the tiny DeepSeek-V4 a third is in eight bits.
    name, bits = {"mxfp4": ("MXFP4", 4.25), "fp4": ("MXFP4", 5.64)}.get(kind, ("FP8", 8))
    assert source.stored_as == (name, pytest.approx(bits, rel=0.01))
    assert getattr(source.config, "quantization_config", None) is None
    source.check_parent()


@pytest.mark.parametrize("shape", [(50, 70), (3, 50, 70)])
def test_blocks_that_do_not_divide_a_matrix(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand((*shape[:-2], 3, 2), generator=generator)
    expected = _dequantize_fp8_weight(codes, scales, [24, 48], torch.float32)
    found = decode({"weight": codes, "weight_scale": scales}, (24, 48), torch.bfloat16)
    assert torch.equal(found, expected.bfloat16())


def test_a_block_that_is_larger_than_any_matrix() -> None:
    codes = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    found = decode({"weight": codes, "weight_scale": torch.tensor([[2.0]])}, (10**12, 10**12))
    assert torch.equal(found, codes.float() * 2)


def test_a_scale_for_each_of_several_matrices() -> None:
    codes = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    found = decode({"weight": codes, "weight_scale": torch.tensor([1.0, 2.0, 4.0])}, (4, 5))
    assert torch.equal(found, codes.float() * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1))


def test_words_of_four_bits_by_hand(tmp_path: Path) -> None:
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 0] = 0xF1  # 0.5, then -6; both doubled
    tensors = {"weight": codes, "weight_scale": torch.tensor([[128]], dtype=torch.uint8)}
    assert decode(tensors, (1, 32)).flatten().tolist() == [1.0, -12.0, *[0.0] * 30]
    every = torch.arange(256, dtype=torch.uint8).view(2, 4, 2, 16)
    scales = torch.randint(0, 255, (2, 4, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    source = resolve(save_mxfp4(tmp_path))
    assert source.stored is not None
    _, weight = next(read_mxfp4(source.stored._packed, {}))  # type: ignore[attr-defined]
    assert torch.equal(weight.decode({"blocks": every, "scales": scales}), convert_moe_packed_tensors(every, scales))


def nvfp4(rows: int, columns: int, *, divided: bool) -> Made:
    """E2M1 in groups of 16 with float8 scales of their own scale: NVIDIA's, or compressed-tensors'."""
    codes, values = pairs(rows, columns)
    scales = (some_scales(rows, columns // 16).abs().float() * 4000).to(torch.float8_e4m3fn)
    whole = torch.tensor([512.0]) if divided else torch.tensor(2.0**-9)
    wide = (scales.float() / 512).repeat_interleave(16, 1)
    if divided:
        return {".weight_packed": codes, ".weight_scale": scales, ".weight_global_scale": whole}, values * wide
    return {".weight": codes, ".weight_scale": scales, ".weight_scale_2": whole, ".input_scale": whole}, values * wide


def mxfp4(rows: int, columns: int) -> Made:
    """E2M1 in groups of 32 with powers of two, as compressed-tensors has it."""
    codes, values = pairs(rows, columns)
    powers = torch.randint(110, 126, (rows, columns // 32), generator=torch.Generator().manual_seed(2)).byte()
    wide = torch.exp2(powers.float() - 127).repeat_interleave(32, 1)
    return {".weight_packed": codes, ".weight_scale": powers}, values * wide


def mxfp8(rows: int, columns: int) -> Made:
    """Float8 in groups of 32 with powers of two."""
    codes = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    powers = mxfp4(rows, columns)[0][".weight_scale"]
    wide = torch.exp2(powers.float() - 127).repeat_interleave(32, 1)
    return {".weight": codes, ".weight_scale": powers}, codes.float() * wide


def fp8(rows: int, columns: int, *, block: tuple[int, int] | None = None) -> Made:
    """Float8 with a scale for the whole, or for each row."""
    codes, scales = eight_bits(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)), block)
    return {".weight": codes, ".weight_scale": scales, ".input_scale": torch.tensor(1.0)}, codes.float() * scales


def library(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True} | weights, "format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[int, int], Made], str, float]] = {
    "NVIDIA's NVFP4": (MODELOPT, lambda *shape: nvfp4(*shape, divided=False), "ModelOpt NVFP4", 4.5),
    "NVIDIA's FP8": ({**MODELOPT, "quant_algo": "FP8"}, fp8, "ModelOpt FP8", 8),
    "a row of FBGEMM": (
        {"quant_method": "fbgemm_fp8"},
        lambda rows, columns: fp8(rows, columns, block=(1, columns)),
        "FBGEMM FP8",
        8.4,
    ),
    "FP8": (library("float-quantized", num_bits=8, strategy="tensor"), fp8, "compressed-tensors FP8", 8),
    "NVFP4": (
        library("nvfp4-pack-quantized", num_bits=4, group_size=16, strategy="tensor_group"),
        lambda *shape: nvfp4(*shape, divided=True),
        "compressed-tensors NVFP4",
        4.5,
    ),
    "MXFP4": (
        library("mxfp4-pack-quantized", num_bits=4, group_size=32, strategy="group"),
        mxfp4,
        "compressed-tensors MXFP4",
        4.25,
    ),
    "MXFP8": (
        library("mxfp8-quantized", num_bits=8, group_size=32, strategy="group"),
        mxfp8,
        "compressed-tensors MXFP8",
        8.25,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_beside_a_weight(layout: str, tmp_path: Path) -> None:
    said, pack, name, bits = LAYOUTS[layout]
    source = read_back(tmp_path, save_packed(tmp_path, said, pack))
    assert source.stored_as == (name, pytest.approx(bits, rel=0.05))
    source.check_parent()


@pytest.mark.parametrize("layout", ["FP8", "NVFP4", "MXFP4", "MXFP8"])
def test_the_library_itself_decompresses_to_the_same(layout: str, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    said, pack, *_ = LAYOUTS[layout]
    save_packed(tmp_path, said, pack)
    tensors = {short[1:]: tensor for short, tensor in pack(64, 64)[0].items()}
    scheme = quantization.QuantizationConfig.model_validate(said).config_groups["group_0"]
    found = compressors.BaseCompressor.get_value_from_registry(said["format"]).decompress(tensors, scheme)["weight"]
    # It computes in bfloat16.
    torch.testing.assert_close(resolve(tmp_path).read(f"{LAYER}.weight"), found.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("layout", "damage"),
    [
        ("NVIDIA's NVFP4", {"weight_scale_2": None}),
        ("NVIDIA's NVFP4", {"weight_scale_2": torch.ones(2)}),
        ("NVIDIA's NVFP4", {"weight_scale": torch.ones(64, 5)}),
        ("NVIDIA's FP8", {"weight": torch.ones(64, 64)}),
        ("NVIDIA's FP8", {"weight": None}),
        ("NVIDIA's FP8", {"weight_scale": torch.ones(3, 1)}),
        ("NVIDIA's FP8", {"weight_scale": torch.ones(64, 0)}),
        ("a row of FBGEMM", {"weight": torch.ones(64).to(torch.float8_e4m3fn)}),
        ("NVFP4", {"weight_packed": torch.ones(64, 0).byte()}),
        ("MXFP4", {"weight_scale": torch.ones(64, 3).byte()}),
    ],
)
def test_parts_that_do_not_fit(layout: str, damage: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    said, pack, *_ = LAYOUTS[layout]
    save_packed(tmp_path, said, pack)
    refused(tmp_path, "stored otherwise than", damage)


def test_integers_of_nvidia_are_named(tmp_path: Path) -> None:
    save_packed(tmp_path, MODELOPT | {"quant_algo": "W4A16_AWQ"}, mxfp8)
    refused(tmp_path, "ModelOpt in the layout 'W4A16_AWQ'")


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
    change(save_fp8("qwen3", tmp_path, block=EVEN), {name: tensor})
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [(f"{GATE}_scales", None), (f"{GATE}_scales", torch.ones(4, 64, 1).byte()), (f"{GATE}_blocks", torch.ones(4))],
)
def test_damaged_mxfp4(name: str, tensor: torch.Tensor | None, tmp_path: Path) -> None:
    change(save_mxfp4(tmp_path), {name: tensor})
    refused(tmp_path, "stored otherwise than MXFP4")


@pytest.mark.parametrize("block", [128, [128], [128, 0], ["a", 1]])
def test_a_block_that_is_none(block: Any, tmp_path: Path) -> None:
    config = save_fp8("qwen3", tmp_path) / "config.json"
    read = json.loads(config.read_text())
    read["quantization_config"]["weight_block_size"] = block
    config.write_text(json.dumps(read))
    with pytest.raises(InputError, match="weight_block_size"):
        resolve(tmp_path)
