"""Experts in a GGUF file: one tensor a projection, as llama.cpp has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from tests.models.tiny import save_tiny
from tests.pipeline.runs import logits, request
from ulbq import formats
from ulbq.config.convert import ConvertRequest
from ulbq.errors import InputError
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize

CHANGES: dict[str, dict[str, Any]] = {"qwen2_moe": {}, "qwen3_moe": {"norm_topk_prob": True}, "mixtral": {}}


def as_gguf(source: Path, out: Path) -> Path:
    path, _ = convert(ConvertRequest(source=str(source), to="gguf", dtype="fp32", out=out))
    return path / "model.gguf"


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_dense_and_packed_files_read_back_as_the_model(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense", **CHANGES[family])
    torch.testing.assert_close(logits(as_gguf(dense, tmp_path / "g")), logits(dense), atol=2e-5, rtol=1e-5)
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
    torch.testing.assert_close(logits(as_gguf(path, tmp_path / "gq")), logits(path), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CHANGES)
def test_stacked_experts_decode_to_the_artifacts_weights(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense", **CHANGES[family])
    path, manifest = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
    found = {tensor.name: tensor for tensor in GGUFReader(as_gguf(path, tmp_path / "g")).tensors}
    source = resolve(path)
    for number in range(4):
        for projection, short in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            layer = f"model.layers.1.mlp.experts.{number}.{projection}"
            columns = next(one.shape[1] for one in manifest.layers if one.name == layer)
            expected = formats.dequantize(source.packed[layer], source.read_packed(layer), columns)
            stored = found[f"blk.1.ffn_{short}_exps.weight"]
            assert stored.tensor_type == GGMLQuantizationType.Q4_0
            assert np.array_equal(dequantize(stored.data[number], stored.tensor_type), expected.numpy())
    assert found["blk.1.ffn_gate_inp.weight"].tensor_type == GGMLQuantizationType.F32


def test_experts_get_the_smallest_type_that_holds_all_of_them(tmp_path: Path) -> None:
    dense = save_tiny("qwen3_moe", tmp_path / "dense", **CHANGES["qwen3_moe"])
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=4, group_size=32))
    file = as_gguf(path, tmp_path / "g")
    kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors if "_exps" in tensor.name}
    assert GGMLQuantizationType.Q5_0 in kinds
    torch.testing.assert_close(logits(file), logits(path), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {}, "norm_topk_prob=False, and llama.cpp the contrary"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}, "some of its blocks have no experts"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "some of its blocks have no experts"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("qwen2_moe", {"qkv_bias": False}, "no biases"),
        ("mixtral", {"sliding_window": 8}, "slides over 8 tokens"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dense = save_tiny(family, tmp_path / "dense", **changes)
    with pytest.raises(InputError, match=message):
        as_gguf(dense, tmp_path / "g")


def test_sizes_of_experts_are_read_from_a_file(tmp_path: Path) -> None:
    dense = save_tiny("qwen2_moe", tmp_path / "dense")
    config = load_model(resolve(as_gguf(dense, tmp_path / "g")), dtype=torch.float32).config
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (32, 64)
