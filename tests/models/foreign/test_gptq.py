"""GPTQ's words, v1 and v2, with and without act-order, and AutoRound's names for them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.foreign.packing import (
    LAYER,
    LAYERS,
    along,
    awq,
    change,
    down,
    gptq,
    read_back,
    refused,
    save_packed,
    say,
    some_codes,
    some_scales,
    stream,
)
from ulbq.errors import InputError
from ulbq.models.foreign import gptq as reader
from ulbq.models.source import resolve

Q = f"{LAYER}.weight"
SAID = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_is_what_its_words_say(bits: int, version: str | None, order: bool, tmp_path: Path) -> None:
    pack = partial(gptq, bits=bits, v1=version != "gptq_v2", order=order)
    said: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "desc_act": order}
    weights = save_packed(tmp_path, said | ({"checkpoint_format": version} if version else {}), pack)
    source = resolve(tmp_path)
    assert len(weights) == 3 * len(LAYERS)
    for name, weight in weights.items():
        assert torch.equal(source.read(name), weight), name
    # Codes, and for each group of 32 a zero point and a scale; an index of 32 bits for each input.
    exact = sum(w.numel() * (bits + (bits + 16) / 32) + 32 * w.shape[1] for w in weights.values())
    assert source.stored_as == (f"GPTQ w{bits}g32", pytest.approx(exact / sum(w.numel() for w in weights.values())))


def test_words_by_hand() -> None:
    # The fields of a word from the lowest on: codes 0 to 7 of eight inputs, twice.
    words = torch.tensor([[0x76543210 - (0x76543210 >> 31 << 32)]] * 4, dtype=torch.int32)
    tensors = {
        "qweight": words.expand(4, 8).contiguous(),
        "qzeros": torch.tensor([[0x33333333], [0x77777777]], dtype=torch.int32),
        "scales": torch.tensor([[0.5], [2.0]]).half().expand(2, 8),
        "g_idx": torch.tensor([0, 1] * 16, dtype=torch.int32),
    }
    row = reader.decode(tensors, 4, v1=True)[3].tolist()
    assert row[:8] == [-2.0, -14.0, -1.0, -10.0, 0.0, -6.0, 1.0, -2.0]  # even inputs (q − 4)/2, odd ones (q − 8)·2
    assert reader.decode(tensors, 4, v1=False)[3, :2].tolist() == [-1.5, -12.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_zero_in_v1_as_gptqmodel_writes_them(bits: int) -> None:
    """It takes a one from each field of a word at once, so that one of zero borrows from its neighbour."""
    zeros = torch.tensor([[0, 1, 0, 0, 3, 2, 1, 0] * 4])
    words = along(zeros, bits) - torch.tensor([stream([1] * 32, bits)], dtype=torch.int32)
    codes = torch.zeros(32, 32, dtype=torch.long)
    tensors = {"qweight": down(codes, bits), "qzeros": words, "scales": torch.ones(1, 32).half()}
    tensors["g_idx"] = torch.zeros(32, dtype=torch.int32)
    assert torch.equal(reader.decode(tensors, bits, v1=True)[:, 0], -zeros[0].float())


def test_a_zero_point_of_zero_at_three_bits_is_one_that_ran_over() -> None:
    zeros = torch.tensor([[0, 5, 7, 1] * 8])
    tensors = {"qweight": down(torch.zeros(32, 32).long(), 3), "qzeros": along((zeros - 1) % 8, 3)}
    tensors |= {"scales": torch.ones(1, 32).half(), "g_idx": torch.zeros(32, dtype=torch.int32)}
    assert torch.equal(reader.decode(tensors, 3, v1=True)[:, 0], -zeros[0].float())


def test_symmetric_layers_in_v1_have_one_zero_point_whatever_is_stored(tmp_path: Path) -> None:
    said = {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": True}
    weights = save_packed(tmp_path, said, partial(gptq, bits=3))
    scales = some_scales(2, 64).float().repeat_interleave(32, 0)
    assert torch.equal(resolve(tmp_path).read(Q), ((some_codes(3, 64, 64) - 4) * scales).T)
    # Where a layer may be another, all are taken at their word.
    say(tmp_path, quantization_config=said | {"dynamic": {"+:.*down_proj": {"sym": False}}})
    assert torch.equal(resolve(tmp_path).read(Q), weights[Q])


@pytest.mark.parametrize("size", [32, 48])
def test_without_an_index_the_group_size_says_it(size: int, tmp_path: Path) -> None:
    """48 does not divide 64 inputs: the second group has 16."""
    said = {"quant_method": "gptq", "bits": 4, "group_size": size, "checkpoint_format": "gptq_v2"}
    weights = save_packed(tmp_path, said, partial(gptq, group=size, v1=False, index=False))
    read_back(tmp_path, weights)


@pytest.mark.parametrize(("layout", "v1"), [("auto_round:auto_gptq", True), ("auto_round", False), (None, True)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_auto_round_names_the_version(layout: str | None, v1: bool, bits: int, tmp_path: Path) -> None:
    said: dict[str, Any] = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": False}
    said |= {"packing_format": layout} if layout else {}
    weights = save_packed(tmp_path, said, partial(gptq, bits=bits, v1=v1, index=False))
    source = read_back(tmp_path, weights)
    assert source.stored_as is not None
    assert source.stored_as[0] == f"AutoRound w{bits}g32"


def test_auto_round_with_the_words_of_awq(tmp_path: Path) -> None:
    said = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"}
    weights = save_packed(tmp_path, said, awq)
    read_back(tmp_path, weights)


def test_single_experts_are_read_and_fused(tmp_path: Path) -> None:
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    weights = save_packed(tmp_path, said, gptq, family="qwen3_moe")
    source = resolve(tmp_path)
    fused = source.read("model.layers.1.mlp.experts.gate_up_proj")
    gate, up = (weights[f"model.layers.1.mlp.experts.2.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(fused[2], torch.cat((gate, up)))


def test_a_bias_of_zeros_that_the_model_has_not_is_none(tmp_path: Path) -> None:
    """AutoGPTQ gave one to every layer."""
    save_packed(tmp_path, SAID, gptq)
    change(tmp_path, {f"{LAYER}.bias": torch.zeros(64)})
    assert f"{LAYER}.bias" not in resolve(tmp_path).names
    change(tmp_path, {f"{LAYER}.bias": torch.ones(64)})
    refused(tmp_path, "no place for")


def test_the_file_of_older_tools_says_it_too(tmp_path: Path) -> None:
    weights = save_packed(tmp_path, {}, gptq)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": False}))
    assert torch.equal(resolve(tmp_path).read(Q), weights[Q])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoint_format": "marlin"}, "GPTQ in the layout 'marlin"),
        ({"is_marlin_format": True}, "'marlin"),
        ({"pack_dtype": "int16"}, "int16"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}, "llm_compressor"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "mx_fp"),
        ({"quant_method": "auto-round", "rotation_config": {"a": 1}}, "rotations"),
        ({"quant_method": "auto-round", "extra_config": [1]}, "'extra_config' in config.json"),
        ({"dynamic": "all"}, "'dynamic' in config.json"),
    ],
)
def test_layouts_that_are_not_read_are_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_packed(tmp_path, SAID | changes, gptq)
    refused(tmp_path, named)


@pytest.mark.parametrize(
    "damage",
    [
        {"qzeros": None},
        {"scales": None},
        {"scales": torch.ones(2, 64).int()},
        {"scales": torch.ones(4, 64).half()},
        {"scales": torch.ones(0, 64).half(), "qzeros": torch.ones(0, 8).int()},
        {"qzeros": torch.ones(2, 9).int()},
        {"qweight": torch.ones(8, 64)},
        {"qweight": torch.ones(8).int()},
        {"g_idx": torch.zeros(60).int()},
        {"g_idx": torch.zeros(64)},
    ],
)
def test_parts_that_do_not_fit(damage: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    save_packed(tmp_path, SAID, gptq)
    refused(tmp_path, "stored otherwise than GPTQ", damage)


def test_an_input_of_no_group(tmp_path: Path) -> None:
    save_packed(tmp_path, SAID, gptq)
    change(tmp_path, {f"{LAYER}.g_idx": torch.full((64,), 2).int()})
    with pytest.raises(InputError, match="stored otherwise than GPTQ"):
        resolve(tmp_path).read(Q)
