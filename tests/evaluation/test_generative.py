"""Scores of written answers: a tiny model's own, and answers put into its mouth."""

import weakref
from math import sqrt
from pathlib import Path

import pytest
import torch

from tests.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from ulbq.data.prompts import prompt_tokens
from ulbq.errors import UsageError
from ulbq.evaluation.generative import KEPT, run_generative, with_groups
from ulbq.evaluation.generative_tasks import LoadedGroup, LoadedTask, load_generative
from ulbq.evaluation.lm import LanguageModel, ends_of
from ulbq.evaluation.results import Measured, TaskScore, Writing
from ulbq.progress import Silent


@pytest.fixture(scope="module")
def long_model():
    """A tiny Llama that holds a prompt of Alpaca's in the tiny tokenizer's single bytes."""
    return tiny_model(tiny_config("llama", tied=False, max_position_embeddings=2048))


def load(name: str, mirror: Path, **options) -> LoadedTask:
    return load_generative([name], data_dir=mirror, **options).tasks[0]


@pytest.fixture
def says(monkeypatch):
    """Lets the model say given texts, and keeps what it was asked."""
    asked = []

    def put(*texts: str):
        def write_after(self, rows, **options):
            asked.append((rows, options))
            return [texts[number % len(texts)] for number in range(len(rows))]

        monkeypatch.setattr(LanguageModel, "write_after", write_after)
        return asked

    return put


def test_answers_are_right_or_wrong_or_not_found(long_model, tokenizer, mirror, says):
    asked = says("Nothing.", "1 + 1 = 2", "3", "It is 6, I think.\n\n### Instruction:\nWhat is 4?", "7")
    found = run_generative(long_model, tokenizer, load("svamp", mirror), template="alpaca")
    assert [sample.right for sample in found.samples] == [False, True, False, True, False]
    assert [sample.extracted for sample in found.samples] == [None, 2.0, 3.0, 6.0, 7.0]
    assert found.samples[3].text == "It is 6, I think.\n\n"
    assert "What is 3 + 3?" in found.samples[3].prompt
    metric = found.score.metrics["exact_match"]
    assert metric.value == 0.4
    assert metric.stderr == pytest.approx(sqrt(0.4 * 0.6 / 4))
    assert found.score.samples == 5
    assert found.score.fewshot == 0
    assert found.score.writing == Writing(template="alpaca", new_tokens=256, unanswered=1)
    ((rows, options),) = asked
    assert rows[3] == prompt_tokens("alpaca", "What is 3 + 3?", tokenizer, where="here")
    assert options["new_tokens"] == 256
    assert not options["sampling"]["do_sample"]


def test_the_standard_error_is_that_of_lm_eval(long_model, tokenizer, mirror, says):
    metrics = pytest.importorskip("lm_eval.api.metrics")
    says("Nothing.", "true", "true")
    found = run_generative(long_model, tokenizer, load("boolq-instruct", mirror), template="alpaca")
    right = [float(sample.right) for sample in found.samples]
    assert 0 < sum(right) < 7
    assert found.score.metrics["exact_match"].stderr == pytest.approx(metrics.mean_stderr(right))


def test_one_document_has_no_standard_error(long_model, tokenizer, mirror, says):
    says("0")
    score = run_generative(long_model, tokenizer, load("svamp", mirror, limit=1), template="alpaca").score
    assert score.metrics["exact_match"] == Measured(value=1.0, stderr=None, higher_is_better=True)


def test_a_few_samples_are_kept(long_model, tokenizer, mirror, says):
    says("0")
    loaded = load("svamp", mirror)
    found = run_generative(long_model, tokenizer, LoadedTask(loaded.task, loaded.documents * 10), template="alpaca")
    assert len(found.samples) == KEPT < found.score.samples == 50


@pytest.mark.parametrize("template", ["alpaca", "gsm8k"])
def test_batches_write_what_single_prompts_do(long_model, tokenizer, mirror, template):
    """In float32; in bf16 the same holds but where two tokens are almost equally likely."""
    assert long_model.dtype == torch.float32
    options = {"template": template, "new_tokens": 12}
    alone = run_generative(long_model, tokenizer, load("piqa-instruct", mirror), batch_size=1, **options)
    together = run_generative(long_model, tokenizer, load("piqa-instruct", mirror), batch_size=8, **options)
    assert alone == together
    assert run_generative(long_model, tokenizer, load("piqa-instruct", mirror), **options) == alone
    assert len({sample.text for sample in alone.samples}) > 1


