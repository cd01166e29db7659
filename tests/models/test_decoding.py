"""How tokens become text as they come."""

import torch

from tests.models.tiny import tiny_tokenizer
from ulbq.models.decoding import TextStream


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
