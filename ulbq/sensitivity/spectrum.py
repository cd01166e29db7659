"""How unevenly scores are spread: the share of their sum that the highest of them hold, without sorting them."""

import torch

TOP = {"0.1": 0.001, "1": 0.01, "10": 0.1}
"""The shares of weights that are reported, by their name in per cent."""

_BINS = 1 << 15
_PIECE = 1 << 22  # scores counted at once, so that a large layer needs little more than itself


class Spectrum:
    """Counts and sums of non-negative float32 scores by size.

    A bin holds what agrees in exponent and leading seven bits of the significand, so that the scores in one differ by
    less than 1 %. Only the bin in which a share ends is taken as even; the others count as they are.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._sums = torch.zeros(_BINS, dtype=torch.float64)

    @property
    def total(self) -> float:
        """Sum of all scores."""
        return self._sums.sum().item()

    def add(self, scores: torch.Tensor, *, times: int = 1) -> None:
        """Count scores of any shape, finite and non-negative, each ``times`` over."""
        for piece in scores.detach().cpu().float().flatten().split(_PIECE):
            # The bits of non-negative floats are in the order of their values.
            bins = (piece.contiguous().view(torch.int32) >> 16).long()
            self._counts += times * torch.bincount(bins, minlength=_BINS)
            self._sums += times * torch.bincount(bins, weights=piece.double(), minlength=_BINS)

    def share(self, fraction: float) -> float:
        """Share of the sum that the highest ``fraction`` of all scores hold; 0 where all are zero."""
        total = self.total
        if total == 0:
            return 0.0
        counts, sums = self._counts.flip(0), self._sums.flip(0)
        wanted = fraction * counts.sum()
        reached = counts.cumsum(0)
        last = int(torch.searchsorted(reached, wanted))
        before = reached[last] - counts[last]
        within = sums[last] * (wanted - before) / counts[last].clamp_min(1)
        return ((sums[:last].sum() + within) / total).item()

    def top(self) -> dict[str, float]:
        """The shares of :data:`TOP`."""
        return {name: self.share(fraction) for name, fraction in TOP.items()}
