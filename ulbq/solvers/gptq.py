"""Column by column, each error made good in the columns that are still to come (GPTQ, https://arxiv.org/abs/2210.17323).

With H the Hessian of the layer's output error and ``H⁻¹ = UᵀU``, quantizing column i to q_i leaves the error
``e_i = (w_i − q_i) / U_ii``, which ``w_j −= U_ij · e_i`` makes good in all later columns j. The sum of all e² is
``tr((W − Q) H (W − Q)ᵀ)``. How a single column is quantized is the caller's: :class:`ColumnQuantizer`.

On a CPU with a compiler affine grids go another way: the columns of a block are one compiled pass
(:mod:`ulbq.kernels.solvers`). On a GPU they are one kernel (:mod:`ulbq.kernels.solver_launch`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ulbq import distributed
from ulbq.formats import AffineScheme, UniformScheme
from ulbq.formats.k_quant import KQuant
from ulbq.kernels import solver_launch, solvers
from ulbq.quantizers.base import SCALE_FLOOR
from ulbq.solvers.hessian import HessianFactor, activation_order, factorize, make_good
from ulbq.solvers.k_quant import UniformCodes, find_grids
from ulbq.solvers.rtn import AffineCodes, range_factors, scale_overflow

AT_ONCE = 1 << 25
"""Weights of rows that are quantized together, a matter of memory alone: a pass holds many copies of them."""

_ROWS = 16
"""Rows of a block that is quantized at once where rows after it make its errors good."""


class ColumnQuantizer(Protocol):
    """What :func:`compensate` asks to quantize columns; indices count in processing order."""

    def begin(self, first: int, columns: torch.Tensor) -> None:
        """Get to see a block of columns ``[out, b]`` before it is quantized; ``first`` is the index of the first.

        ``columns`` is a view: it shows, all along the block, what earlier columns of the block have changed.
        """
        ...

    def quantize(self, index: int, column: torch.Tensor) -> torch.Tensor:
        """The quantized values ``[out]`` of a column ``[out]`` in which earlier columns' errors are made good."""
        ...


class Compensated(NamedTuple):
    """What became of a matrix.

    Attributes:
        weight: ``[out, in]`` float32 quantized values, in original column order.
        loss: ``tr((W − Q) H (W − Q)ᵀ)``, H with its damping.
    """

    weight: torch.Tensor
    loss: float


