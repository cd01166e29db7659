"""Losses of a whole model: the text's next tokens, a teacher's predictions, a teacher's hidden states.

A teacher's prediction of one token is a distribution over the whole vocabulary, or over its best guesses and one lump
for all others; entropies and divergences of the lumped form are those of that coarser distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ulbq.config.finetuning import Loss
from ulbq.config.training import TokenWeighting
from ulbq.training.losses import output_loss, token_weights


@dataclass(frozen=True)
class Predicted:
    """Log-probabilities of the next token, float32.

    Attributes:
        values: ``[..., vocabulary]``; with ``ids`` ``[..., k + 1]``, the last one that of all other tokens together.
        ids: int64 ``[..., k]``, which tokens; None for all of them in order.
    """

    values: torch.Tensor
    ids: torch.Tensor | None = None


def predicted(logits: torch.Tensor, ids: torch.Tensor | None = None) -> Predicted:
    """What logits ``[..., vocabulary]`` predict, of all tokens or of those in ``ids`` ``[..., k]`` and the rest.

    The rest is minus infinity where ``ids`` leave no token out; differentiable.
    """
    logits = logits.float()
    if ids is None:
        return Predicted(logits.log_softmax(-1))
    total = logits.logsumexp(-1, keepdim=True)
    named = logits.gather(-1, ids) - total
    if ids.shape[-1] == logits.shape[-1]:
        rest = torch.full_like(total, -torch.inf)
    else:
        # Not log(1 − Σ named): where the best guesses hold nearly all, nothing of the rest would survive.
        rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - total
    return Predicted(torch.cat([named, rest], -1), ids)


def best_guesses(logits: torch.Tensor, k: int) -> Predicted:
    """The ``k`` most probable tokens, the best first, and the rest as one lump; all tokens where there are no more."""
    ids = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return predicted(logits, ids)


def entropy(prediction: Predicted) -> torch.Tensor:
    """Entropy ``[...]`` in nats; of best guesses and a lump, at most that of the whole distribution."""
    return -_mean_under(prediction.values, prediction.values)


def divergence(teacher: Predicted, logits: torch.Tensor) -> torch.Tensor:
    """``KL(teacher ‖ student)`` of each token, ``[...]`` in nats.

    Over best guesses and the lump it is a lower bound of that over the vocabulary, and equal where the guesses are the
    vocabulary.

    Args:
        teacher: without a gradient.
        logits: the student's, ``[..., vocabulary]``.
    """
    student = predicted(logits, teacher.ids).values
    return _mean_under(teacher.values, teacher.values - student)


def _mean_under(log_probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``Σ p·v`` over the last dimension; what is impossible adds nothing, whatever its value."""
    possible = log_probabilities > -torch.inf
    # Replaced in the values and not in the product: there the gradient would still be 0 · infinity.
    return (log_probabilities.exp() * torch.where(possible, values, 0.0)).sum(-1)


def cross_entropy(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token in nats, ``[n]`` float32; 0 where there is none.

    Args:
        logits: ``[n, vocabulary]``.
        following: int64 ``[n]``; -100 for none.
    """
    return nn.functional.cross_entropy(logits.float(), following, reduction="none", ignore_index=-100)


def token_terms(
    loss: Loss, logits: torch.Tensor, following: torch.Tensor, teacher: Predicted | None, gamma: float
) -> tuple[torch.Tensor, ...]:
    """What a loss adds up of each token, float32 ``[n]`` each.

    The divergence where there is a teacher, the text's cross-entropy where the text counts, and for ``dad`` the
    divergence's weight before it is normed, ``(H_T · H_S)^γ``, without a gradient.

    Args:
        loss: which.
        logits: the student's, ``[n, vocabulary]``.
        following: int64 ``[n]``, next tokens, -100 for none.
        teacher: its predictions of the same tokens; None for ``ce``.
        gamma: exponent of the entropies.
    """
    if teacher is None:
        return (cross_entropy(logits, following),)
    distances = divergence(teacher, logits)
    if loss not in {"dad", "ce-kl"}:
        return (distances,)
    text = cross_entropy(logits, following)
    if loss == "ce-kl":
        return distances, text
    with torch.no_grad():
        both = entropy(teacher) * entropy(predicted(logits, teacher.ids))
        weights = both.clamp_min(torch.finfo(torch.float32).tiny) ** gamma
    return distances, text, weights


def mean_loss(loss: Loss, terms: Sequence[torch.Tensor], following: torch.Tensor) -> torch.Tensor:
    """The loss of tokens from their terms: a scalar, in nats a token.

    ``ce`` is the mean cross-entropy of the text, ``kl`` (and ``kl-hidden``, as far as it is about predictions) the
    mean divergence from the teacher, ``ce-kl`` their sum. ``dad`` is DB-LLM's deviation-aware distillation,

    ``mean_t w_t · KL(p_T(t) ‖ p_S(t)) + CE(text)``, ``w_t ∝ (H_T(t) · H_S(t))^γ`` with mean 1 over the tokens.

    The paper (https://arxiv.org/abs/2402.11960) weighs the distillation by both entropies, so that ambiguous tokens
    count more, and leaves the formula open in places. Chosen here: the weights are constants in the gradient (else the
    student could lower its loss by being sure); their mean is 1, so that γ does not change the loss's size against
    the text's; the divergence stands for the cross-entropy to the teacher, from which it differs by the teacher's own
    entropy, a constant in the gradient, but it is 0 for equal predictions. Of a cached teacher the entropies are those
    over best guesses and lump.

    Args:
        loss: which.
        terms: of :func:`token_terms`.
        following: as there.
    """
    if loss == "ce":
        return _mean_of_text(terms[0], following)
    weights = terms[2] if loss == "dad" else torch.ones_like(terms[0])
    distilled = (weights * terms[0]).sum() / weights.sum()
    return distilled + _mean_of_text(terms[1], following) if len(terms) > 1 else distilled


def term_shares(loss: Loss, following: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What each of a token's terms adds to :func:`mean_loss`, which is then their sum; scalars. Not for ``dad``.

    Args:
        loss: which.
        following: of all tokens, as in :func:`token_terms`.
    """
    every, text = torch.ones_like(following).sum().reciprocal(), (following >= 0).sum().reciprocal()
    return {"ce": (text,), "ce-kl": (every, text)}.get(loss, (every,))


def _mean_of_text(entropies: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return entropies.sum() / (following >= 0).sum()


def hidden_error(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the relative squared distance of hidden states, each token weighed by its own energy.

    BinaryMoS adds ``10 · Σ MSE(hidden)``. In a plain mean the first token of a text is all there is to see: its
    activations are hundreds of times those of the others (an attention sink), and it is the one that hardly matters.
    Here a token counts by its relative error, as in the block-wise loss, and layers count alike.

    Args:
        outputs, targets: ``[..., hidden]`` of each layer.

    Returns:
        A scalar: 0 for equal states, 1 for states of zero.
    """
    errors = [
        output_loss(output, target.float(), token_weights(target, TokenWeighting.ENERGY), TokenWeighting.ENERGY)
        for output, target in zip(outputs, targets, strict=True)
    ]
    return torch.stack(errors).mean()
