"""Losses of a whole model: the text's next tokens, a teacher's predictions, a teacher's hidden states.

A teacher's prediction of one token is a distribution over the whole vocabulary, or over its best guesses and one lump
for all others; entropies and divergences of the lumped form are those of that coarser distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ulbq.training.losses import TokenWeighting, output_loss, token_weights

Loss = Literal["ce", "kl", "kl-hidden", "dad"]


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


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the text in nats a token.

    Args:
        logits: ``[batch, length, vocabulary]``.
        tokens: int64 ``[batch, length]``.
    """
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def deviation_aware(teacher: Predicted, logits: torch.Tensor, tokens: torch.Tensor, gamma: float) -> torch.Tensor:
    """DB-LLM's deviation-aware distillation, a mean in nats a token.

    ``mean_t w_t · KL(p_T(t) ‖ p_S(t)) + CE(text)``, ``w_t ∝ (H_T(t) · H_S(t))^γ`` with mean 1 over the tokens.

    The paper (https://arxiv.org/abs/2402.11960) weighs the distillation by both entropies, so that ambiguous tokens
    count more, and leaves the formula open in places. Chosen here: the weights are constants in the gradient (else the
    student could lower its loss by being sure); their mean is 1, so that γ does not change the loss's size against
    the text's; the divergence stands for the cross-entropy to the teacher, from which it differs by the teacher's own
    entropy, a constant in the gradient, but it is 0 for equal predictions. Of a cached teacher the entropies are those
    over best guesses and lump.

    Args:
        teacher: of ``[batch, length]`` tokens.
        logits: the student's, ``[batch, length, vocabulary]``.
        tokens: int64 ``[batch, length]``.
        gamma: 0 weighs all tokens alike.
    """
    with torch.no_grad():
        both = entropy(teacher) * entropy(predicted(logits, teacher.ids))
        weights = both.clamp_min(torch.finfo(torch.float32).tiny) ** gamma
        weights = weights / weights.mean()
    return (weights * divergence(teacher, logits)).mean() + cross_entropy(logits, tokens)


def hidden_error(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the relative squared distance of hidden states, each token weighed by its own energy.

    BinaryMoS adds ``10 · Σ MSE(hidden)``. In a plain mean the first token of a text is all there is to see: its
    activations are hundreds of times those of the others (an attention sink), and it is the one that hardly matters.
    Here a token counts by its relative error, as in the block-wise loss, and layers count alike.

    Args:
        outputs, targets: ``[batch, length, hidden]`` of each layer.

    Returns:
        A scalar: 0 for equal states, 1 for states of zero.
    """
    errors = [
        output_loss(output, target.float(), token_weights(target, TokenWeighting.ENERGY))
        for output, target in zip(outputs, targets, strict=True)
    ]
    return torch.stack(errors).mean()
