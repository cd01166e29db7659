"""Single experts give what transformers' fused modules give, whatever way those store them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from ulbq.models.watch import watching
from ulbq.nn.experts import Experts, Fusion, showing
from ulbq.nn.experts import single_experts as unfused

EXPERTS, TOKENS, HIDDEN, INNER = 5, 13, 24, 16
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 1}
MODULES = {
    "concatenated": lambda: Qwen3MoeExperts(
        Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS)
    ),
    "transposed": lambda: AriaExperts(AriaTextConfig(**SIZES, moe_num_experts=EXPERTS)),
    "by turns, with biases": lambda: GptOssExperts(GptOssConfig(**SIZES, num_local_experts=EXPERTS)),
    "without a gate": lambda: NemotronHExperts(
        NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS)
    ),
    "with bounds": lambda: Step3p7Experts(
        SimpleNamespace(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_local_experts=EXPERTS, hidden_act="silu"),
        swiglu_limit=0.2,
    ),
    "with identity": lambda: longcat(0),
    "below each other": lambda: DbrxExperts(
        DbrxFFNConfig(hidden_size=HIDDEN, ffn_hidden_size=INNER, moe_num_experts=EXPERTS)
    ),
}


def longcat(zeros: int) -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "expert_ffn_hidden_size": INNER, "n_routed_experts": EXPERTS}
    return LongcatFlashExperts(SimpleNamespace(**sizes, zero_expert_num=zeros, hidden_act="silu"))


def drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.requires_grad_(False)


def fused_module(kind: str) -> nn.Module:
    module = MODULES[kind]()
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"
    return drawn(module)


def single_experts(fused: nn.Module) -> Experts:
    made = unfused(fused)
    assert made is not None
    for number in range(EXPERTS):
        for projection in made.fusion.projections:
            layer = made.get_submodule(f"{number}.{projection}")
            for name, parameter in layer.named_parameters():
                whole = fused.get_parameter(made.fusion.fused(projection, name))
                parameter.copy_(made.fusion.take(whole, number, projection))
    return made


def routed(choices: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, experts and their weights; nobody chooses the last expert."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = torch.rand(TOKENS, EXPERTS - 1, generator=generator)
    weights, index = scores.topk(choices)
    return hidden, index, weights


@pytest.mark.parametrize("kind", MODULES)
def test_they_compute_what_the_fused_module_computes(kind: str) -> None:
    fused = fused_module(kind)
    experts = copy.deepcopy(single_experts(fused))
    hidden, index, weights = routed()
    expected = fused(hidden, index, weights)
    torch.testing.assert_close(experts(hidden, index, weights), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(experts(hidden, index, weights), experts(hidden, index, weights))


@pytest.mark.parametrize("kind", MODULES)
def test_joined_again_they_are_the_fused_tensors(kind: str) -> None:
    fused = fused_module(kind)
    experts = single_experts(fused)
    joined = experts.fusion.join([experts.get_submodule(str(number)).state_dict() for number in range(EXPERTS)])
    assert joined.keys() == dict(fused.named_parameters()).keys()
    assert all(torch.equal(tensor, fused.get_parameter(name)) for name, tensor in joined.items())


def test_a_token_gets_the_same_whoever_else_is_there() -> None:
    experts = single_experts(fused_module("concatenated"))
    hidden, index, weights = routed()
    whole = experts(hidden, index, weights)
    alone = experts(hidden[3:4], index[3:4], weights[3:4])
    torch.testing.assert_close(alone, whole[3:4], atol=1e-6, rtol=1e-6)


def test_a_token_alone_gets_the_same_bits() -> None:
    experts = single_experts(fused_module("concatenated")).to(torch.bfloat16)
    hidden, index, weights = routed(EXPERTS - 1)
    alone = experts(hidden[:1].bfloat16(), index[:1], weights[:1].bfloat16())
    with showing({experts: (-1,)}):  # none of them, and nothing is cut short
        assert torch.equal(experts(hidden[:1].bfloat16(), index[:1], weights[:1].bfloat16()), alone)
    index[0, 1] = EXPERTS
    without = weights[:1].clone()
    without[0, 1] = 0
    expected = experts(hidden[:1].bfloat16(), torch.where(index == EXPERTS, 0, index)[:1], without.bfloat16())
    torch.testing.assert_close(experts(hidden[:1].bfloat16(), index[:1], weights[:1].bfloat16()), expected)


def test_a_choice_beyond_the_experts_counts_for_nothing() -> None:
    experts = single_experts(fused_module("concatenated"))
    hidden, index, weights = routed()
    one = experts(hidden, index[:, :1], weights[:, :1])
    index[:, 1] = EXPERTS
    torch.testing.assert_close(experts(hidden, index, weights), one)
    assert not experts(hidden, torch.full_like(index, EXPERTS), weights).any()
    assert experts(hidden[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


def test_an_expert_sees_every_token_where_that_is_wanted_and_the_result_stays() -> None:
    experts = single_experts(fused_module("by turns, with biases"))
    hidden, index, weights = routed()
    expected = experts(hidden, index, weights)
    seen: dict[int, int] = {}
    layers = {number: experts.get_submodule(f"{number}.down_proj") for number in range(EXPERTS)}
    with showing({experts: (1, EXPERTS - 1)}), watching(layers, lambda number, x: seen.__setitem__(number, len(x))):
        found = experts(hidden, index, weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    counts = index.flatten().bincount().tolist()
    assert seen == {number: counts[number] for number in range(EXPERTS - 1)} | {1: TOKENS, EXPERTS - 1: TOKENS}
    assert not experts.shown


def test_half_precision_and_autocast() -> None:
    experts = single_experts(fused_module("concatenated"))
    hidden, index, weights = routed()
    expected = experts(hidden, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        cast = experts(hidden, index, weights)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, expected, atol=0.1, rtol=0.1)
    half = experts.to(torch.bfloat16)(hidden.bfloat16(), index, weights)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("choices", [1, 2])
def test_experts_whose_inputs_are_scaled(choices: int) -> None:
    config = Llama4TextConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=choices)
    fused = drawn(Llama4TextExperts(config))
    experts = single_experts(fused)
    hidden, index, weights = routed(choices)
    scales = torch.zeros(TOKENS, EXPERTS).scatter_(1, index, weights).T
    entering = (scales.unsqueeze(-1) * hidden).flatten(0, 1)
    expected = fused(entering)
    torch.testing.assert_close(experts(entering), expected, atol=1e-5, rtol=1e-5)
    seen: dict[int, torch.Tensor] = {}
    layers = {number: experts.get_submodule(f"{number}.up_proj") for number in range(EXPERTS)}
    with showing({experts: (0, EXPERTS - 1)}), watching(layers, seen.__setitem__):
        torch.testing.assert_close(experts(entering), expected, atol=1e-5, rtol=1e-5)
    counts = index.flatten().bincount(minlength=EXPERTS).tolist()
    assert {number: len(rows) for number, rows in seen.items()} == {
        number: TOKENS if number in (0, EXPERTS - 1) else counts[number] for number in range(EXPERTS)
    }
    # One that nobody chooses sees each token as those that are chosen see it.
    torch.testing.assert_close(seen[EXPERTS - 1], hidden * weights.mean(1, keepdim=True))


@pytest.mark.parametrize("shown", [(), (1, EXPERTS - 1)])
def test_choices_that_give_the_token_itself(shown: tuple[int, ...]) -> None:
    fused = drawn(longcat(2))
    experts = single_experts(fused)
    hidden, index, weights = routed()
    index[::2, 1], index[5] = EXPERTS, EXPERTS + 1
    with showing({experts: shown}):
        torch.testing.assert_close(experts(hidden, index, weights), fused(hidden, index, weights), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            experts(hidden[:1], index[:1], weights[:1]), fused(hidden[:1], index[:1], weights[:1])
        )
    whole = torch.full_like(index, EXPERTS)
    torch.testing.assert_close(experts(hidden, whole, weights), hidden * weights.sum(1, keepdim=True))


@pytest.mark.parametrize("shown", [(), (0, 2)])
def test_experts_of_one_matrix_whose_inputs_are_sorted(shown: tuple[int, ...]) -> None:
    fused = drawn(JetMoeParallelExperts(EXPERTS, HIDDEN, INNER))
    experts, sizes = single_experts(fused), [4, 0, 3, 6, 0]
    hidden, _, _ = routed()
    seen: dict[int, int] = {}
    layers = {number: experts.get_submodule(f"{number}.linear") for number in range(EXPERTS)}
    with showing({experts: shown}), watching(layers, lambda number, x: seen.__setitem__(number, len(x))):
        torch.testing.assert_close(experts(hidden, sizes), fused(hidden, sizes))
    assert seen == {number: rows for number, rows in enumerate(sizes) if rows} | dict.fromkeys(shown, TOKENS)
    assert experts(hidden[:0], [0] * EXPERTS).shape == (0, INNER)


def test_other_modules_are_none() -> None:
    assert Fusion.of(nn.Linear(2, 2)) is None
    assert Fusion.of(single_experts(fused_module("concatenated"))) is None
    with pytest.raises(TypeError, match="holds no fused experts"):
        Experts(nn.Linear(2, 2))
