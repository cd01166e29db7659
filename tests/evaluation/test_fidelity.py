import math

import pytest
import torch

from tests.models.tiny import tiny_config, tiny_model
from ulbq.errors import InputError, NumericsError
from ulbq.evaluation.fidelity import fidelity, kl_divergence

WINDOWS = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))


def test_a_model_is_faithful_to_itself(model):
    found = fidelity(model, model, WINDOWS, text="random")
    assert (found.mean_kl, found.p99_kl, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert (found.text, found.tokens) == ("random", 4 * 24)


def test_measures_every_position_from_the_parent_to_the_model(model, other_model):
    ours, theirs = (one(input_ids=WINDOWS).logits.double().flatten(0, 1) for one in (model, other_model))
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    found = fidelity(model, other_model, WINDOWS, text="random", batch_size=3)
    assert found.mean_kl == pytest.approx(wanted.mean().item(), rel=1e-4)
    assert found.p99_kl == pytest.approx(wanted.quantile(0.99, interpolation="lower").item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    # The divergence is not symmetric: swapped arguments would show.
    assert fidelity(other_model, model, WINDOWS, text="random").mean_kl != pytest.approx(found.mean_kl, rel=1e-3)


def test_divergence_of_two_known_distributions():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    wanted = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(p.log(), q.log() + 3).item() == pytest.approx(wanted, rel=1e-6)


def test_a_token_that_the_parent_rules_out_costs_nothing():
    parent = torch.tensor([[0.0, -math.inf]])
    assert kl_divergence(parent, torch.tensor([[0.0, 0.0]])).item() == pytest.approx(math.log(2))
    assert kl_divergence(parent, parent).item() == 0


def test_another_vocabulary_is_refused(model):
    larger = tiny_model(tiny_config("llama", tied=False, vocab=300))
    with pytest.raises(InputError, match=r"256 logits, its parent 300.*") as caught:
        fidelity(model, larger, WINDOWS, text="random")
    assert "`parent`" in caught.value.hint


def test_logits_that_are_not_finite_are_an_error(model):
    broken = tiny_model(tiny_config("llama", tied=False))
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(NumericsError, match="not finite"):
        fidelity(broken, model, WINDOWS, text="random")
