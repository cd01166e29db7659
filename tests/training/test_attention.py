"""Attention in chunks against torch's own, and where it stands in for it."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from ulbq.training.attention import causal_attention, chunked_attention
from ulbq.training.precision import Precision

CPU = Precision(torch.device("cpu"), torch.float32)


def inputs(length: int, heads: int, shared: int, width: int = 16, value: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, heads, width), (2, length, shared, width), (2, length, shared, value))
    # As models have them: heads and positions are transposed views.
    return [2 * torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]


def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )


@pytest.mark.parametrize(
    ("length", "heads", "shared", "value"),
    [(1, 2, 2, 16), (63, 4, 4, 16), (64, 6, 2, 16), (65, 6, 3, 16), (200, 4, 1, 16), (130, 4, 2, 24)],
)
def test_value_and_gradients_are_those_of_torch(length: int, heads: int, shared: int, value: int) -> None:
    tensors = [t.requires_grad_() for t in inputs(length, heads, shared, value=value)]
    found, wanted = causal_attention(*tensors, 0.3), torchs(*tensors, 0.3)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    incoming = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(output, tensors, incoming) for output in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-5


def test_bfloat16_is_about_as_near_to_float64_as_torch_is() -> None:
    exact = [t.double().requires_grad_() for t in inputs(256, 4, 2, 64, 64)]
    rounded = [t.detach().bfloat16().requires_grad_() for t in exact]
    incoming = torch.randn(2, 4, 256, 64, generator=torch.Generator().manual_seed(1))
    wanted = torchs(*exact, 0.125)
    truth = [wanted, *torch.autograd.grad(wanted, exact, incoming.double())]

    def errors(output: torch.Tensor) -> list[float]:
        found = [output, *torch.autograd.grad(output, rounded, incoming.bfloat16())]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]

    ours, theirs = errors(causal_attention(*rounded, 0.125)), errors(torchs(*rounded, 0.125))
    assert all(one < 2.5 * other for one, other in zip(ours, theirs, strict=True))


def attention() -> LlamaAttention:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="sdpa"
    )
    return LlamaAttention(config, 0).eval()


def call(module: LlamaAttention, mask: torch.Tensor | None = None) -> torch.Tensor:
    hidden = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(2))
    angles = torch.arange(70.0)[:, None] * torch.linspace(1, 0.01, 16)
    output: torch.Tensor = module(hidden, (angles.cos()[None], angles.sin()[None]), mask)[0]
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_calls_it_inside_the_context_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention()
    precision = Precision(torch.device("cpu"), dtype)
    seen: list[torch.dtype] = []

    def watched(query: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(query.dtype)
        return causal_attention(query, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("ulbq.training.attention.causal_attention", watched)
    with precision.autocast():
        wanted = call(module)
        assert not seen
        with chunked_attention(precision):
            found = call(module)
    assert seen == [dtype]
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.01)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers")


def test_what_has_a_mask_stays_with_torch() -> None:
    module = attention()
    mask = torch.zeros(1, 1, 70, 70).masked_fill(torch.ones(70, 70).tril(-9).bool(), -torch.inf)
    mask = mask.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
    wanted = call(module, mask)
    with chunked_attention(CPU):
        found = call(module, mask)
        assert not torch.allclose(call(module), wanted, atol=1e-3)
    assert torch.equal(found, wanted)


def test_an_error_inside_leaves_torchs_attention_in_place() -> None:
    with pytest.raises(RuntimeError, match="inside"), chunked_attention(CPU):
        raise RuntimeError("inside")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers")
