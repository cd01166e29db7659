from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.data.byte_tokenizer import ByteTokenizer
from ulbq.data.generate import self_samples
from ulbq.errors import NumericsError, UsageError
from ulbq.progress import Silent


class CountingModel:
    """Always says the token after the last one, and refuses to be told what it knows already."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=258))

    def __call__(self, input_ids: torch.Tensor, past_key_values: int | None, use_cache: bool) -> SimpleNamespace:
        assert use_cache
        seen = past_key_values or 0
        assert seen == 0 or input_ids.shape[1] == 1
        logits = torch.nn.functional.one_hot((input_ids + 1) % 256, 258) * 1000.0
        return SimpleNamespace(logits=logits, past_key_values=seen + input_ids.shape[1])


class SpecialBytes(ByteTokenizer):
    added_tokens_decoder = {257: SimpleNamespace(special=True), 7: SimpleNamespace(special=False)}  # noqa: RUF012
    all_special_ids = [256]  # noqa: RUF012


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
def test_each_sample_goes_on_from_its_own_last_token(bos: bool) -> None:
    found = self_samples(CountingModel(), SpecialBytes(bos=bos), samples=20, length=12, seed=0, progress=Silent())
    assert found.name == "self"
    assert found.tokens.shape == (20, 12)
    assert not bos or (found.tokens[:, 0] == 256).all()
    words = found.tokens[:, int(bos) :]
    assert torch.equal(words, (words[:, :1] + torch.arange(words.shape[1])) % 256)
    assert len(words[:, 0].unique()) > 10


def test_special_tokens_are_never_written() -> None:
    class Talkative(CountingModel):
        def __call__(self, **inputs: object) -> SimpleNamespace:  # type: ignore[override]
            output = super().__call__(**inputs)
            output.logits = torch.zeros_like(output.logits)
            output.logits[..., 256:] = 50.0
            return output

    tokens = self_samples(Talkative(), SpecialBytes(), samples=16, length=40, seed=0, progress=Silent()).tokens
    assert tokens.max() < 256
    assert (tokens == 7).any()  # added, but text


def test_tokens_that_the_model_does_not_have_are_never_written() -> None:
    class Small(CountingModel):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))

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
    found = self_samples(model, tokenizer, samples=3, length=10, seed=5, progress=Silent()).tokens
    assert torch.equal(torch.get_rng_state(), state)
    # The plain way: everything anew at every step.
    generator = torch.Generator().manual_seed(5)
    allowed = torch.arange(3, 256)
    tokens = allowed[torch.randint(253, (3, 1), generator=generator)]
    with torch.no_grad():
        while tokens.shape[1] < 10:
            chances = model(tokens).logits[:, -1, 3:].softmax(-1)
            tokens = torch.cat([tokens, allowed[torch.multinomial(chances, 1, generator=generator)]], dim=1)
    assert torch.equal(found, tokens)
    other = self_samples(model, tokenizer, samples=3, length=10, seed=6, progress=Silent()).tokens
    assert not torch.equal(found, other)


def test_progress_ends_where_it_was_promised() -> None:
    told = Counted()
    self_samples(CountingModel(), SpecialBytes(), samples=20, length=12, seed=0, progress=told)
    assert told.steps == told.total == 22  # two batches of eleven steps


def test_broken_logits_are_an_error() -> None:
    class Broken(CountingModel):
        def __call__(self, **inputs: object) -> SimpleNamespace:  # type: ignore[override]
            output = super().__call__(**inputs)
            output.logits[0, -1, 3] = float("nan")
            return output

    with pytest.raises(NumericsError, match="not finite"):
        self_samples(Broken(), SpecialBytes(), samples=2, length=4, seed=0, progress=Silent())


@pytest.mark.parametrize(("samples", "length"), [(0, 4), (1, 1)])
def test_nothing_to_write(samples: int, length: int) -> None:
    with pytest.raises(UsageError):
        self_samples(CountingModel(), SpecialBytes(), samples=samples, length=length, seed=0, progress=Silent())
