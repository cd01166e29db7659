import weakref

import pytest
import torch

from tests.models.tiny import FAMILIES, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from ulbq.blockwise.streamed import StreamedModel
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation.lm import LanguageModel
from ulbq.models.load import load_model
from ulbq.models.source import resolve

PAIRS = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([5, 6, 7], [11]), ([20], [21, 22, 23, 24]), ([30] * 40, [31])]


def one_by_one(model, pairs):
    """Scores computed the plain way: one sequence at a time, all its logits, float64."""
    found = []
    for before, answer in pairs:
        logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].double()
        wanted = torch.tensor(answer)
        score = logits.log_softmax(-1)[torch.arange(len(answer)), wanted].sum().item()
        found.append((score, bool((logits.argmax(-1) == wanted).all())))
    return found


def assert_same(found, wanted):
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_scores_equal_those_of_single_sequences(model, tokenizer, batch_size):
    assert_same(LanguageModel(model, tokenizer, batch_size=batch_size).score(PAIRS), one_by_one(model, PAIRS))


def test_greedy_answers_are_recognised(model, tokenizer):
    said = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    other = (said + 1) % 256
    assert [
        greedy for _, greedy in LanguageModel(model, tokenizer).score([([5, 6, 7], [said]), ([5, 6, 7], [other])])
    ] == [
        True,
        False,
    ]


def test_answers_of_one_token_to_one_question_cost_one_sequence(model, tokenizer, monkeypatch):
    lm, rows = LanguageModel(model, tokenizer), []
    plain = lm._logits
    monkeypatch.setattr(lm, "_logits", lambda tokens, first: rows.append(len(tokens)) or plain(tokens, first))
    lm.score([([5, 6, 7], [answer]) for answer in range(10, 14)])
    assert rows == [1]


def test_a_prompt_that_is_too_long_loses_its_beginning(model, tokenizer):
    lm = LanguageModel(model, tokenizer)
    long = list(range(3, 250)) * 2
    kept = long[-(lm.max_length + 1 - 2) :]
    assert_same(lm.score([(long, [8, 9])]), one_by_one(model, [(kept, [8, 9])]))


def test_a_batch_that_does_not_fit_is_halved(model, tokenizer, monkeypatch):
    lm, tried, alive = LanguageModel(model, tokenizer, batch_size=4), [], []
    plain = lm._logits

    def small(tokens, first):
        tried.append(len(tokens))
        assert not any(left() is not None for left in alive)  # what the try before held is free
        activations = torch.zeros(1)
        alive.append(weakref.ref(activations))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(tokens, first)

    monkeypatch.setattr(lm, "_logits", small)
    assert_same(lm.score(PAIRS), one_by_one(model, PAIRS))
    assert tried[0] > 1


def test_one_sequence_that_does_not_fit_is_a_sentence(model, tokenizer, monkeypatch):
    lm = LanguageModel(model, tokenizer)

    def full(tokens, first):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lm, "_logits", full)
    with pytest.raises(ResourceError, match="no memory for a prompt of 40 tokens"):
        lm.score(PAIRS)


def test_a_model_that_always_computes_every_logit_scores_alike(model, tokenizer):
    lm = LanguageModel(model, tokenizer)
    lm._keeps_logits = False
    assert_same(lm.score(PAIRS), one_by_one(model, PAIRS))


def test_answers_do_not_depend_on_their_neighbours(model, tokenizer):
    prompts = ["the cat", "a much longer prompt that needs no padding at all", "x"]
    together = LanguageModel(model, tokenizer).write(prompts, stops=[], new_tokens=8, sampling={})
    alone = [LanguageModel(model, tokenizer).write([one], stops=[], new_tokens=8, sampling={})[0] for one in prompts]
    assert together == alone
    assert all(together)


def test_an_answer_ends_soon_after_its_stop_sequence(model, tokenizer):
    lm = LanguageModel(model, tokenizer)
    (free,) = lm.write(["the cat"], stops=[], new_tokens=12, sampling={})
    stop = free[2:4]
    (stopped,) = lm.write(["the cat"], stops=[stop], new_tokens=12, sampling={})
    assert stop in stopped
    assert free.startswith(stopped)
    assert len(stopped) < len(free)


def test_an_answer_longer_than_the_model_is_refused(model, tokenizer):
    with pytest.raises(UsageError, match="256 in all"):
        LanguageModel(model, tokenizer).write(["x"], stops=[], new_tokens=256, sampling={})


def test_special_tokens_are_not_added_twice(model):
    lm = LanguageModel(model, tiny_tokenizer())
    assert lm.encode("<s>ab")[0] == lm.first_token
    assert lm.encode("<s>ab").count(lm.first_token) == 1


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        LanguageModel(tiny_model(tiny_config("llama")), tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_alike_in_padded_batches(family, tokenizer):
    model = tiny_model(tiny_config(family))
    assert_same(LanguageModel(model, tokenizer, batch_size=3).score(PAIRS), one_by_one(model, PAIRS))


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_streamed_model_scores_alike_in_waves_of_similar_length(tmp_path, tokenizer, batch_size, monkeypatch):
    source = resolve(save_tiny("llama", tmp_path / "m", tied=False))
    loaded = load_model(source, dtype=torch.float32)
    streamed = StreamedModel(source, dtype=torch.float32, device=torch.device("cpu"), directory=tmp_path)
    waves, plain = [], streamed.pass_blocks
    monkeypatch.setattr(streamed, "pass_blocks", lambda tokens, size: waves.append(tokens.shape) or plain(tokens, size))
    found = LanguageModel(streamed, tokenizer, batch_size=batch_size).score(PAIRS)
    assert_same(found, one_by_one(loaded, PAIRS))
    assert [(rows, length) for rows, length in waves] == [(1, 40), (3, 4)]
