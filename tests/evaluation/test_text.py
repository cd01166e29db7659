from itertools import repeat

import pytest
import torch

from ulbq.errors import InputError, ResourceError
from ulbq.evaluation import text
from ulbq.evaluation.text import logits_of, predictions, text_windows

LINES = [f"line number {number} of a text" for number in range(40)]


class PutsBosFirst:
    """A tokenizer that begins every text with a token of its own, as Llama's does; otherwise one token a character."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [100 + ord(letter) for letter in text]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


def whole(tokenizer):
    return torch.tensor(tokenizer("\n\n".join(LINES), add_special_tokens=False)["input_ids"])


def test_windows_follow_each_other_without_gap_or_overlap(tokenizer):
    windows = text_windows(LINES, tokenizer, context=50)
    tokens = whole(tokenizer)
    assert windows.dtype == torch.int64
    assert len(windows) == len(tokens) // 50
    assert torch.equal(windows.flatten(), tokens[: windows.numel()])


def test_limit_takes_the_first_windows(tokenizer):
    few = text_windows(LINES, tokenizer, context=50, limit=2)
    assert torch.equal(few, text_windows(LINES, tokenizer, context=50)[:2])


def test_an_endless_text_is_read_only_as_far_as_needed():
    class Coarse:
        bos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [7] * (len(text) // 10_000)}

    assert text_windows(repeat("text" * 10_000), Coarse(), context=32, limit=30).shape == (30, 32)


def test_beginning_of_text_stands_once_as_in_the_published_protocol():
    tokenizer = PutsBosFirst()
    windows = text_windows(LINES, tokenizer, context=50)
    assert windows[0, 0] == 1
    assert (windows == 1).sum() == 1
    assert torch.equal(windows.flatten()[1:], whole(tokenizer)[: windows.numel() - 1])


def test_beginning_of_text_stands_before_every_window_on_request():
    tokenizer = PutsBosFirst()
    windows = text_windows(LINES, tokenizer, context=50, bos=True, limit=4)
    assert windows.shape == (4, 50)
    assert (windows[:, 0] == 1).all()
    assert torch.equal(windows[:, 1:].flatten(), whole(tokenizer)[: 4 * 49])


def test_a_tokenizer_without_that_token_gets_none(tokenizer):
    assert torch.equal(text_windows(LINES, tokenizer, context=50, bos=True), text_windows(LINES, tokenizer, context=50))


def test_too_short_a_text_is_refused_with_its_length(tokenizer):
    with pytest.raises(InputError, match=r"note\.txt holds 2 tokens") as caught:
        text_windows(["ab "], tokenizer, context=64, name="note.txt")
    assert "`context`" in caught.value.hint


def test_batches_hold_every_window_once(model):
    windows = torch.arange(70).view(7, 10)
    found = list(predictions(model, windows, 3))
    assert [(len(batch), len(logits)) for batch, logits in found] == [(3, 3), (3, 3), (1, 1)]
    assert torch.equal(torch.cat([batch for batch, _ in predictions(model, windows, None)]), windows)


def test_a_full_device_is_a_sentence(model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model), "forward", full)
    with pytest.raises(ResourceError, match="2 windows of 10 tokens"):
        logits_of(model, torch.zeros(2, 10, dtype=torch.int64))


def test_answers_side_by_side_have_room_for_their_keys_and_values(model, monkeypatch):
    config = model.config
    each = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 100
    assert text.sequences_per_batch(model, 100) == text._CPU_SEQUENCES
    monkeypatch.setattr(text, "_CPU_CACHE", 5 * each + 1)
    assert text.sequences_per_batch(model, 100) == 5
    assert text.sequences_per_batch(model, 50) == 10
    assert text.sequences_per_batch(model, 100_000) == 1
