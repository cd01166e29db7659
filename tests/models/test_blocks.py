import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.tiny import FAMILIES, save_tiny, tiny_config, tiny_model
from ulbq.errors import InputError, NumericsError, UsageError
from ulbq.models.blocks import (
    Linear,
    block_list,
    check_group_size,
    load_block,
    load_outer,
    skeleton,
    structure,
)
from ulbq.models.skeleton import empty_model
from ulbq.models.source import resolve

_FUSED = {"phi3", "gpt_neox"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_structure(family: str, tied: bool) -> None:
    found = structure(empty_model(tiny_config(family, tied=tied)))
    base = "gpt_neox" if family == "gpt_neox" else "model"
    assert (found.blocks_prefix, found.n_blocks) == (f"{base}.layers", 3)
    assert found.embeddings == (f"{base}.{'embed_in' if family == 'gpt_neox' else 'embed_tokens'}",)
    assert (found.head, found.tied, found.skipped) == ("lm_head", tied, ("lm_head",))
    assert [len(block) for block in found.linears] == [4 if family in _FUSED else 7] * 3
    assert all(linear.name.startswith(f"{base}.layers.1.") for linear in found.linears[1])


def test_linears_of_a_block_in_their_order() -> None:
    found = structure(empty_model(tiny_config("llama")))
    prefix = "model.layers.2."
    assert found.linears[2] == (
        Linear(f"{prefix}self_attn.q_proj", 64, 64),
        Linear(f"{prefix}self_attn.k_proj", 32, 64),
        Linear(f"{prefix}self_attn.v_proj", 32, 64),
        Linear(f"{prefix}self_attn.o_proj", 64, 64),
        Linear(f"{prefix}mlp.gate_proj", 128, 64),
        Linear(f"{prefix}mlp.up_proj", 128, 64),
        Linear(f"{prefix}mlp.down_proj", 64, 128),
    )


def test_experts_and_routers_are_skipped() -> None:
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    found = structure(empty_model(config))
    assert [len(block) for block in found.linears] == [4, 4]
    experts = [f"model.layers.{block}.mlp.{part}" for block in (0, 1) for part in ("gate", "experts")]
    assert found.skipped == (*experts, "lm_head")


def test_vision_tower_is_skipped_however_deep_it_is() -> None:
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**text, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 64},
        vision_config={**vision, "num_hidden_layers": 5},
    )
    found = structure(empty_model(config))
    assert (found.blocks_prefix, found.n_blocks) == ("model.language_model.layers", 2)
    assert any(name.startswith("model.vision_tower.encoder.layers.4.") for name in found.skipped)


def test_model_without_linear_layers_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(InputError, match="'gpt2' has no blocks with linear layers"):
        structure(empty_model(config))


class TestGroupSize:
    @pytest.mark.parametrize(
        ("size", "divides"), [(-1, True), (1, True), (16, True), (32, True), (64, True), (3, False), (48, False)]
    )
    def test_divisors_alone_pass(self, size: int, divides: bool) -> None:
        refusal = pytest.raises(InputError, match=f"{size} does not divide the 64 inputs")
        with nullcontext() if divides else refusal:
            check_group_size(structure(empty_model(tiny_config("llama"))), size)

    def test_other_names_the_layer_and_the_choices(self) -> None:
        found = structure(empty_model(tiny_config("llama", hidden_size=192, intermediate_size=320)))
        with pytest.raises(InputError) as caught:
            check_group_size(found, 96)
        assert "96 does not divide the 320 inputs of 'model.layers.0.mlp.down_proj'" in caught.value.message
        assert caught.value.hint == "Sizes that divide every layer: 16, 32, 64, -1 (whole rows)."

    def test_odd_width_leaves_whole_rows(self) -> None:
        found = structure(empty_model(tiny_config("llama", intermediate_size=77)))
        with pytest.raises(InputError) as caught:
            check_group_size(found, 64)
        assert caught.value.hint == "Sizes that divide every layer: -1 (whole rows)."

    @pytest.mark.parametrize("size", [0, -2])
    def test_no_size_at_all(self, size: int) -> None:
        with pytest.raises(UsageError, match="makes no groups"):
            check_group_size(structure(empty_model(tiny_config("llama"))), size)


