"""Where to cut sorted columns into clusters: the search behind :mod:`ulbq.solvers.kmeans`.

In one dimension a cluster is an interval of the sorted values, so a clustering is k − 1 cuts, and dynamic programming
finds the best ones (Wang and Song, "Ckmeans.1d.dp", 2011). Over all places to cut that costs k·n² a column; here it
runs over about a hundred places, then over moves of the cuts found, near ones and far ones, until none is better.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

_INTERVALS = 96
"""How many intervals the places where the first search may cut leave between them, for up to four clusters."""

_FARTHEST = 1 / 8
"""Share of a column by which the second search moves a cut at most in one pass."""

_PASSES = 50
"""Most passes of the second search. Three or four are usual; each lowers the error, so stopping early is harmless."""

_BLOCK = 32
"""Places whose clusters are handled in one operation of the first search."""

_PAIRS = 2**20
"""Pairs of places that are worked on together on a CPU: they should stay in its cache."""

_GPU_FACTOR = 64
"""How many times more on a GPU, which has memory and wants long operations."""

NO_MASS = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Share of a column's weight below which the difference of two running sums may be nothing but rounding."""

_TINY = torch.finfo(torch.float64).tiny


class SortedColumns(NamedTuple):
    """Sorted columns, and running sums from which the mean and the error of any interval follow.

    Attributes:
        values: ``[columns, n]`` float32, ascending.
        weights: ``[columns, n]`` float32 in the same order; None for all one.
        centre: ``[columns, 1]`` float64, subtracted before summing, so that little cancels.
        sums: ``[columns, n + 1]`` float64: in front of each place, the mean over the column of weight times value.
        mass: ``[columns, n + 1]`` float64: share of the weight in front; None where all weights are one.
    """

    values: torch.Tensor
    weights: torch.Tensor | None
    centre: torch.Tensor
    sums: torch.Tensor
    mass: torch.Tensor | None

    @property
    def size(self) -> int:
        """Values of a column."""
        return self.values.shape[1]

    def upto(self, rows: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and mass in front of places ``[..., rows]`` of the columns ``rows``."""
        flat = places + rows * (self.size + 1)
        return self.sums.take(flat), places.double() / self.size if self.mass is None else self.mass.take(flat)


def intervals(k: int) -> int:
    """How many intervals the places where the first search may cut leave between them.

    Found by trial: with fewer, one column in a hundred of eight clusters is 0.1 % from the optimum or more.
    """
    return _INTERVALS if k <= 4 else 176 + 10 * k


def search(columns: SortedColumns, k: int) -> torch.Tensor:
    """The best cuts found, ascending: ``[columns, k - 1]`` int64, each the number of values in front of it."""
    return _second_search(columns, _first_search(columns, k)).T.contiguous()


def chunks(columns: torch.Tensor, cost: int, budget: int) -> Iterator[slice]:
    """Even parts of ``[columns, ...]`` such that ``cost`` times their length is about within the budget."""
    if columns.device.type != "cpu":
        budget *= _GPU_FACTOR
    length = math.ceil(len(columns) / max(1, math.ceil(len(columns) * cost / budget)))
    for start in range(0, len(columns), max(1, length)):
        yield slice(start, min(start + length, len(columns)))


def _places(columns: SortedColumns, intervals: int) -> torch.Tensor:
    """Where the first search may cut: ``[columns, intervals + 1]`` int64, ascending from 0 to ``n``.

    Half of them are spread evenly over the gaps between distinct values, half evenly over the root of the gaps' width
    (and a little of the weight): the error within intervals is least where the cube root of density times weight is
    spread evenly, which the second half comes close to, and outliers are cut off by it.
    """
    size = columns.values.shape[1]
    if size <= intervals:
        return torch.arange(size + 1, device=columns.values.device).expand(len(columns.values), -1)
    gaps = columns.values.diff(dim=1).clamp_max_(1e37)  # a difference of finite values may be infinite
    distinct = (gaps > 0).float()
    spread = gaps.sqrt_()
    if columns.weights is not None:
        spread *= columns.weights[:, 1:].lerp(columns.weights[:, :-1], 0.5).sqrt_().sqrt_()
    distinct /= distinct.sum(1, keepdim=True).clamp_min_(1.0)
    spread /= spread.sum(1, keepdim=True).clamp_min_(1e-35)
    reached = spread.add_(distinct).cumsum(1)
    wanted = torch.linspace(0, 2, intervals + 1, device=gaps.device)[1:-1].expand(len(gaps), -1).contiguous()
    inner = torch.searchsorted(reached, wanted).clamp_max_(size - 2) + 1
    return torch.cat((torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], size)), 1)


def _gains(sums: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """By how much a cluster's mean lowers the error, compared with the centre: squared sum over mass. In place."""
    return sums.square_().div_(mass.clamp_min_(NO_MASS[mass.dtype]))


def _first_search(columns: SortedColumns, k: int) -> torch.Tensor:
    """The best cuts at a few places: ``[k - 1, columns]``."""
    places = _places(columns, intervals(k))
    rows = torch.arange(len(places), device=places.device)
    found = []
    for part in chunks(places, places.shape[1] ** 2, _PAIRS):
        some = places[part].T.contiguous()
        sums, mass = columns.upto(rows[part], some)
        sums /= sums.abs().amax(0).clamp_min_(_TINY)  # a square within float32
        found.append(some.gather(0, _best_places(sums.float(), mass.float(), k)))
    return torch.cat(found, 1)


def _best_places(sums: torch.Tensor, mass: torch.Tensor, k: int) -> torch.Tensor:
    """The best cuts among a few places: indices ``[k - 1, columns]``.

    Clusters are handled by the block of places in which they end, so that of the matrix of all pairs little more is
    computed than the half whose start is below the end. The columns come last, so that loops over them are long.

    Args:
        sums, mass: ``[places, columns]`` float32, in front of each place; the first is the start, the last the end.
        k: clusters.
    """
    count = len(sums)
    below = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=sums.device).tril_()
    backwards = torch.where(below, 0.0, -torch.inf).unsqueeze(2)
    blocks = []
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        gains = sums[start:stop].unsqueeze(1) - sums[:stop]  # [to, from, columns]
        gains = _gains(gains, mass[start:stop].unsqueeze(1) - mass[:stop])
        gains[:, start:] += backwards[: stop - start, : stop - start]
        blocks.append(gains)
    best = [torch.cat([gains[:, 0] for gains in blocks])]
    for _ in range(k - 2):
        best.append(torch.cat([(gains + best[-1][: gains.shape[1]]).amax(1) for gains in blocks]))
    places = torch.arange(count, device=sums.device).unsqueeze(1)
    ends = [torch.full_like(places[:1], count - 1).expand(1, sums.shape[1])]
    for score in reversed(best):
        gains = _gains(sums.gather(0, ends[-1]) - sums, mass.gather(0, ends[-1]) - mass)
        ends.append((gains + score).masked_fill_(places > ends[-1], -torch.inf).argmax(0, keepdim=True))
    return torch.cat(ends[:0:-1])


