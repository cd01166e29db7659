"""Grids with scales in two levels (:mod:`ulbq.formats.k_quant`), and which solver finds the grids of which scheme.

llama.cpp finds the scale and minimum of each group by themselves and rounds them to the super-block's. Here that is the
start. Then two steps take turns, and what raises an error is not taken: each group tries the whole numbers beside its
own, with the codes that are nearest then; each super-block fits ``d`` and ``e`` to its codes and whole numbers by
weighted least squares.
"""

from collections.abc import Iterator
from itertools import product

import torch

from ulbq.formats import AffineScheme, KQuantScheme, UniformScheme
from ulbq.formats.k_quant import SUPER_BLOCK, KQuant, stored_factors
from ulbq.solvers.rtn import AffineCodes, round_to_nearest, scale_overflow

UniformCodes = AffineCodes | KQuant
"""What is found of a :data:`~ulbq.formats.UniformScheme`: both have codes, and scales and zero points of groups."""

_TURNS = 6
_SLAB = 1 << 18
"""Weights that are fitted at a time: what is made of them stays in the cache."""


@torch.no_grad()
def find_grids(
    weight: torch.Tensor, scheme: UniformScheme, *, importance: torch.Tensor | None = None, search: bool = True
) -> UniformCodes:
    """Quantize a matrix group by group, as :func:`~ulbq.solvers.rtn.round_to_nearest` says, on either kind of grid."""
    if isinstance(scheme, AffineScheme):
        return round_to_nearest(weight, scheme, importance=importance, search=search)
    rows = max(1, _SLAB // weight.shape[1])
    parts = [_find(part, scheme, importance, search=search) for part in weight.split(rows)]
    return KQuant(*map(torch.cat, zip(*parts, strict=True)))


def _find(weight: torch.Tensor, scheme: KQuantScheme, importance: torch.Tensor | None, *, search: bool) -> KQuant:
    one_level = AffineScheme(bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)
    start = round_to_nearest(weight, one_level, importance=importance, search=search)
    fit = _Fit(weight, importance, scheme)
    grid = _two_levels(start, scheme)
    if not (grid.factors.isfinite().all() and grid.minima.isfinite().all()):
        raise scale_overflow()
    if search:
        grid = fit.improved(grid)
    codes = fit.codes(grid).to(torch.uint8).permute(1, 2, 0).flatten(1)
    return grid._replace(codes=codes)


def _two_levels(start: AffineCodes, scheme: KQuantScheme) -> KQuant:
    """Scales and minima ``[out, G]`` rounded to whole numbers of what is largest in the super-block."""
    least, most = scheme.sub_range
    in_blocks = (-1, SUPER_BLOCK // scheme.group_size)
    scales, minima = start.scales.unflatten(1, in_blocks), (start.scales * start.zeros).unflatten(1, in_blocks)
    if scheme.symmetric:
        # The side that reaches further is that of the largest.
        factors = scales.gather(2, scales.abs().argmax(2, keepdim=True)) / least
        minima = torch.zeros_like(minima)
    else:
        factors = scales.amax(2, keepdim=True) / most
    factors, steps = stored_factors(factors), stored_factors(minima.amax(2, keepdim=True) / most)
    return KQuant(
        start.codes,
        factors.squeeze(2),
        _usable((scales / factors).round(), scheme).flatten(1),
        steps.squeeze(2),
        (minima / steps).round().clamp(0, most).flatten(1),
        start.scales.new_full((len(scales), 1), scheme.centre),
    )


def _usable(sub_scales: torch.Tensor, scheme: KQuantScheme) -> torch.Tensor:
    """In range and not 0: every grid has all that one of a single level has, which 0 makes of it."""
    clamped = sub_scales.clamp(*scheme.sub_range)
    return torch.where(clamped == 0, 1.0, clamped)


class _Fit:
    """The grids of some rows: errors, and what lowers them.

    Everything of groups lies ``[g, out, G]``, so that what is computed runs over whole rows of groups.

    Args:
        weight: ``[out, in]`` float32.
        importance: ``[in]`` weights of the columns' squared errors; None for all equal.
    """

    def __init__(self, weight: torch.Tensor, importance: torch.Tensor | None, scheme: KQuantScheme) -> None:
        self._scheme = scheme
        size = scheme.group_size
        self._weight = weight.unflatten(1, (-1, size)).permute(2, 0, 1).contiguous()
        self._cost = None if importance is None else importance.unflatten(0, (-1, size)).t().unsqueeze(1).contiguous()

    def codes(self, grid: KQuant) -> torch.Tensor:
        """The nearest ones, ``[g, out, G]`` float32."""
        return self._round(self._in_steps(grid))

    def errors(self, grid: KQuant) -> torch.Tensor:
        """Of the groups with the nearest codes, ``[out, G]``."""
        steps = self._in_steps(grid)
        steps.sub_(self._round(steps.clone())).square_()
        return (steps if self._cost is None else steps.mul_(self._cost)).sum(0).mul_(grid.scales.square())

    def _in_steps(self, grid: KQuant) -> torch.Tensor:
        """Weights where codes are whole numbers, ``[g, out, G]``."""
        return torch.addcmul(grid.zeros, self._weight, grid.scales.reciprocal())

    def _round(self, steps: torch.Tensor) -> torch.Tensor:
        return steps.round_().clamp_(0, 2**self._scheme.bits - 1)

    def improved(self, grid: KQuant) -> KQuant:
        """The grid after some turns of both steps."""
        errors = self.errors(grid)
        for _ in range(_TURNS):
            before = errors
            for trial in self._neighbours(grid):
                found = self.errors(trial)
                better = found < errors
                errors = torch.where(better, found, errors)
                grid = grid._replace(
                    sub_scales=torch.where(better, trial.sub_scales, grid.sub_scales),
                    sub_minima=torch.where(better, trial.sub_minima, grid.sub_minima),
                )
            grid, errors = self._refitted(grid, errors)
            if torch.equal(errors, before):
                break
        return grid

    def _neighbours(self, grid: KQuant) -> Iterator[KQuant]:
        near = (-1, 0, 1)
        for up, down in product(near, (0,) if self._scheme.symmetric else near):
            if up or down:
                sub_minima = (grid.sub_minima + down).clamp_(0, self._scheme.sub_range[1])
                sub_scales = _usable(grid.sub_scales + up, self._scheme)
                yield grid._replace(sub_scales=sub_scales, sub_minima=sub_minima)

    def _refitted(self, grid: KQuant, errors: torch.Tensor) -> tuple[KQuant, torch.Tensor]:
        """``d`` and ``e`` by least squares of the super-blocks that it makes better, and the groups' errors."""
        levels = (self.codes(grid) - grid.centre).mul_(grid.sub_scales)
        cost = levels.new_ones(1, 1, 1) if self._cost is None else self._cost
        weighted, below = levels * cost, grid.sub_minima * cost

        def total(values: torch.Tensor) -> torch.Tensor:
            return self._in_blocks(values.sum(0)).sum(2)

        a, x = total(weighted * levels), total(weighted * self._weight)
        b, c = total(weighted * grid.sub_minima), total((below * grid.sub_minima).expand_as(levels))
        y = total(below * self._weight)
        # d·a − e·b = x and d·b − e·c = y; without minima the first alone.
        determinant = a * c - b * b
        both = determinant > 1e-6 * (a * c).clamp_min(1e-30)
        safe = torch.where(both, determinant, 1.0)
        factors = torch.where(both, (c * x - b * y) / safe, (x + grid.minima * b) / a.clamp_min(1e-30))
        minima = torch.where(both, (b * x - a * y) / safe, grid.minima).clamp_min(0)
        trial = grid._replace(factors=stored_factors(factors), minima=stored_factors(minima))
        found = self.errors(trial)
        better = (self._in_blocks(found).sum(2) < self._in_blocks(errors).sum(2)) & (trial.factors * grid.factors > 0)
        kept = better.repeat_interleave(SUPER_BLOCK // self._scheme.group_size, 1)
        grid = grid._replace(
            factors=torch.where(better, trial.factors, grid.factors),
            minima=torch.where(better, trial.minima, grid.minima),
        )
        return grid, torch.where(kept, found, errors)

    def _in_blocks(self, values: torch.Tensor) -> torch.Tensor:
        grouped: torch.Tensor = values.unflatten(1, (-1, SUPER_BLOCK // self._scheme.group_size))
        return grouped
