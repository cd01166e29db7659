"""How tokens become text as they come."""

from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models.tiny import tiny_tokenizer
from ulbq.models.decoding import TextStream, batched_attention, last_logits, take_room


def test_characters_come_whole_and_once() -> None:
    tokenizer, pieces = tiny_tokenizer(), list[str]()
    text = "näïve 猫と犬 🐱! "
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([tokenizer.encode("so")]))
    for token in tokenizer.encode(text):
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == text
    assert {"猫", "🐱"} <= set(pieces)
    assert len(stream.times) == len(tokenizer.encode(text)) + 1


def test_bytes_that_never_make_a_character_still_come_out() -> None:
    tokenizer, pieces = tiny_tokenizer(), list[str]()
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([tokenizer.encode("so")]))
    for token in tokenizer.encode("猫")[:2]:
        stream.put(torch.tensor([token]))
    assert pieces == []
    stream.end()
    assert pieces == ["\ufffd"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_batched_attention_is_torchs(masked: bool, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, length, 8, generator=generator)
    key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(2))
    mask = torch.ones(2, 1, length, 5, dtype=torch.bool) if masked or length > 1 else None
    if masked:
        mask[:, :, :, :2] = False
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    wanted, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with batched_attention(torch.device("cpu")):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not plain
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, wanted)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [1, 4])
def test_a_cache_with_room_answers_like_one_that_grows(tiny_llama: Path, prompt: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokens = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    cache = model(tokens[:, :prompt], use_cache=True).past_key_values
    take_room(cache, 9)
    room = [layer.keys.untyped_storage().data_ptr() for layer in cache.layers]
    for index in range(prompt, 9):
        found = model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(found, expected[:, index])
    assert [layer.keys.untyped_storage().data_ptr() for layer in cache.layers] == room
    assert cache.get_seq_length() == 9


def test_what_is_no_growing_cache_stays_as_it_is() -> None:
    take_room(None, 3)
    sliding = DynamicCache(
        config=LlamaConfig(num_hidden_layers=2, sliding_window=4, layer_types=["sliding_attention"] * 2)
    )
    layers = list(sliding.layers)
    take_room(sliding, 3)
    assert sliding.layers == layers


@torch.inference_mode()
def test_the_last_logits_alone_reach_the_head_without_gaps(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    seen = list[torch.Tensor]()
    model.lm_head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    tokens = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    found = model(tokens, **last_logits(model)).logits
    assert seen[0].shape[1] == 1
    assert seen[0].is_contiguous()
    torch.testing.assert_close(found, model(tokens).logits[:, -1:])


def test_a_model_that_cannot_keep_logits_is_not_asked_to() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    assert last_logits(cast("PreTrainedModel", Plain())) == {}
