"""Rotated weights: the same function, in every family that is let through; the others are refused."""

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.models.tiny import FAMILIES, save_tiny
from ulbq.errors import InputError, NumericsError
from ulbq.models import rotation
from ulbq.models.blocks import skeleton, structure
from ulbq.models.hadamard import hadamard_factors
from ulbq.models.load import load_model
from ulbq.models.names import check_complete
from ulbq.models.rotatable import ROTATABLE
from ulbq.models.rotation import Rotation, rotated
from ulbq.models.source import ModelSource, resolve

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))
BIASES = {"attention_bias": True, "mlp_bias": True}


def logits(source: ModelSource) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = load_model(source, dtype=torch.float64)(TOKENS).logits
        return result


def saved(family: str, folder: Path, **changes: Any) -> ModelSource:
    return resolve(save_tiny(family, folder / family, dtype=torch.float64, **changes))


def assert_same_function(source: ModelSource, turned: ModelSource) -> PreTrainedModel:
    model = skeleton(turned)
    check_complete(turned, model)
    assert not structure(model).tied
    # transformers' norms compute in float32.
    torch.testing.assert_close(logits(turned), logits(source), atol=1e-5, rtol=1e-5)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ROTATABLE)
def test_a_rotated_model_computes_what_the_original_does(family: str, tied: bool, tmp_path: Path) -> None:
    source = saved(family, tmp_path, tied=tied)
    assert structure(skeleton(source)).tied == tied
    turned = rotated(source, 3)
    assert_same_function(source, turned)
    assert source.config.tie_word_embeddings == tied
    assert turned.content_hash == source.content_hash


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_biases_of_all_layers_and_any_sharing_of_heads(heads: int, tmp_path: Path) -> None:
    source = saved("llama", tmp_path, num_key_value_heads=heads, head_dim=24, **BIASES)
    model = assert_same_function(source, rotated(source, 0))
    assert sum(name.endswith("bias") for name in model.state_dict()) == 21


@pytest.mark.parametrize(
    ("hidden", "said"), [(60, "Hadamard 60"), (72, "Hadamard 72 = 36·2"), (100, "random orthogonal 100")]
)
def test_widths_that_are_no_power_of_two(hidden: int, said: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path, hidden_size=hidden, head_dim=20)
    turned = rotated(source, 0)
    assert_same_function(source, turned)
    assert turned.rotation is not None
    assert (turned.rotation.seed, turned.rotation.residual) == (0, said)
    assert turned.rotation.values == "Hadamard 20 a head"


def test_a_tied_model_may_be_stored_under_the_heads_name(tmp_path: Path) -> None:
    source = saved("llama", tmp_path, tied=True)
    tensors = load_file(source.path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source.path / "model.safetensors", metadata={"format": "pt"})
    source = resolve(source.path)
    assert_same_function(source, rotated(source, 0))


def test_every_matrix_turns_norms_become_ones_and_nothing_else_moves(tmp_path: Path) -> None:
    source = saved("qwen3", tmp_path)
    turned = rotated(source, 0)
    for name in turned.names:
        before, after = source.read(name), turned.read(name)
        assert after.dtype == before.dtype, name
        if name.endswith(("_layernorm.weight", "model.norm.weight")):
            assert torch.equal(after, torch.ones_like(before)), name
        elif "q_norm" in name or "k_norm" in name:
            assert torch.equal(after, before), name
        else:
            assert (after - before).norm() > before.norm(), name


def test_an_outlier_is_spread_over_all_channels(tmp_path: Path) -> None:
    source = saved("llama", tmp_path, tied=False)
    tensors = load_file(source.path / "model.safetensors")
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ):
        tensors[name][3, 3] = 50.0
    save_file(tensors, source.path / "model.safetensors", metadata={"format": "pt"})
    turned = rotated(resolve(source.path), 0)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ):
        # A 64th of its energy each, beside what stood there.
        assert turned.read(name).abs().max() < 50 / 8 * 1.5, name


def test_the_seed_draws_the_signs(tmp_path: Path) -> None:
    source, name = saved("llama", tmp_path), "model.layers.1.self_attn.v_proj.weight"
    first, again, other = (rotated(source, seed).read(name) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    values = [rotated(source, 0).read(f"model.layers.{index}.self_attn.v_proj.weight") for index in (0, 1)]
    assert not torch.allclose(values[0], values[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_quantized_keeps_its_dtype_and_weights_are_not_rounded_again(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    source = resolve(save_tiny("qwen2", tmp_path / "m", dtype=dtype))
    turned = rotated(source, 0)
    for name in turned.names:
        quantized = "layers" in name and name.endswith("_proj.weight")
        assert turned.read(name).dtype == (torch.float32 if quantized else dtype), name
    exact = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    difference = (logits(turned) - logits(source)).norm() / logits(source).norm()
    assert difference < exact


@pytest.mark.parametrize("family", [*sorted(set(FAMILIES) - set(ROTATABLE)), "gemma", "mixtral", "deepseek"])
def test_a_family_that_does_not_fit_is_refused(family: str, tmp_path: Path) -> None:
    source = resolve(save_tiny(family, tmp_path / "m"))
    with pytest.raises(InputError, match="are not known to let a rotation through exactly") as refused:
        rotated(source, 0)
    assert f"'{source.config.model_type}'" in refused.value.message
    assert "Leave out `rotate`" in refused.value.hint


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (
            "model.layers.1.self_attn",
            "sinks",
            r"are not as they are known here \('model\.layers\.1\.self_attn\.sinks'\)",
        ),
        ("lm_head", "bias", r"do not stand alone \('lm_head\.bias'\)"),
    ],
)
def test_a_parameter_more_is_refused(
    owner: str, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_model = rotation.empty_model

    def more(config: Any) -> PreTrainedModel:
        model = empty_model(config)
        model.get_submodule(owner).register_parameter(name, torch.nn.Parameter(torch.ones(4)))
        return model

    monkeypatch.setattr(rotation, "empty_model", more)
    with pytest.raises(InputError, match=said):
        rotated(resolve(save_tiny("llama", tmp_path / "m", tied=False)), 0)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_damage_is_named_as_without_a_rotation(name: str, tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path / "m", tied=False)
    for damage, error, said in (
        (lambda tensor: tensor[1:], InputError, "its configuration says"),
        (lambda tensor: tensor.to(torch.int8), InputError, "as integers"),
        (lambda tensor: tensor * torch.nan, NumericsError, "not finite"),
    ):
        tensors = load_file(path / "model.safetensors")
        whole = tensors[name]
        save_file(tensors | {name: damage(whole).contiguous()}, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(error, match=said):
            load_model(rotated(resolve(path), 0), dtype=torch.float32)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    save_file({key: value for key, value in tensors.items() if key != name}, path / "model.safetensors")
    source = rotated(resolve(path), 0)
    with pytest.raises(InputError, match=f"holds no tensor for the parameter '{name}'"):
        check_complete(source, skeleton(source))


@pytest.mark.parametrize("order", [2, 12, 80, 576])
def test_a_rotation_is_the_product_of_signs_and_factors(order: int) -> None:
    factors = hadamard_factors(order)
    assert factors is not None
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (2 * order,), generator=generator).double() * 2 - 1
    turn = Rotation(signs, factors)
    one = reduce(torch.kron, factors) / order**0.5
    whole = signs[:, None] * torch.block_diag(one, one)
    rows = torch.randn(3, 2 * order, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(turn(rows), rows @ whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole @ whole.T, torch.eye(2 * order, dtype=torch.float64), atol=1e-12, rtol=0)
