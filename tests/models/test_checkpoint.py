"""Stored names that are not the model's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models.tiny import save_tiny
from ulbq.errors import InputError
from ulbq.models.blocks import load_block, skeleton
from ulbq.models.source import resolve

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def rename(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({change(name): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def remove(folder: Path, ending: str) -> None:
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(ending)}
    save_file(kept, file, metadata={"format": "pt"})


def assert_reads_like_transformers(folder: Path) -> None:
    source = resolve(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    assert {name for name in source.names if ".experts." not in name} <= model.state_dict().keys() <= source.names
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name), tensor), name


def test_names_without_the_base_prefix(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, tied=False)
    rename(folder, lambda name: name.removeprefix("model."))
    assert_reads_like_transformers(folder)


def test_names_of_an_older_release(tmp_path: Path) -> None:
    # transformers itself still writes the head of GPT-NeoX as embed_out; today's module is lm_head.
    folder = save_tiny("gpt_neox", tmp_path, tied=False)
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    assert_reads_like_transformers(folder)


def test_names_that_are_new_already(tmp_path: Path) -> None:
    folder = save_tiny("gpt_neox", tmp_path, tied=False)
    rename(folder, lambda name: name.replace("embed_out", "lm_head"))
    assert_reads_like_transformers(folder)


def test_experts_are_fused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", num_local_experts=3, **_SMALL)).save_pretrained(
        tmp_path
    )
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in stored
    assert_reads_like_transformers(tmp_path)


def test_tensors_of_no_module_are_left_alone(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, tied=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in resolve(folder).names


def test_missing_parameter_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, tied=False)
    remove(folder, "layers.1.mlp.up_proj.weight")
    source = resolve(folder)
    model = skeleton(source)
    load_block(model, source, 0, torch.float32)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_block(model, source, 1, torch.float32)


def test_missing_persistent_buffer_is_named(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        **(_SMALL | {"num_key_value_heads": 4, "first_k_dense_replace": 0, "moe_intermediate_size": 32}),
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    bias = torch.arange(4.0)
    model.model.layers[0].mlp.gate.e_score_correction_bias.copy_(bias)
    model.save_pretrained(tmp_path)
    source = resolve(tmp_path)
    block = load_block(skeleton(source), source, 0, torch.bfloat16)
    assert torch.equal(block.get_buffer("mlp.gate.e_score_correction_bias"), bias)

    remove(tmp_path, "e_score_correction_bias")
    source = resolve(tmp_path)
    with pytest.raises(InputError, match="e_score_correction_bias"):
        load_block(skeleton(source), source, 0, torch.bfloat16)
