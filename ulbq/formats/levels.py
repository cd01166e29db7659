"""Rounding to the levels of a codebook."""

import torch


def assign(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The nearest level of each value, the lower of two that are equally near.

    Args:
        values: ``[columns, n]``.
        levels: ``[columns, k]`` ascending, of the same type; ``k`` at most 256.

    Returns:
        ``[columns, n]`` uint8.
    """
    between = limits(levels)
    if between.shape[1] > 15:  # where a binary search costs less than all comparisons
        return torch.searchsorted(between, values.contiguous()).to(torch.uint8)
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for limit in between.unsqueeze(-1).unbind(1):
        codes += values > limit
    return codes


def sum_by_level(values: torch.Tensor, codes: torch.Tensor, levels: int) -> torch.Tensor:
    """``[columns, levels]`` sums of values ``[columns, n]`` over those that have each code (int64, ``[columns, n]``).

    On a GPU a pass for each level: adding to a few places from everywhere takes atomics there, whose order is another
    every time.
    """
    if values.device.type == "cpu":
        return values.new_zeros(len(values), levels).scatter_add_(1, codes, values)
    return torch.stack([torch.where(codes == level, values, 0).sum(1) for level in range(levels)], 1)


def limits(levels: torch.Tensor) -> torch.Tensor:
    """``[columns, k - 1]``: what is above a limit is nearer to the level above it."""
    lower, upper = levels[:, :-1], levels[:, 1:]
    # The middle of two adjacent floats rounds to either; the step down keeps the upper one above it.
    return torch.minimum(lower * 0.5 + upper * 0.5, upper.nextafter(torch.full_like(upper, -torch.inf)))
