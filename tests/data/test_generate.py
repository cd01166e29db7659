from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from tests.data.byte_tokenizer import ByteTokenizer
from ulbq.data import generate
from ulbq.data.generate import _draw, self_samples, text_tokens
from ulbq.errors import NumericsError, UsageError
from ulbq.progress import Silent


def sizes(vocabulary: int) -> PreTrainedConfig:
    return PreTrainedConfig(vocab_size=vocabulary, num_hidden_layers=2, hidden_size=8, num_attention_heads=2)


class CountingModel:
    """Always says the token after the last one, and refuses to be told what it knows already."""

    device = torch.device("cpu")
    dtype = torch.float32
    config = sizes(258)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return self(**inputs)

    def __call__(self, input_ids: torch.Tensor, past_key_values: int | None, use_cache: bool) -> SimpleNamespace:
        assert use_cache
        seen = past_key_values or 0
        assert seen == 0 or input_ids.shape[1] == 1
        logits = torch.nn.functional.one_hot((input_ids + 1) % 256, 258) * 1000.0
        return SimpleNamespace(logits=logits, past_key_values=seen + input_ids.shape[1])


class SpecialBytes(ByteTokenizer):
    added_tokens_decoder = {257: SimpleNamespace(special=True), 7: SimpleNamespace(special=False)}  # noqa: RUF012
    all_special_ids = [256]  # noqa: RUF012


class ChatBytes(SpecialBytes):
    """Byte 1 begins a message and byte 2 ends it; both are special."""

    added_tokens_decoder = {index: SimpleNamespace(special=True) for index in (1, 2, 257)}  # noqa: RUF012
    chat_template = "there is one"

    def __init__(self, opening: str = "Hi\1", *, bos: bool = False) -> None:
        super().__init__(bos=bos)
        self._opening = opening

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        (message,) = messages
        return f"{self._opening}{message['content']}\2A:"


class Counted(Silent):
    """Counts what the one phase was promised and told."""

    total: int | None = None
    steps = 0

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator["Counted"]:
        self.total = total
        yield self

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.steps += steps


@pytest.mark.parametrize("bos", [False, True])
def test_each_text_goes_on_from_its_own_last_token(bos: bool) -> None:
    found = self_samples(CountingModel(), SpecialBytes(bos=bos), samples=20, length=12, seed=0, text_length=4)
    assert found.name == "self"
    assert found.tokens.shape == (20, 12)
    assert not bos or (found.tokens[:, 0] == 256).all()
    texts = found.tokens[:, int(bos) :]
    for start in range(0, texts.shape[1], 4):
        text = texts[:, start : start + 4]
        assert torch.equal(text, (text[:, :1] + torch.arange(text.shape[1])) % 256)
        assert len(text[:, 0].unique()) > 10


def test_one_text_fills_a_sample_where_that_is_asked_for() -> None:
    texts = self_samples(CountingModel(), SpecialBytes(), samples=3, length=200, seed=0, text_length=None).tokens
    assert torch.equal(texts, (texts[:, :1] + torch.arange(200)) % 256)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("begins", ["Hi\1", "\0Hi\1"])
def test_every_second_sample_begins_with_a_chat(begins: str, bos: bool) -> None:
    tokenizer = ChatBytes(begins, bos=bos)
    tokens = self_samples(CountingModel(), tokenizer, samples=9, length=20, seed=0, text_length=8).tokens
    assert tokens.shape == (9, 20)
    opening = list(begins.encode())
    for index, text in enumerate(tokens[:, int(bos) :].tolist()):
        if index % 2 == 0:
            # The special token between a question and its answer may be written here, and nowhere else.
            chat = [*opening, *range(2, 10 - len(opening))]
            assert text[: len(chat)] == chat
            text = text[len(chat) :]
        assert not {1, 2}.intersection(text)


