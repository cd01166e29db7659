"""What a block is trained on: the distance of its output to the full-precision block's output."""

from enum import StrEnum

import torch

from ulbq import distributed


class TokenWeighting(StrEnum):
    """How much each token counts in the output loss.

    ``energy`` divides a token's squared error by the token's own squared norm, so that every token counts by its
    relative error. ``uniform`` is the plain mean squared error of the published methods, in which an attention sink
    with massive activations weighs by its energy.
    """

    ENERGY = "energy"
    UNIFORM = "uniform"


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


def output_loss(outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over tokens of the squared distance.

    Args:
        outputs, targets: ``[batch, length, hidden]``.
        weights: ``[batch, length]`` from :func:`token_weights`.

    Returns:
        A scalar, dimensionless: 0 for equal outputs, 1 for outputs of zero.
    """
    return ((outputs.float() - targets).square().sum(-1) * weights).mean()


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
