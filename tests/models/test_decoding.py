"""How tokens become text as they come."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models.tiny import tiny_tokenizer
from ulbq.models.decoding import TextStream, batched_attention


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
