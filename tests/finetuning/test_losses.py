"""Losses of a whole model against their plain definitions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ulbq.config.finetuning import Loss
from ulbq.finetuning.losses import (
    Predicted,
    best_guesses,
    cross_entropy,
    divergence,
    entropy,
    hidden_error,
    mean_loss,
    predicted,
    token_terms,
)

GENERATOR = torch.Generator().manual_seed(0)
TEACHER = 3 * torch.randn(2, 5, 11, generator=GENERATOR)
STUDENT = 3 * torch.randn(2, 5, 11, generator=GENERATOR)
TOKENS = torch.randint(0, 11, (2, 5), generator=GENERATOR)
# The tokens that come next; none after the last.
FOLLOWING = torch.cat([TOKENS[:, 1:], torch.full((2, 1), -100)], 1).flatten()


def loss_of(loss: Loss, teacher: Predicted | None, logits: torch.Tensor, gamma: float = 0.5) -> torch.Tensor:
    """The loss of all positions of both samples."""
    if teacher is not None:
        ids = None if teacher.ids is None else teacher.ids.flatten(0, 1)
        teacher = Predicted(teacher.values.flatten(0, 1), ids)
    return mean_loss(loss, token_terms(loss, logits.flatten(0, 1), FOLLOWING, teacher, gamma), FOLLOWING)


def text_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the text, as torch has it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def test_the_divergence_is_torchs() -> None:
    theirs = nn.functional.kl_div(STUDENT.log_softmax(-1), TEACHER.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(divergence(predicted(TEACHER), STUDENT), theirs)
    assert divergence(predicted(TEACHER), TEACHER).abs().max() < 1e-6


def test_entropies_are_those_of_the_definition() -> None:
    p = TEACHER.softmax(-1)
    torch.testing.assert_close(entropy(predicted(TEACHER)), -(p * p.log()).sum(-1))
    assert entropy(predicted(torch.zeros(7))).item() == pytest.approx(math.log(7))


def lumped(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    p = logits.double().softmax(-1)
    named = p.gather(-1, ids)
    return torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_a_cached_teacher_compares_best_guesses_and_one_lump(k: int) -> None:
    teacher = best_guesses(TEACHER, k)
    assert teacher.ids is not None
    torch.testing.assert_close(teacher.values.double().exp(), lumped(TEACHER, teacher.ids), atol=1e-6, rtol=1e-4)
    p, q = lumped(TEACHER, teacher.ids), lumped(STUDENT, teacher.ids)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(teacher, STUDENT).double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy(teacher).double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-4)


def test_more_guesses_come_closer_from_below_and_all_of_them_are_the_whole() -> None:
    values = [divergence(best_guesses(TEACHER, k), STUDENT) for k in range(1, 12)]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-5).all()
    torch.testing.assert_close(values[-1], divergence(predicted(TEACHER), STUDENT))
    torch.testing.assert_close(divergence(best_guesses(TEACHER, 99), STUDENT), values[-1])


@pytest.mark.parametrize("k", [3, 11])
def test_gradients_are_finite_and_those_of_the_plain_definition(k: int) -> None:
    teacher = best_guesses(TEACHER, k)
    assert teacher.ids is not None
    ours, plain = STUDENT.clone().requires_grad_(), STUDENT.double().requires_grad_()
    divergence(teacher, ours).sum().backward()
    p, named = lumped(TEACHER, teacher.ids), plain.softmax(-1).gather(-1, teacher.ids)
    terms = (p[..., :-1] * (p[..., :-1].log() - named.log())).sum()
    if k < 11:
        terms = terms + (p[..., -1] * (p[..., -1].log() - (1 - named.sum(-1)).log())).sum()
    terms.backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, atol=1e-4, rtol=1e-3)


def test_a_sure_teacher_has_a_rest_that_survives() -> None:
    logits = torch.tensor([100.0, 0.0, 0.0])
    assert best_guesses(logits, 1).values[-1].item() == pytest.approx(math.log(2) - 100, rel=1e-3)
    assert torch.isfinite(divergence(best_guesses(logits, 1), -logits)).all()


def test_the_cross_entropy_is_that_of_the_next_token() -> None:
    expected = -STUDENT.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean()
    torch.testing.assert_close(loss_of("ce", None, STUDENT), expected)
    assert cross_entropy(STUDENT.flatten(0, 1), FOLLOWING)[4] == 0


def test_both_losses_are_the_sum_of_the_two() -> None:
    teacher = predicted(TEACHER)
    expected = divergence(teacher, STUDENT).mean() + text_loss(STUDENT)
    torch.testing.assert_close(loss_of("ce-kl", teacher, STUDENT), expected)
    torch.testing.assert_close(loss_of("kl", teacher, STUDENT), divergence(teacher, STUDENT).mean())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_deviation_aware_weighs_tokens_by_both_entropies(gamma: float) -> None:
    teacher = predicted(TEACHER)
    weights = (entropy(teacher) * entropy(predicted(STUDENT))) ** gamma
    expected = (weights * divergence(teacher, STUDENT)).sum() / weights.sum() + text_loss(STUDENT)
    torch.testing.assert_close(loss_of("dad", teacher, STUDENT, gamma), expected)
    if gamma == 0:
        plain = divergence(teacher, STUDENT).mean() + text_loss(STUDENT)
        torch.testing.assert_close(loss_of("dad", teacher, STUDENT, gamma), plain)


def test_deviation_aware_takes_its_weights_as_constants() -> None:
    teacher, logits = predicted(TEACHER), STUDENT.clone().requires_grad_()
    weights = ((entropy(teacher) * entropy(predicted(STUDENT))) ** 0.5).detach()
    fixed = STUDENT.clone().requires_grad_()
    ((weights / weights.mean() * divergence(teacher, fixed)).mean() + text_loss(fixed)).backward()
    loss_of("dad", teacher, logits, 0.5).backward()
    torch.testing.assert_close(logits.grad, fixed.grad)


def test_deviation_aware_of_a_teacher_that_is_sure_everywhere_is_finite() -> None:
    sure = Predicted(torch.full((2, 5, 11), -torch.inf).index_fill(-1, torch.tensor([4]), 0.0))
    assert torch.isfinite(loss_of("dad", sure, STUDENT, 0.5))


def test_a_sink_token_does_not_hide_the_others_hidden_error() -> None:
    target = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    target[:, 0] *= 1000
    wrong = target.clone()
    wrong[:, 1:] = 0
    assert hidden_error([wrong, target], [target, target]).item() == pytest.approx(5 / 6 / 2)
    assert hidden_error([target], [target]).item() == 0
