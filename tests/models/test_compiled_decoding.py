"""Tokens through compiled code are those of transformers: logits, caches, and what is left to transformers."""

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.formats.columns import random_columns
from tests.kernels.matrices import random_matrix
from tests.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    TrellisScheme,
    codebook,
)
from ulbq.kernels import build
from ulbq.models import decoding
from ulbq.models.compiled_decoding import Decoder, products, unsupported_reason
from ulbq.models.decoding import TextStream, greedy, write_on
from ulbq.models.packed_tables import chosen_tables
from ulbq.nn.quant_embedding import QuantEmbedding, swap_table
from ulbq.nn.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

SCHEMES: list[AnyScheme] = [
    AffineScheme(bits=2, group_size=32),
    DualBinaryScheme(group_size=32),
    BinaryMosScheme(experts=2),
    CodebookScheme(bits=2),
    TrellisScheme(bits=2),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 1e-4
"""Relative norm of the difference of logits in float32."""


def packed_model(
    family: str,
    scheme: AnyScheme | None,
    dtype: torch.dtype = torch.float32,
    *,
    windowless: bool = False,
    **changes: Any,
) -> PreTrainedModel:
    """A tiny model with random packed layers."""
    config = tiny_config(family, **changes)
    if windowless:
        config.sliding_window = None
    model = tiny_model(config)
    for name, layer in [*model.base_model.layers.named_modules()]:
        if scheme is not None and isinstance(layer, nn.Linear):
            outs, columns = layer.weight.shape
            packed = QuantLinear(scheme, columns, outs, bias=layer.bias is not None)
            if isinstance(scheme, CodebookScheme):
                _, found = random_columns(outs, [2] * columns)
                packed.assign(codebook.pack(scheme, found._replace(codebooks=found.codebooks / 8)))
            else:
                packed.assign(random_matrix(scheme, outs, columns))
            if layer.bias is not None:
                packed.bias = layer.bias
            model.base_model.layers.set_submodule(name, packed)
    return model.to(dtype)


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Of what comes behind the first tokens, read at once, and behind each of the others, by compiled code."""
    compiled = products(model)
    assert compiled is not None
    decoder = Decoder(model, compiled, len(tokens))
    return torch.stack([decoder(tokens[:start]), *(decoder(token) for token in tokens[start:].split(1))])


@torch.inference_mode()
def plain(model: PreTrainedModel, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """The same by transformers."""
    return model(tokens[None]).logits[0, start - 1 :].float()


def assert_same(model: PreTrainedModel, *, start: int = 5, length: int = 40) -> None:
    tokens = torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(0))
    found, usual = logits(model, tokens, start), plain(model, tokens, start)
    # In 16 bits transformers rounds after every operation; compiled code is about as near to float32, or nearer.
    wanted = plain(copy.deepcopy(model).float(), tokens, start)
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= max(TOLERANCE * wanted.norm(), 1.2 * (usual - wanted).norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.format)
def test_formats(scheme: AnyScheme, dtype: torch.dtype) -> None:
    assert_same(packed_model("llama", scheme, dtype))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_families(family: str, tied: bool) -> None:
    assert_same(packed_model(family, SCHEMES[0], tied=tied, windowless=True))


def test_biases_everywhere() -> None:
    assert_same(packed_model("llama", SCHEMES[0], attention_bias=True, mlp_bias=True))


def test_dense_layers() -> None:
    assert_same(packed_model("llama", None))


def test_rotary_positions_that_are_stretched() -> None:
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert_same(packed_model("llama", SCHEMES[0], rope_parameters=stretched))


def test_rotary_positions_of_a_part_of_a_head_are_left_to_transformers() -> None:
    part = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = packed_model("llama", SCHEMES[0], rope_parameters=part)
    assert "a part of a head" in str(unsupported_reason(model))
    assert products(model) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_head(tied: bool, bits: int, dtype: torch.dtype) -> None:
    model = packed_model("llama", SCHEMES[0], dtype, tied=tied)
    [(head, scheme)] = chosen_tables(model, None, bits).items()
    tensors = random_matrix(scheme, head.out_features, head.in_features)
    if tied:
        table = QuantEmbedding(scheme, model.get_input_embeddings(), dtype=dtype)
        table.assign(tensors)
        swap_table(model, head.name, table, ["lm_head"])
    else:
        model.lm_head = QuantLinear(scheme, head.in_features, head.out_features, dtype=dtype)
        model.lm_head.assign(tensors)
    assert_same(model)
    compiled = products(model)
    assert compiled is not None
    assert compiled.head is not None  # or each token takes another call


def test_a_head_of_another_kind_makes_its_logits() -> None:
    model = packed_model("llama", SCHEMES[0], tied=False)
    model.lm_head = copy.deepcopy(model.base_model.layers[0].mlp.gate_proj)
    model.lm_head.__class__ = _Tripled
    assert_same(model)


def test_products_stay_until_a_tensor_changes() -> None:
    model = packed_model("llama", SCHEMES[0])
    first = products(model)
    assert first is not None
    assert products(model) is first
    few, more = first.angles(model, 5)[0], first.angles(model, 9)[0]
    assert first.angles(model, 7)[0] is more
    assert torch.equal(more[:5], few)
    before = logits(model, torch.arange(3, 9), 4)
    with torch.no_grad():
        model.base_model.layers[0].input_layernorm.weight.mul_(2)
    changed = products(model)
    assert changed is not first
    assert_same(model)
    assert not torch.equal(logits(model, torch.arange(3, 9), 4), before)
    mlp = model.base_model.layers[1].mlp
    mlp.up_proj, mlp.gate_proj = mlp.gate_proj, mlp.up_proj
    assert products(model) is not changed
    assert_same(model)


class _Tripled(QuantLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_products_go_with_a_layer_of_another_kind() -> None:
    model = packed_model("llama", SCHEMES[0])
    assert products(model) is not None
    model.base_model.layers[0].mlp.up_proj.__class__ = _Tripled
    assert products(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_torch_does_not_count_are_seen(dtype: torch.dtype) -> None:
    model = packed_model("llama", SCHEMES[0], dtype)
    first = products(model)
    assert first is not None
    model.base_model.layers[0].input_layernorm.weight.data.mul_(4)
    second = products(model)
    assert second is not first
    assert_same(model)
    for block in model.base_model.layers:
        block.self_attn.scaling *= 2
    assert products(model) is not second
    assert_same(model)


def test_products_of_a_model_that_has_none_any_more_are_let_go() -> None:
    model = packed_model("llama", SCHEMES[0])
    kept = weakref.ref(products(model))
    assert kept() is not None
    hook = model.base_model.register_forward_hook(lambda *_: None)
    assert products(model) is None
    hook.remove()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_models_in_bfloat16_are_rounded(dtype: torch.dtype) -> None:
    model = packed_model("llama", SCHEMES[-1], dtype)
    asked = []
    usual = QuantLinear.product
    with patch.object(QuantLinear, "product", lambda self, *, exact: asked.append(exact) or usual(self, exact=exact)):
        products(model)
    assert set(asked) == {dtype != torch.bfloat16}


@pytest.mark.parametrize("family", ["gemma2", "phi3", "mistral"])
def test_other_models_are_left_to_transformers(family: str) -> None:
    assert products(packed_model(family, None)) is None


def test_watched_modules_are_left_to_transformers() -> None:
    model = packed_model("llama", SCHEMES[0])
    model.base_model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert products(model) is None


@pytest.mark.parametrize("prompt", [1, 7])
@pytest.mark.parametrize(
    "changes",
    [{}, {"repetition_penalty": 1.3}, {"do_sample": True, "temperature": 0.7, "top_p": 0.8}, {"do_sample": True}],
    ids=str,
)
def test_what_is_written_is_what_transformers_writes(changes: dict[str, Any], prompt: int) -> None:
    model, tokenizer = packed_model("llama", SCHEMES[0]), tiny_tokenizer()
    settings, tokens = greedy(30, at_least=3) | changes, list(range(60, 60 + prompt))
    texts = []
    for left_out in (False, True):
        torch.manual_seed(1)
        stream = TextStream(tokenizer)
        with patch.object(decoding, "products", return_value=None) if left_out else nullcontext():
            ending = write_on(model, tokenizer, tokens, settings, stream)
        texts.append((stream.text, stream.new_tokens, ending))
    assert texts[0] == texts[1]
    assert texts[0][0]