@torch.no_grad()
def compensate(
    weight: torch.Tensor, factor: HessianFactor, quantizer: ColumnQuantizer, block_size: int = 128
) -> Compensated:
    """Quantize a matrix column by column.

    Args:
        weight: ``[out, in]`` float32; rows are independent of each other. It stays as it is.
        factor: of the Hessian of its inputs, with the order of the columns.
        quantizer: of the single columns.
        block_size: columns after which later blocks are changed, all at once; a matter of speed alone.
    """
    quantized = torch.empty(weight.shape[1], len(weight), device=weight.device)
    pivots = factor.upper.diagonal().tolist()
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)

    def solve(first: int, block: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        nonlocal loss
        errors = torch.empty_like(block)
        quantizer.begin(first, block.t())
        for step, column in enumerate(block):
            values = quantizer.quantize(first + step, column)
            quantized[first + step] = values
            error = torch.sub(column, values, out=errors[step]).div_(pivots[first + step])
            block[step + 1 :].addr_(inside[step, step + 1 :], error, alpha=-1)
        loss += errors.square().sum(dtype=torch.float64)
        return errors

    _block_by_block(weight, factor, block_size, solve)
    result = torch.empty_like(quantized)
    result[factor.order] = quantized
    return Compensated(result.t().contiguous(), loss.item())


def _block_by_block(
    weight: torch.Tensor,
    factor: HessianFactor,
    block_size: int,
    solve: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Let the columns of each block be quantized and make their errors good in all later blocks.

    Args:
        solve: takes the index of a block's first column, the block ``[b, out]`` and its part ``[b, b]`` of the factor;
            gives errors ``[b, out]`` and leaves in the block what its columns were when their turns came.

    Returns:
        ``[in, out]`` what ``solve`` left, in processing order.
    """
    # Transposed, a column lies in one piece.
    columns = weight.index_select(1, factor.order).t().contiguous()
    for first in range(0, len(columns), block_size):
        block = columns[first : first + block_size]
        last = first + len(block)
        errors = solve(first, block, factor.upper[first:last, first:last])
        columns[last:].addmm_(factor.upper[first:last, last:].t(), errors, alpha=-1)
    return columns


@dataclass(frozen=True)
class GptqSettings:
    """How :func:`gptq` goes about it.

    Attributes:
        damping: share of the mean diagonal that is added to the Hessian's diagonal.
        act_order: take the columns with the largest inputs first, and blocks of rows whose errors cost most. Groups
            stay what they are, columns side by side, so their grids are found up front; in plain order they are found
            when a group's turn comes, on its weights with the errors of all groups before made good. Grids with scales
            in two levels are found up front in either.
        search: shrink each group's range where that lowers its error, weighted by what it costs
            (:attr:`HessianFactor.importance`). Grids that are found up front are then searched a second time, on the
            values that their columns had when their turn came, and kept where the loss is lower.
        block_size: as :func:`compensate` takes it.
    """

    damping: float = 0.01
    act_order: bool = True
    search: bool = True
    block_size: int = 128


class Solution(NamedTuple):
    """What :func:`gptq` found.

    Attributes:
        codes: codes, scales and zero points.
        loss: ``tr((W − Q) H (W − Q)ᵀ)``, H with its damping; W of each row with the errors of rows before it made good.
    """

    codes: UniformCodes
    loss: float


def factored(hessian: torch.Tensor, settings: GptqSettings, *, overwrite: bool = False) -> HessianFactor:
    """A Hessian as :func:`gptq` wants it; arguments and errors are those of :func:`~ulbq.solvers.hessian.factorize`."""
    order = activation_order(hessian) if settings.act_order else None
    return factorize(hessian, damping=settings.damping, order=order, overwrite=overwrite)


@torch.no_grad()
def gptq(
    weights: Sequence[torch.Tensor],
    factor: HessianFactor,
    scheme: UniformScheme,
    settings: GptqSettings,
    outputs: torch.Tensor | None = None,
) -> Solution:
    """Quantize a matrix to an affine grid. A dead column is rounded to nearest, where the authors' code sets it to 0.

    Where errors of two outputs cost something together, rows come in blocks, and all that a block gets wrong is made
    good in the rows after it (two-sided feedback, YAQA,
    https://arxiv.org/abs/2505.22988). For given rows it is the columns' own loss that is left, so that each block is
    quantized as it would be alone.

    Args:
        weights: ``[out, in]`` float32 each; of matrices that read the same input, which are solved as one.
        factor: of the second moments of that input, as :func:`factored` gives it.
        scheme: the group size divides ``in``. Symmetric grids are tried in both orientations.
        settings: order and damping.
        outputs: ``[out, out]``, what errors of two outputs cost together; None for nothing.

    Raises:
        NumericsError: costs of outputs that cannot be factored; a group's scale overflows.
    """
    if outputs is None:
        return _joined([_shared(part, factor, scheme, settings) for part in parts(weights)])
    rows = factored(outputs, settings)
    found: list[Solution] = []

    def solve(block: torch.Tensor) -> torch.Tensor:
        found.append(_solve(block, factor, scheme, settings))
        return _values(found[-1].codes)

    make_good(torch.cat(tuple(weights)), rows, _ROWS, solve)
    places, whole = rows.order.argsort(), _joined(found)
    return whole._replace(codes=type(whole.codes)(*(part[places] for part in whole.codes)))


def parts(weights: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows of matrices below each other, as many at once as :data:`AT_ONCE` says; all are never copied at once."""
    most = max(1, AT_ONCE // weights[0].shape[1])
    part: list[torch.Tensor] = []
    for weight in weights:
        first = 0
        while first < len(weight):
            part.append(weight[first : first + most - sum(map(len, part))])
            first += len(part[-1])
            if sum(map(len, part)) == most:
                yield torch.cat(part) if len(part) > 1 else part[0]
                part = []
    if part:
        yield torch.cat(part) if len(part) > 1 else part[0]


def _joined(found: Sequence[Solution]) -> Solution:
    """What was found for the rows of a matrix, some after the others."""
    if len(found) == 1:
        return found[0]
    return Solution(joined([one.codes for one in found]), sum(one.loss for one in found))


def joined(codes: Sequence[UniformCodes]) -> UniformCodes:
    """Those of rows below each other, of one kind."""
    return type(codes[0])(*map(torch.cat, zip(*codes, strict=True)))


def _values(codes: UniformCodes) -> torch.Tensor:
    """``[out, in]`` float32, what codes stand for."""
    if isinstance(codes, KQuant):
        return codes.values()
    levels = codes.codes.float().unflatten(1, (codes.scales.shape[1], -1)) - codes.zeros.unsqueeze(-1)
    values: torch.Tensor = levels.mul_(codes.scales.unsqueeze(-1)).flatten(1)
    return values


def _shared(weight: torch.Tensor, factor: HessianFactor, scheme: UniformScheme, settings: GptqSettings) -> Solution:
    """Quantize rows that know nothing of each other, some of them in each process."""
    parts = weight.split(-(-len(weight) // distributed.size()))
    tried = distributed.shared(parts, lambda rows: _tried(rows, factor, scheme, settings), weight.device)
    return min(map(_joined, zip(*tried, strict=True)), key=lambda solution: solution.loss)


def _solve(weight: torch.Tensor, factor: HessianFactor, scheme: UniformScheme, settings: GptqSettings) -> Solution:
    """Quantize rows that know nothing of each other."""
    return min(_tried(weight, factor, scheme, settings), key=lambda solution: solution.loss)


def _tried(
    weight: torch.Tensor, factor: HessianFactor, scheme: UniformScheme, settings: GptqSettings
) -> list[Solution]:
    """What was found for rows, of which the one with the lowest loss counts."""
    group_size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    if isinstance(scheme, AffineScheme) and not settings.act_order and group_size < weight.shape[1]:
        # Every group has to lie in one block, where its grid can be found.
        block_size = group_size * max(1, settings.block_size // group_size)
        found = _pass(weight, factor, scheme, settings.search, block_size, None)
        return [Solution(found.codes, found.loss)]
    solutions = []
    values = weight
    for _ in range(2 if settings.search else 1):
        grids = find_grids(values, scheme, importance=factor.importance, search=settings.search)
        found = _pass(weight, factor, scheme, settings.search, settings.block_size, grids)
        solutions.append(Solution(found.codes, found.loss))
        values = found.seen
    return solutions


class _Passed(NamedTuple):
    """What one pass over the columns found; ``seen`` are the values ``[out, in]`` that they had at their turns."""

    codes: UniformCodes
    loss: float
    seen: torch.Tensor


def _pass(
    weight: torch.Tensor,
    factor: HessianFactor,
    scheme: UniformScheme,
    search: bool,
    block_size: int,
    grids: UniformCodes | None,
) -> _Passed:
    """Quantize all columns to known grids, or to those that each group gets when its turn comes."""
    if solvers.take(weight, factor.upper):
        return _Compiled(factor, scheme, search, grids).run(weight, block_size)
    if grids is None:
        block_size = scheme.group_size  # whose grid is found on what earlier ones left of it
    if solver_launch.takes(weight) and (grids is not None or block_size <= solver_launch.MOST_COLUMNS):
        most = min(block_size, solver_launch.MOST_COLUMNS)
        return _ByBlocks(factor, scheme, search, grids, solver_launch.compensate).run(weight, most)
    return _ByBlocks(factor, scheme, search, grids, _rounded).run(weight, block_size)


class _Compiled:
    """Blocks of columns by the compiled loop; does what :class:`_ByBlocks` does."""

    def __init__(self, factor: HessianFactor, scheme: UniformScheme, search: bool, grids: UniformCodes | None) -> None:
        self._factor, self._known = factor, grids
        columns = len(factor.order)
        self._size = columns if scheme.group_size == -1 else scheme.group_size
        self._groups = factor.order // self._size
        factors = range_factors(search) if grids is None else torch.empty(0)
        self._ranges = solvers.Ranges(scheme, SCALE_FLOOR, factors)
        self._importance = factor.importance[factor.order].contiguous()
        self._codes: list[torch.Tensor] = []
        self._loss = 0.0

    def run(self, weight: torch.Tensor, block_size: int) -> _Passed:
        """Quantize a matrix ``[out, in]``. Raises NumericsError."""
        if self._known is None:
            shape = (weight.shape[1] // self._size, len(weight))
            self._grids = (torch.empty(shape), torch.empty(shape))
        else:
            self._grids = (self._known.scales.t().contiguous(), self._known.zeros.t().contiguous())
        seen = _block_by_block(weight, self._factor, block_size, self._solve)
        codes = self._in_original_order(torch.cat(self._codes)).t().contiguous()
        known = self._known or AffineCodes(codes, *(grid.t().contiguous() for grid in self._grids))
        return _Passed(known._replace(codes=codes), self._loss, self._in_original_order(seen).t())

    def _solve(self, first: int, block: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        own = slice(first, first + len(block))
        found = solvers.compensate(
            block, inside.contiguous(), self._groups[own], self._grids, self._ranges, self._importance[own], self._size
        )
        if not found.finite:
            raise scale_overflow()
        self._codes.append(found.codes)
        self._loss += found.loss
        return found.errors

    def _in_original_order(self, columns: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(columns)
        result[self._factor.order] = columns
        return result


class _ByBlocks:
    """Blocks of columns, one after the other, by what quantizes one: :func:`_rounded`, or a kernel on a GPU.

    Without known grids a block is a group.
    """

    def __init__(
        self,
        factor: HessianFactor,
        scheme: UniformScheme,
        search: bool,
        grids: UniformCodes | None,
        quantize: Callable[..., solver_launch.Quantized],
    ) -> None:
        self._factor, self._scheme, self._search, self._known = factor, scheme, search, grids
        self._quantize = quantize
        self._row = scheme.model_copy(update={"group_size": -1})
        self._found: list[UniformCodes] = []
        self._codes: list[torch.Tensor] = []
        self._loss: list[torch.Tensor] = []

    def run(self, weight: torch.Tensor, block_size: int) -> _Passed:
        """Quantize a matrix ``[out, in]``. Raises NumericsError."""
        order, columns = self._factor.order, weight.shape[1]
        known = self._known
        if known is not None:
            self._grids = known.scales.t().contiguous(), known.zeros.t().contiguous()
            self._groups = order // (columns // len(self._grids[0]))
        seen = _block_by_block(weight, self._factor, block_size, self._solve)
        codes = in_original_order(self._codes, order)
        if known is None:
            scales, zeros = (torch.cat([getattr(one, name) for one in self._found], 1) for name in ("scales", "zeros"))
            known = AffineCodes(codes, scales, zeros)
        loss = torch.stack(self._loss).sum().item()
        return _Passed(known._replace(codes=codes), loss, in_original_order([*seen], order))

    def _solve(self, first: int, block: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        own = slice(first, first + len(block))
        if self._known is None:
            importance = self._factor.importance[own]
            grid = find_grids(block.t(), self._row, importance=importance, search=self._search)
            self._found.append(grid)
            groups = torch.zeros_like(self._factor.order[own])
            found = self._quantize(block, inside, groups, grid.scales.t(), grid.zeros.t(), self._scheme.bits)
        else:
            found = self._quantize(block, inside, self._groups[own], *self._grids, self._scheme.bits)
        self._codes += found.codes
        self._loss.append(found.errors.square().sum(dtype=torch.float64))
        return found.errors


def _rounded(
    block: torch.Tensor,
    upper: torch.Tensor,
    groups: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
) -> solver_launch.Quantized:
    """What :func:`ulbq.kernels.solver_launch.compensate` does, by torch, for any number of columns."""
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for step, (column, group, pivot) in enumerate(zip(block, groups.tolist(), upper.diagonal().tolist(), strict=True)):
        levels = (column / scales[group]).add_(zeros[group]).round_().clamp_(0, 2**bits - 1)
        codes[step] = levels
        error = torch.sub(column, levels.sub_(zeros[group]).mul_(scales[group]), out=errors[step]).div_(pivot)
        block[step + 1 :].addr_(upper[step, step + 1 :], error, alpha=-1)
    return solver_launch.Quantized(codes, errors)


def in_original_order(columns: list[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """Columns ``[out]`` in processing order as a matrix ``[out, in]``, contiguous."""
    matrix = torch.empty(len(columns[0]), len(columns), dtype=columns[0].dtype, device=columns[0].device)
    matrix[:, order] = torch.stack(columns, 1)
    return matrix
