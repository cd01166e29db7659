"""What a block is trained on: the distance of its output to the full-precision block's output."""

from enum import StrEnum

import torch


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
        squared norm of the batch.
    """
    energy = targets.float().square().sum(-1)
    if weighting is TokenWeighting.UNIFORM:
        energy = energy.mean().expand_as(energy)
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
