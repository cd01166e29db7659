import math
from types import SimpleNamespace

import pytest
import torch

from ulbq.data.registry import texts
from ulbq.errors import NumericsError, UsageError
from ulbq.evaluation.perplexity import negative_log_likelihood, perplexity
from ulbq.evaluation.text import text_windows
from ulbq.models.load import load_model

WINDOWS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))


class Speaks:
    """Stands in for a model that gives the same logits everywhere."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(logits)))

    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_equals_the_loss_that_transformers_computes(model):
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in WINDOWS]
    found = perplexity(model, WINDOWS)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found.windows, found.context, found.tokens) == (5, 24, 5 * 23)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_does_not_depend_on_the_batch_size(model, batch_size):
    assert perplexity(model, WINDOWS, batch_size=batch_size).value == pytest.approx(perplexity(model, WINDOWS).value)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity():
    assert perplexity(Speaks(torch.zeros(250)), WINDOWS).value == pytest.approx(250)


def test_likelihoods_of_bf16_logits_are_taken_in_float32():
    logits = torch.linspace(-4, 4, 1000).to(torch.bfloat16).expand(1, 3, -1)
    wanted = -logits[0, 0].double().log_softmax(-1)[7].item() * 3
    assert negative_log_likelihood(logits, torch.full((1, 3), 7)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    logits = torch.zeros(250)
    logits[7] = bad
    with pytest.raises(NumericsError, match="not finite"):
        perplexity(Speaks(logits), WINDOWS)


def test_a_window_of_one_token_is_refused(model):
    with pytest.raises(UsageError, match="predicts nothing"):
        perplexity(model, WINDOWS[:, :1])


def test_progress_counts_every_window_and_shows_the_value_so_far(model):
    seen = []

    class Phase:
        def advance(self, steps=1, detail=""):
            seen.append((steps, float(detail)))

    class Reporter:
        def phase(self, name, total=None):
            seen.append((name, total))
            return self

        def __enter__(self):
            return Phase()

        def __exit__(self, *_):
            return None

    found = perplexity(model, WINDOWS, batch_size=2, progress=Reporter(), label="reading")
    assert seen[0] == ("reading", 5)
    assert [steps for steps, _ in seen[1:]] == [2, 2, 1]
    assert seen[-1][1] == pytest.approx(found.value, abs=0.01)


@pytest.mark.real
@pytest.mark.slow
def test_the_default_model_has_its_known_perplexity(default_source, data_dir):
    """The figure that every quantized model is compared with; two minutes on two cores."""
    model = load_model(default_source, dtype=torch.bfloat16)
    read = texts("wikitext2", "test", data_dir=data_dir, offline=True)
    windows = text_windows(read, default_source.tokenizer(), context=1024, limit=32)
    assert perplexity(model, windows).value == pytest.approx(24.19, abs=0.05)