def _second_search(columns: SortedColumns, cuts: torch.Tensor) -> torch.Tensor:
    """Move all cuts together to the best of their candidates until none moves: ``[k - 1, columns]``."""
    steps = [2**power for power in range(max(1, math.floor(columns.size * _FARTHEST).bit_length()))]
    offsets = torch.tensor([*(-step for step in reversed(steps)), 0, *steps], device=cuts.device).unsqueeze(1)
    rows = torch.arange(cuts.shape[1], device=cuts.device)
    settled = cuts.clone()
    for _ in range(_PASSES):
        chosen = _moved(columns, rows, cuts, offsets)
        settled[:, rows] = chosen
        moving = (chosen != cuts).any(0).nonzero().squeeze(1)
        if not len(moving):
            break
        rows, cuts = rows[moving], chosen[:, moving]
    return settled


def _moved(columns: SortedColumns, rows: torch.Tensor, cuts: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The best of the cuts ``[k - 1, rows]`` moved by any of the offsets; the cuts themselves where none is better."""
    candidates = (cuts.unsqueeze(1) + offsets).clamp_(0, columns.size)
    sums, mass = columns.upto(rows, candidates)
    all_sums, all_mass = columns.upto(rows, torch.full_like(rows, columns.size))
    within = mass[1:].unsqueeze(2) - mass[:-1].unsqueeze(1)
    backwards = within < 0
    middle = _gains(sums[1:].unsqueeze(2) - sums[:-1].unsqueeze(1), within)  # [k - 2, to, from, rows]
    middle.masked_fill_(backwards, -torch.inf)
    last = _gains(all_sums - sums[-1], all_mass - mass[-1])
    first = _gains(sums[0], mass[0])
    best = [first]
    for gains in middle:
        best.append((gains + best[-1]).amax(1))
    path = [(best.pop() + last).argmax(0)]
    order = torch.arange(len(rows), device=rows.device)
    gained = last[path[0], order]
    for gains in middle.flip(0):
        row = gains[path[-1], :, order].T
        path.append((best.pop() + row).argmax(0))
        gained += row[path[-1], order]
    gained += first[path[-1], order]
    still = len(offsets) // 2
    stay = first[still] + last[still] + middle[:, still, still].sum(0)
    better = torch.where(gained > stay * (1 + 1e-14), torch.stack(path[::-1]), still)
    return candidates.gather(1, better.unsqueeze(1)).squeeze(1)