def test_answers_are_those_of_plain_greedy_decoding(long_model, tokenizer, mirror):
    """Token by token, without a cache, without padding."""
    found = run_generative(long_model, tokenizer, load("piqa-instruct", mirror), template="gsm8k", new_tokens=6)
    for sample in found.samples:
        tokens = tokenizer.encode(sample.prompt, add_special_tokens=False)
        before = len(tokens)
        for _ in range(6):
            tokens.append(int(long_model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        assert sample.text == tokenizer.decode(tokens[before:], skip_special_tokens=True)


def test_a_models_settings_for_sampling_have_no_say(tokenizer, mirror):
    model = tiny_model(tiny_config("llama", tied=False, max_position_embeddings=2048))
    options = {"template": "gsm8k", "new_tokens": 12}
    plain = run_generative(model, tokenizer, load("piqa-instruct", mirror), **options)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1)
    assert run_generative(model, tokenizer, load("piqa-instruct", mirror), **options) == plain


def test_an_answer_ends_at_the_tokenizers_end_too(tokenizer, mirror):
    """Training closes answers with the tokenizer's end of text, whatever a model's own settings name."""
    model = tiny_model(tiny_config("llama", tied=False, max_position_embeddings=2048))
    model.generation_config.eos_token_id = [77]
    assert ends_of(model, tokenizer.eos_token_id) == [tokenizer.eos_token_id, 77]
    row = prompt_tokens("gsm8k", "a", tokenizer, where="here")
    (free,) = LanguageModel(model, tokenizer).write_after([row], stops=[], new_tokens=8, sampling={})
    first = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first
    (ended,) = LanguageModel(model, tokenizer).write_after([row], stops=[], new_tokens=8, sampling={})
    assert len(ended) < len(free)


def test_a_prompt_that_loses_its_beginning_is_told(model, tokenizer, mirror):
    class Heard(Silent):
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    heard = Heard()
    run_generative(model, tokenizer, load("svamp", mirror), template="alpaca", new_tokens=200, progress=heard)
    assert heard.notes == [
        "Of svamp, 5 of 5 prompts lose their beginning: the model holds 256 tokens, the answer's 200 among them."
    ]


def test_a_batch_that_does_not_fit_is_halved(long_model, tokenizer, mirror, monkeypatch):
    options = {"template": "gsm8k", "new_tokens": 6}
    wanted = run_generative(long_model, tokenizer, load("piqa-instruct", mirror), **options)
    plain, tried, alive = type(long_model).generate, [], []

    def small(self, **given):
        tried.append(len(given["input_ids"]))
        assert not any(left() is not None for left in alive)  # what the try before held is free
        cache = torch.zeros(1)
        alive.append(weakref.ref(cache))
        if len(given["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, **given)

    monkeypatch.setattr(type(long_model), "generate", small)
    assert run_generative(long_model, tokenizer, load("piqa-instruct", mirror), **options) == wanted
    assert tried[0] > 1


def test_a_chat_template_lays_questions_out(long_model, mirror, says):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        run_generative(long_model, tokenizer, load("svamp", mirror), template="chat")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}bot:"
    says("0")
    found = run_generative(long_model, tokenizer, load("svamp", mirror), template="chat")
    assert found.samples[1].prompt == "<s>What is 1 + 1?</s>bot:"
    assert found.score.writing is not None
    assert found.score.writing.template == "chat"


def score(value: float, stderr: float | None, samples: int = 10, unanswered: int = 0) -> TaskScore:
    return TaskScore(
        metrics={"exact_match": Measured(value=value, stderr=stderr, higher_is_better=True)},
        samples=samples,
        fewshot=0,
        version="1",
        writing=Writing(template="alpaca", new_tokens=32, unanswered=unanswered),
    )


def test_a_group_is_the_plain_mean_of_its_members():
    scores = {"a": score(0.2, 0.03), "b": score(0.6, 0.04, samples=1000, unanswered=7), "c": score(0.9, 0.1)}
    found = with_groups(scores, [LoadedGroup("both", ("a", "b"), ())])
    assert list(found) == ["both", "a", "b", "c"]
    both = found["both"]
    assert both.metrics["exact_match"].value == pytest.approx(0.4)
    assert both.metrics["exact_match"].stderr == pytest.approx(0.025)
    assert both.samples == 1010
    assert both.writing == Writing(template="alpaca", new_tokens=32, unanswered=7)
    assert (both.version, both.member_of) == ("1", None)
    assert (found["a"].member_of, found["b"].member_of, found["c"].member_of) == ("both", "both", None)


def test_a_group_that_lacks_members_says_so_in_its_version():
    found = with_groups({"a": score(0.2, None)}, [LoadedGroup("g", ("a",), ("b", "c"))])
    assert found["g"].version == "1, 1 of 3 sets"
    assert found["g"].metrics["exact_match"].stderr is None


def test_guessing_takes_one_of_the_answers_that_a_question_names(long_model, tokenizer, mirror, says):
    says("true")
    wanted = {"svamp": None, "aqua": 0.2, "boolq-instruct": 0.5}
    for name, chance in wanted.items():
        score = run_generative(long_model, tokenizer, load(name, mirror), template="alpaca").score
        assert score.metrics["exact_match"].chance == chance
    rule = load("piqa-instruct", mirror).task.rule
    asked = ("Choose: solution1 or solution2", "only solution1", "")
    assert [rule.chance(question) for question in asked] == [0.5, 1, 0.5]