class TestSkeleton:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_parameters_on_meta_and_buffers_real(self, family: str) -> None:
        config = tiny_config(family)
        model, real = empty_model(config), tiny_model(config)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not model.training
        buffers = dict(real.named_buffers())
        assert dict(model.named_buffers()).keys() == buffers.keys()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name

    def test_modules_made_afterwards_are_real(self) -> None:
        empty_model(tiny_config("llama"))
        assert not torch.nn.Linear(2, 2).weight.is_meta
        assert torch.nn.Linear(2, 2).weight.abs().sum() > 0

    def test_config_stays_as_it_is(self) -> None:
        config = tiny_config("llama", dtype="bfloat16")
        before = config.to_dict()
        empty_model(config)
        assert config.to_dict() == before


class TestLoading:
    def test_block_is_independent(self, tiny_llama: Path) -> None:
        source = resolve(tiny_llama)
        model = skeleton(source)
        block, again = (load_block(model, source, 1, torch.float32) for _ in range(2))
        for parameter in block.parameters():
            assert not parameter.requires_grad
            parameter.zero_()
        assert all(parameter.abs().sum() > 0 for parameter in again.parameters())
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_biases_are_read(self, tmp_path: Path) -> None:
        source = resolve(save_tiny("qwen2", tmp_path))
        block = load_block(skeleton(source), source, 0, torch.float32)
        bias = block.get_parameter("self_attn.q_proj.bias")
        assert torch.equal(bias, source.read("model.layers.0.self_attn.q_proj.bias"))

    def test_floats_are_cast_and_buffers_are_not(self, tmp_path: Path) -> None:
        source = resolve(save_tiny("gemma3", tmp_path))
        model = skeleton(source)
        load_outer(model, source, torch.bfloat16)
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert {buffer.dtype for _, buffer in model.named_buffers()} == {torch.float32}

    @pytest.mark.parametrize("tied", [True, False])
    def test_outer_is_everything_but_blocks(self, tmp_path: Path, tied: bool) -> None:
        source = resolve(save_tiny("olmo2", tmp_path, tied=tied))
        model = skeleton(source)
        load_outer(model, source, torch.float32)
        on_meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        assert on_meta == {name for name, _ in model.named_parameters() if name.startswith("model.layers.")}
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        load_block(model, source, 0, torch.float32)

    def test_tied_weight_stored_under_the_heads_name(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = save_tiny("llama", tmp_path, tied=True)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        source = resolve(folder)
        model = skeleton(source)
        load_outer(model, source, torch.float32)
        assert torch.equal(model.model.embed_tokens.weight, tensors["lm_head.weight"])

    def test_other_shape_than_configured_is_refused(self, tmp_path: Path) -> None:
        folder = save_tiny("llama", tmp_path)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
        source = resolve(folder)
        with pytest.raises(InputError, match=r"gate_proj\.weight' as \[128, 64\].* says \[96, 64\]"):
            load_block(skeleton(source), source, 0, torch.float32)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_refused(self, tmp_path: Path, bad: float) -> None:
        folder = save_tiny("llama", tmp_path)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = bad
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        source = resolve(folder)
        with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.up_proj\.weight' with values that are not finite"):
            load_block(skeleton(source), source, 0, torch.float32)
        load_block(skeleton(source), source, 1, torch.float32)

    def test_integers_in_place_of_weights_are_refused(self, tmp_path: Path) -> None:
        folder = save_tiny("llama", tmp_path)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        save_file({**tensors, name: tensors[name].int()}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"as integers \(int32\)"):
            resolve(folder)


def test_blocks_of_a_loaded_model_are_found_too() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert len(block_list(model)[1]) == 3
