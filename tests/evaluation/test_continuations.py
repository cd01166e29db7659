"""What models write on from prompts, and over what they are timed."""

from pathlib import Path

import pytest
import torch

from tests.models.tiny import save_tiny
from ulbq.errors import InputError, NumericsError
from ulbq.evaluation import continuations
from ulbq.evaluation.continuations import continue_prompts, opening
from ulbq.evaluation.results import Continuation
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve

PROMPTS = ("once upon a time", "a quick brown fox")


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return resolve(save_tiny("llama", tmp_path / "base", tied=False))


def written(source: ModelSource, *prompts: str, **options) -> tuple[Continuation, ...]:
    return continue_prompts(load_model(source, dtype=torch.float32), source.tokenizer(), prompts, **options)


def greedy_tokens(source: ModelSource, prompt: str, count: int) -> list[int]:
    """What the likeliest next tokens are, without a cache and without transformers' generate."""
    model = load_model(source, dtype=torch.float32)
    tokens = source.tokenizer()(prompt, return_tensors="pt").input_ids
    first = tokens.shape[1]
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, first:].tolist()


def test_the_likeliest_tokens_of_every_prompt(source):
    found = written(source, *PROMPTS, new_tokens=12)
    assert [one.prompt for one in found] == list(PROMPTS)
    for one in found:
        wanted = greedy_tokens(source, one.prompt, 12)
        assert one.text == source.tokenizer().decode(wanted, skip_special_tokens=True)
        assert (one.new_tokens, one.timed_tokens, one.template) == (12, 12, None)
        assert one.tokens_per_second is not None
        assert one.device.startswith("cpu, ")


def test_two_lines_where_nothing_else_is_asked(source):
    assert written(source, PROMPTS[0])[0].timed_tokens == continuations.NEW_TOKENS == 32


def test_a_model_that_ends_early_is_timed_as_long_as_the_others(source):
    third = greedy_tokens(source, PROMPTS[0], 3)[-1]
    (source.path / "generation_config.json").write_text(f'{{"eos_token_id": [{third}]}}')
    found = written(source, PROMPTS[0], new_tokens=12)[0]
    assert found.new_tokens <= 3
    assert found.timed_tokens == 12
    assert found.tokens_per_second is not None


def test_a_model_that_ends_at_once_wrote_nothing(source):
    first = greedy_tokens(source, PROMPTS[0], 1)[0]
    (source.path / "generation_config.json").write_text(f'{{"eos_token_id": {first}}}')
    tokenizer = source.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(first)]})
    found = written(source, PROMPTS[0], new_tokens=4)[0]
    assert (found.text, found.new_tokens, found.timed_tokens) == ("", 1, 4)


def test_a_single_token_has_no_speed(source):
    assert written(source, PROMPTS[0], new_tokens=1)[0].tokens_per_second is None


def test_speed_is_that_of_the_tokens_behind_the_first_of_the_second_go(source, monkeypatch):
    goes: list[list[float]] = []

    def run(model, tokenizer, tokens, settings, stream, *, cuda_graphs):
        # The prompt, and five tokens: half a second each in the first go, a tenth in the second.
        step = 0.1 if goes else 0.5
        stream.put(torch.tensor([tokens]))
        for token in (70, 71, 72, 73, 74):
            stream.put(torch.tensor([token]))
        stream.times = [1.0, 3.0, *(3.0 + step * (place + 1) for place in range(4))]
        goes.append(stream.times)

    monkeypatch.setattr(continuations, "write_on", run)
    found = written(source, PROMPTS[0], new_tokens=5)[0]
    assert len(goes) == 2
    assert found.tokens_per_second == pytest.approx(10.0)


def test_a_layout_stands_around_the_prompt(source):
    tokenizer = source.tokenizer()
    assert tokenizer.decode(opening("hello", tokenizer, "chat")) == "user: hello\n"
    assert "### Instruction:\nhello\n" in tokenizer.decode(opening("hello", tokenizer, "alpaca"))
    found = written(source, "hello", template="chat", new_tokens=6)[0]
    assert found.template == "chat"
    wanted = greedy_tokens(source, "user: hello\n", 6)
    assert found.text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_a_chat_template_that_refuses_is_told_with_the_option(source):
    tokenizer = source.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(InputError, match="`prompts`: the chat template refuses it"):
        opening("hello", tokenizer, "chat")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_no_text(source, value):
    model = load_model(source, dtype=torch.float32)
    model.lm_head.weight.data[5] = value
    with pytest.raises(NumericsError, match="not finite"):
        continue_prompts(model, source.tokenizer(), PROMPTS, new_tokens=4)
