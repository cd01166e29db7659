"""What a block is trained on: the distance of its output to the full-precision block's output."""

import torch

from ulbq import distributed
from ulbq.config.training import TokenWeighting

SINK_RATIO = 4.0
"""How many times as long as its target an output is that counts as a spurious attention sink."""


def token_weights(targets: torch.Tensor, weighting: TokenWeighting) -> torch.Tensor:
    """Weights that make :func:`output_loss` a relative error.

    Args:
        targets: ``[batch, length, hidden]``, the full-precision outputs.

    Returns:
        ``[batch, length]`` float32. ``energy``: one over each token's squared norm; ``uniform``: one over the mean
        squared norm of the batch, of all processes' shares of it.
    """
    energy = targets.float().square().sum(-1)
    if weighting is TokenWeighting.UNIFORM:
        energy = distributed.mean(energy).expand_as(energy)
    return 1.0 / energy.clamp_min(torch.finfo(torch.float32).tiny * 2**20)


def bounded(errors: torch.Tensor) -> torch.Tensor:
    """Relative squared errors up to 1 as they are, larger ones by their root: Huber's loss of the relative distance.

    A block may turn a single token into an attention sink that the full-precision model does not have. Its relative
    error is in the thousands, and a plain mean over tokens is that token alone: it decides the gradients, which epoch
    counts as the best, and whether the block counts as lost. Here the gradient of a distance does not grow beyond an
    error of 1, which an output of zero has.
    """
    return torch.where(errors > 1, 2 * errors.clamp_min(1).sqrt() - 1, errors)


def output_loss(
    outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, weighting: TokenWeighting
) -> torch.Tensor:
    """Mean over tokens of the weighted squared distance, each token's share bounded unless ``uniform``.

    Args:
        outputs, targets: ``[batch, length, hidden]``.
        weights: ``[batch, length]`` from :func:`token_weights`.
        weighting: what the weights are.

    Returns:
        A scalar, dimensionless: 0 for equal outputs, 1 for outputs of zero.
    """
    errors = (outputs.float() - targets).square().sum(-1) * weights
    return (errors if weighting is TokenWeighting.UNIFORM else bounded(errors)).mean()


def spurious_sinks(outputs: torch.Tensor, targets: torch.Tensor) -> int:
    """How many tokens of ``[batch, length, hidden]`` outputs are far longer than their targets.

    Attention sinks are tokens with massive activations (Sun et al., 2024, https://arxiv.org/abs/2402.17762). One that
    only the quantized model has draws attention away from the text.
    """
    return int((outputs.float().norm(dim=-1) > SINK_RATIO * targets.float().norm(dim=-1)).sum())


def sliced_wasserstein(
    outputs: torch.Tensor, targets: torch.Tensor, generator: torch.Generator, *, projections: int = 16
) -> torch.Tensor:
    """Sliced-Wasserstein distance of the distributions of output tokens, relative to the targets' own spread.

    Each output token is divided by the norm of its target, each target by its own, and both are projected on random
    unit directions; along each, sorted outputs are compared with sorted targets. So it looks at where the tokens of a
    batch lie, not at which is which, but for that norm.

    Args:
        outputs, targets: ``[batch, length, hidden]``.
        generator: of the directions, on the CPU.
        projections: number of directions.

    Returns:
        A scalar: mean squared distance of the sorted projections over the mean square of the targets' projections.
    """
    width = targets.shape[-1]
    directions = torch.randn(width, projections, generator=generator).to(targets.device)
    directions = directions / directions.norm(dim=0)
    # Per-token norms first: a sink token a thousand times as long as the others would be all there is to see.
    scale = targets.float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    ours = ((outputs.float() / scale).flatten(0, -2) @ directions).sort(0).values
    theirs = ((targets.float() / scale).flatten(0, -2) @ directions).sort(0).values
    spread = theirs.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    distance: torch.Tensor = (ours - theirs).square().mean() / spread
    return distance
