"""Experts by single names, whichever way a checkpoint stores them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models.tiny import MIXTURES, save_tiny
from ulbq.models.blocks import load_block, materialize, skeleton, structure
from ulbq.models.source import resolve
from ulbq.models.stored_names import StoredNames
from ulbq.nn.experts import Experts

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_model_of_single_experts_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    source = resolve(save_tiny(family, tmp_path))
    model = skeleton(source)
    materialize(model, source, torch.float32)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, fused(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert any(isinstance(module, Experts) for module in model.modules())
    experts = [linear.name for block in structure(model).linears for linear in block if ".experts." in linear.name]
    assert len(experts) == 3 * 4 * sum(isinstance(module, Experts) for module in model.modules())
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in experts)


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_written_has_the_names_that_transformers_writes(family: str, tmp_path: Path) -> None:
    source = resolve(save_tiny(family, tmp_path))
    names, model = StoredNames(source.config), skeleton(source)
    written = names.dense({name: source.read(name) for name in model.state_dict()})
    expected = load_file(tmp_path / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())


def test_an_engines_name_of_a_layer(tmp_path: Path) -> None:
    mixtral = StoredNames(resolve(save_tiny("mixtral", tmp_path / "mixtral")).config)
    assert mixtral.layer("model.layers.1.mlp.experts.3.up_proj") == "model.layers.1.block_sparse_moe.experts.3.w3"
    assert mixtral.layer("model.layers.1.self_attn.q_proj") == "model.layers.1.self_attn.q_proj"
    qwen = StoredNames(resolve(save_tiny("qwen3_moe", tmp_path / "qwen")).config)
    assert qwen.layer("model.layers.1.mlp.experts.3.up_proj") == "model.layers.1.mlp.experts.3.up_proj"
    assert (
        StoredNames(resolve(save_tiny("gpt_oss", tmp_path / "oss")).config).layer(
            "model.layers.1.mlp.experts.3.up_proj"
        )
        is None
    )


def test_fused_tensors_are_read_once_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(save_tiny("gpt_oss", tmp_path))
    model, read = skeleton(source), source.tensors.read
    reads: list[str] = []
    monkeypatch.setattr(source.tensors, "read", lambda name: reads.append(name) or read(name))
    load_block(model, source, 1, torch.float32)
    assert sorted(name.rpartition(".")[2] for name in reads if ".experts." in name) == [
        "down_proj",
        "down_proj_bias",
        "gate_up_proj",
        "gate_up_proj_bias",
    ]