def test_chats_alone() -> None:
    told = Counted()
    found = self_samples(CountingModel(), ChatBytes(), samples=1, length=8, seed=0, text_length=8, progress=told)
    assert found.tokens.tolist() == [[*b"Hi\1", 2, 3, 4, 5, 6]]
    assert told.steps == told.total == 7


def test_texts_and_chats_are_written_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"samples": 9, "length": 24, "seed": 0, "text_length": 8}
    whole = self_samples(CountingModel(), ChatBytes(), **asked).tokens
    monkeypatch.setattr(generate, "_MEMORY", 1)
    told = Counted()
    found = self_samples(CountingModel(), ChatBytes(), **asked, progress=told).tokens
    assert torch.equal(found[::2, :8], whole[::2, :8])
    for start in (0, 8, 16):
        texts = found[1::2, start : start + 8]
        assert torch.equal(texts, (texts[:, :1] + torch.arange(8)) % 256)
    assert told.steps == told.total == 22 * 7  # a text each, and with five of them a chat


@pytest.mark.parametrize("room", [2, 5, 100])
@pytest.mark.parametrize("tokenizer", [SpecialBytes(), ChatBytes()])
def test_turns_that_are_written_together_draw_what_they_would_alone(
    tokenizer: SpecialBytes, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unsure(CountingModel):
        def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> SimpleNamespace:
            found = super().__call__(input_ids, **inputs)
            return SimpleNamespace(logits=found.logits * 1e-3, past_key_values=found.past_key_values)

    monkeypatch.setattr(generate, "_MEMORY", 1)
    asked: dict[str, Any] = {"samples": 9, "length": 24, "seed": 0, "text_length": 8}
    told = Counted()
    found = self_samples(Unsure(), tokenizer, **asked, room=room, progress=told).tokens
    assert torch.equal(found, self_samples(Unsure(), tokenizer, **asked).tokens)
    turns = 22 if isinstance(tokenizer, ChatBytes) else 27
    assert told.steps == told.total == -(-turns // room) * 7


def test_a_beginning_of_text_that_the_template_writes_itself_stands_there_once() -> None:
    class Beginning(ChatBytes):
        bos_token_id = 0

    found = self_samples(CountingModel(), Beginning("\0Hi\1", bos=True), samples=1, length=20, seed=0, text_length=8)
    assert found.tokens[0, :6].tolist() == [0, *b"Hi", 1, 2, 3]


@pytest.mark.parametrize(
    ("tokenizer", "text_length"),
    [
        (SpecialBytes(), 5),
        (ChatBytes("Hi\1"), None),  # one text fills a sample
        (ChatBytes("Hi\1"), 5),  # leaves less than half
        (ChatBytes(""), 5),
        (ChatBytes("\u00ff\1"), 8),  # not in the vocabulary
    ],
)
def test_no_chats_where_there_is_no_room_or_no_template_for_them(
    tokenizer: SpecialBytes, text_length: int | None
) -> None:
    class Small(CountingModel):
        config = sizes(128)

        def __call__(self, **inputs: Any) -> SimpleNamespace:
            output = super().__call__(**inputs)
            output.logits = output.logits[..., :128]
            return output

    found = self_samples(Small(), tokenizer, samples=5, length=20, seed=0, text_length=text_length).tokens
    if isinstance(tokenizer, ChatBytes):
        assert not {1, 2}.intersection(found.flatten().tolist())
    texts = [found] if text_length is None else found.split(text_length, dim=1)
    assert all(len(text[:, 0].unique()) > 2 for text in texts)


def test_special_tokens_are_never_written() -> None:
    class Talkative(CountingModel):
        def __call__(self, **inputs: object) -> SimpleNamespace:  # type: ignore[override]
            output = super().__call__(**inputs)
            output.logits = torch.zeros_like(output.logits)
            output.logits[..., 256:] = 50.0
            return output

    tokens = self_samples(Talkative(), SpecialBytes(), samples=64, length=40, seed=0, progress=Silent()).tokens
    assert tokens.max() < 256
    assert (tokens == 7).any()  # added, but text


def test_tokens_that_the_model_does_not_have_are_never_written() -> None:
    class Small(CountingModel):
        config = sizes(100)

        def __call__(self, **inputs: object) -> SimpleNamespace:  # type: ignore[override]
            output = super().__call__(**inputs)
            output.logits = torch.zeros(*output.logits.shape[:2], 100)
            return output

    tokens = self_samples(Small(), SpecialBytes(), samples=4, length=20, seed=0, progress=Silent()).tokens
    assert tokens.max() < 100


def test_the_cache_changes_nothing(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    state = torch.get_rng_state()
    asked: dict[str, Any] = {"samples": 3, "length": 10, "text_length": 5}
    found = self_samples(model, tokenizer, seed=5, **asked).tokens
    assert torch.equal(torch.get_rng_state(), state)
    # The plain way: everything anew at every step.
    generator = torch.Generator().manual_seed(5)
    allowed = text_tokens(tokenizer, 256)
    banned = torch.ones(256, dtype=torch.bool).index_fill(0, allowed, False)
    tokens = allowed[torch.randint(len(allowed), (6,), generator=generator)].unsqueeze(1)
    with torch.no_grad():
        while tokens.shape[1] < 5:
            chances = model(tokens).logits[:, -1].masked_fill(banned, -torch.inf).softmax(-1).cumsum(-1)
            step = [int((row <= u).sum()) for row, u in zip(chances, torch.rand(6, generator=generator), strict=True)]
            tokens = torch.cat([tokens, torch.tensor(step).unsqueeze(1)], dim=1)
    assert torch.equal(found, tokens.reshape(3, 10))
    other = self_samples(model, tokenizer, seed=6, **asked).tokens
    assert not torch.equal(found, other)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log().expand(20_000, -1)
    drawn = _draw(logits, torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(0)))
    shares = drawn.flatten().bincount(minlength=5) / len(drawn)
    assert shares.tolist() == pytest.approx([0.1, 0, 0.6, 0.3, 0], abs=0.012)  # over three standard errors
    assert shares[1] == shares[4] == 0


def test_a_number_that_rounds_up_to_one_draws_no_impossible_token() -> None:
    assert _draw(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.ones(1, 1)).item() == 1


def test_texts_that_memory_does_not_hold_at_once_are_written_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # Seven texts of four tokens: keys and values of two layers eight wide, twice over, and what a draw takes.
    monkeypatch.setattr(generate, "_MEMORY", 7 * (2 * 4 * (2 * 2 * 8 * 4) + 258 * 18) + 1)
    told = Counted()
    tokens = self_samples(
        CountingModel(), SpecialBytes(), samples=20, length=4, seed=0, text_length=4, progress=told
    ).tokens
    assert told.steps == told.total == 9  # three batches of three steps
    assert torch.equal(tokens, (tokens[:, :1] + torch.arange(4)) % 256)


def test_progress_ends_where_it_was_promised() -> None:
    told = Counted()
    self_samples(CountingModel(), SpecialBytes(), samples=20, length=12, seed=0, progress=told)
    assert told.steps == told.total == 11


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_broken_logits_are_an_error(value: str) -> None:
    class Broken(CountingModel):
        def __call__(self, **inputs: object) -> SimpleNamespace:  # type: ignore[override]
            output = super().__call__(**inputs)
            output.logits[0, -1, 257] = float(value)  # a special token's count too
            return output

    with pytest.raises(NumericsError, match="not finite"):
        self_samples(Broken(), SpecialBytes(), samples=2, length=4, seed=0, progress=Silent())


@pytest.mark.parametrize(("samples", "length"), [(0, 4), (1, 1)])
def test_nothing_to_write(samples: int, length: int) -> None:
    with pytest.raises(UsageError):
        self_samples(CountingModel(), SpecialBytes(), samples=samples, length=length, seed=0, progress=Silent())
