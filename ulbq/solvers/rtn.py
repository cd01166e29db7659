"""Round to nearest on an affine grid, with an optional search for the range that rounds best.

On a CPU with a compiler the search is one compiled pass (:mod:`ulbq.kernels.solvers`); what follows here in torch takes
some 40 times as long, serves GPUs, and says what the compiled pass has to find.
"""

from typing import NamedTuple

import torch

from ulbq.errors import NumericsError
from ulbq.formats.affine import AffineScheme
from ulbq.kernels import solvers
from ulbq.quantizers.base import SCALE_FLOOR

_NARROWEST = 0.1
"""Smallest share of the range that the search tries; 1-bit rows need less than a third of it."""


class AffineCodes(NamedTuple):
    """An affine-quantized matrix, unpacked.

    Attributes:
        codes: ``[out, in]`` uint8.
        scales: ``[out, G]`` float32, already rounded to float16 values.
        zeros: ``[out, G]`` float32 zero points; integers unless the scheme is symmetric at 1 bit.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def round_to_nearest(
    weight: torch.Tensor,
    scheme: AffineScheme,
    *,
    importance: torch.Tensor | None = None,
    search: bool = True,
    candidates: int = 32,
) -> AffineCodes:
    """Quantize a matrix group by group.

    The range of each group starts as its minimum and maximum (zero included, so that 0 stays exact). The search
    shrinks both ends together step by step to a tenth, then each end by itself, and keeps what gives the least squared
    error, the first of equals. The symmetric grid is tried in both orientations.

    Args:
        weight: ``[out, in]`` float32.
        scheme: bits, group size, symmetry; the group size divides ``in``.
        importance: ``[in]`` weights of each column's squared error (the mean squared input); None for all equal.
        search: whether to shrink ranges; without it this is plain min-max rounding.
        candidates: number of shrink factors.

    Raises:
        NumericsError: a group's scale or error overflows.
    """
    group_size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    factors = range_factors(search, candidates)
    if solvers.take(weight, importance):
        ranges = solvers.Ranges(scheme, SCALE_FLOOR, factors)
        *found, finite = solvers.round_to_nearest(weight, group_size, ranges, importance)
        if not finite:
            raise scale_overflow()
        return AffineCodes(*found)
    grouped = weight.unflatten(1, (-1, group_size))
    cost = None if importance is None else importance.unflatten(0, (-1, group_size)).expand_as(grouped)
    return _round_with_torch(grouped, cost, scheme, factors.tolist())


def range_factors(search: bool, candidates: int = 32) -> torch.Tensor:
    """``[n]`` float32 shares of a group's range that are tried; all of it alone without a search."""
    return torch.linspace(1.0, _NARROWEST, candidates) if search else torch.ones(1)


def scale_overflow() -> NumericsError:
    """What is raised where no grid gives a group an error that is a number."""
    return NumericsError(
        "A group of weights needs a scale that float16 cannot hold.",
        hint="The model's weights are far larger than any trained model's: is the checkpoint damaged?",
    )


def _round_with_torch(
    grouped: torch.Tensor, cost: torch.Tensor | None, scheme: AffineScheme, factors: list[float]
) -> AffineCodes:
    """The same for ``[out, G, g]`` weights and the costs of their errors, on any device."""
    low = grouped.amin(-1).clamp_max(0)
    high = grouped.amax(-1).clamp_min(0)
    chosen = _Choice(grouped, cost, scheme, low, high)
    for factor in factors:
        chosen.offer(low * factor, high * factor)
    if len(factors) > 1 and not scheme.symmetric:
        # One end after the other: skewed groups want another share cut from each.
        for factor in factors[::2]:
            chosen.offer(chosen.low, high * factor)
        for factor in factors[::2]:
            chosen.offer(low * factor, chosen.high)
    if not torch.isfinite(chosen.error).all():
        raise scale_overflow()
    codes = _codes(grouped, chosen.scales, chosen.zeros, scheme.bits)
    return AffineCodes(codes.flatten(1).to(torch.uint8), chosen.scales, chosen.zeros)


class _Choice:
    """The best range of every group so far.

    Args:
        grouped: ``[out, G, g]`` weights.
        cost: ``[out, G, g]`` weight of each squared error, None for all equal.
        low, high: ``[out, G]`` ends of the full range.
    """

    def __init__(
        self,
        grouped: torch.Tensor,
        cost: torch.Tensor | None,
        scheme: AffineScheme,
        low: torch.Tensor,
        high: torch.Tensor,
    ) -> None:
        self._grouped = grouped
        self._cost = cost
        self._scheme = scheme
        self.low, self.high = low, high
        self.error = torch.full_like(low, torch.inf)
        self.scales, self.zeros = torch.zeros_like(low), torch.zeros_like(low)

    def offer(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take over the ranges that round better."""
        for scales, zeros in _grids(low, high, self._scheme):
            error = (_reconstruct(self._grouped, scales, zeros, self._scheme.bits) - self._grouped).square_()
            error = (error if self._cost is None else error.mul_(self._cost)).sum(-1)
            better = error < self.error
            self.error = torch.where(better, error, self.error)
            self.scales = torch.where(better, scales, self.scales)
            self.zeros = torch.where(better, zeros, self.zeros)
            self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)


def _grids(low: torch.Tensor, high: torch.Tensor, scheme: AffineScheme) -> list[tuple[torch.Tensor, torch.Tensor]]:
    top = 2**scheme.bits - 1
    if not scheme.symmetric:
        scales = _storable((high - low) / top)
        return [(scales, (-low / scales).round().clamp(0, top))]
    magnitude = torch.maximum(-low, high)
    centre = torch.full_like(low, scheme.centre)
    # The grid reaches further on the side of code 0; a negative scale turns that side to the positive weights.
    return [(sign * _storable(magnitude / scheme.centre), centre) for sign in (1.0, -1.0)]


def _storable(scales: torch.Tensor) -> torch.Tensor:
    """The float16 value that will be stored, so that codes are chosen for the scale that decodes them."""
    return scales.to(torch.float16).float().clamp_min(SCALE_FLOOR)


def _codes(grouped: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return (grouped / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round_().clamp_(0, 2**bits - 1)


def _reconstruct(grouped: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    return (_codes(grouped, scales, zeros, bits) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
