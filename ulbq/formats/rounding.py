"""What is lost where a tensor is stored in fewer bits, whatever its magnitude."""

import torch

LARGEST_LOSS = 0.01
"""Of a tensor that is called stored: above it its values are beside float16's range, not rounded within it."""

SMALLEST_MATRIX = 2.0**-14
"""Largest weight below which a matrix is refused: float16's smallest normal number, of which scales are a share."""


_PART = 1 << 18  # values compared at a time: in float64 they stay in the cache


def relative_error(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Squared error of ``stored`` relative to the squared norm of ``exact``, both of one shape; 0 where all is zero.

    Brought to the size of one first: the squares of small numbers vanish in float32.
    """
    ends = [abs(end.item()) for one in (exact, stored) if one.numel() for end in one.aminmax()]
    largest = max(ends, default=0.0)
    if largest == 0:
        return 0.0
    lost = norm = 0.0
    # A part at a time: whole matrices in a wider type would be most of a run's memory.
    parts = zip(exact.flatten().split(_PART), stored.flatten().split(_PART), strict=True)
    for ours, theirs in parts:
        ours, theirs = ours.double() / largest, theirs.double() / largest
        lost += (ours - theirs).square_().sum().item()
        norm += ours.square_().sum().item()
    return lost / norm if norm else float("inf")


def vanishes(exact: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether so much of a tensor is below what it is stored in that it is another tensor now."""
    return relative_error(exact, stored) > LARGEST_LOSS**2
