"""Bits where they pay: widths of columns and numbers of outliers under a budget of stored bits.

Every column may be widened, and every value stored as it is; each step has a price in bits and lowers the loss. With
one price of loss per bit for all (a Lagrange multiplier, found by bisection), what is taken is what pays, in one
matrix or across all matrices of a model (Shoham & Gersho 1988). Beside it the published allocations of CLAQ, by an
order of the columns.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ulbq import formats
from ulbq.formats.codebook import CodebookScheme
from ulbq.formats.levels import assign
from ulbq.solvers.claq import ColumnPlan
from ulbq.solvers.kmeans import kmeans_1d

Base = Literal[2, 3, 4]
WIDEST = 4
CANDIDATES = 0.01
"""Share of a matrix's values that a survey keeps as candidates for outliers: at 25 bits each a quarter bit a weight."""
_FOURTH_BIT = 0.94
"""The fourth bit divides the error of a normal distribution by 3.64 and the third by 3.40 (Max 1960)."""
_LEVEL_BITS = 16
OUTLIER_BITS = 25
"""What a budget is charged for an outlier when prices are compared: a float16, and the position of one value in 128.
The plans that come out are counted exactly."""
_STEPS = 50
"""Bisections of the price's logarithm; more change no bit."""
_TOP_COLUMNS = 0.1
_TOP_RATIO = 3.5
"""The published share of columns that keep more outliers, and how many times as many: 1.4 % against 0.4 %."""
_EXTREME = 13
"""In units of the mean magnitude, where the published outlier ratio begins to count."""
NOMINAL_OUTLIER_BITS = 14
"""What the paper counts for an outlier: a float16 in place of 2 bits, and nothing for its position."""
_PUBLISHED_BLOCK = 128


@dataclass(frozen=True)
class Survey:
    """What bits would do for one matrix.

    Attributes:
        out_features: rows.
        losses: ``[widths, in]`` float32 loss of each column at each width from the base on; extrapolated at four bits.
        gains: ``[n]`` float32, what storing a value as it is would save in a column of the base width; the largest.
        columns: ``[n]`` int32, the columns of those values.
    """

    out_features: int
    losses: torch.Tensor
    gains: torch.Tensor
    columns: torch.Tensor


@torch.no_grad()
def survey(weight: torch.Tensor, importance: torch.Tensor, base: Base) -> Survey:
    """Cluster every column at two and three bits.

    Args:
        weight: ``[out, in]`` float32.
        importance: ``[in]`` what a squared error in each column costs.
        base: width that a column has at least.

    Returns:
        The survey, on the CPU.
    """
    values = weight.T.contiguous()
    if base == WIDEST:
        found = kmeans_1d(values, 2**WIDEST)
        book, errors = found.centroids, found.error.unsqueeze(0)
    else:
        two, three = (kmeans_1d(values, 2**width) for width in (2, 3))
        # Clustering at four bits would take four times as long as the rest.
        four = three.error.square() / two.error.clamp_min(1e-30) * _FOURTH_BIT
        book, errors = (two if base == 2 else three).centroids, torch.stack([two.error, three.error, four])[base - 2 :]
    losses = errors.float() * importance
    saved = (values - book.gather(1, assign(values, book).long())).square_().mul_(importance.unsqueeze(1)).flatten()
    gains, places = saved.topk(max(1, round(CANDIDATES * len(saved))))
    return Survey(len(weight), losses.cpu(), gains.cpu(), (places // len(weight)).int().cpu())


def base_plan(columns: int, base: Base) -> ColumnPlan:
    """The plan of a matrix with so many columns, none of them widened."""
    none = torch.zeros(columns, dtype=torch.int64)
    return ColumnPlan(none + base, none)


def scheme_of(plan: ColumnPlan, base: Base) -> CodebookScheme:
    """How a matrix is stored whose columns are planned so."""
    return CodebookScheme.of(base, plan.widths, int(plan.outliers.sum()))


def bits_of(plan: ColumnPlan, base: Base, out_features: int) -> int:
    """Stored bits of a matrix whose columns are planned so, every part counted."""
    return formats.total_bits(scheme_of(plan, base), (out_features, len(plan.widths)))


def allocate(
    surveys: Sequence[Survey], base: Base, budget: float, outlier_budget: float | None = None
) -> list[ColumnPlan]:
    """Plans of some matrices that lower their common loss most.

    Args:
        surveys: of the matrices; their losses are in one unit.
        base: width that a column has at least.
        budget: stored bits of all of them together; no less than what base widths take.
        outlier_budget: those of them that outliers get; None for as many as pay.
    """
    highest = max(float(max(one.losses.max(), one.gains.max())) for one in surveys) + 1e-30
    narrow = [base_plan(one.losses.shape[1], base) for one in surveys]

    def bits(plans: Sequence[ColumnPlan]) -> int:
        return sum(bits_of(plan, base, one.out_features) for plan, one in zip(plans, surveys, strict=True))

    def joint(price: float) -> list[ColumnPlan]:
        return [_joint(one, base, price) for one in surveys]

    def outliers(price: float) -> list[ColumnPlan]:
        return [plan._replace(outliers=_outliers(one, price)) for plan, one in zip(narrow, surveys, strict=True)]

    if outlier_budget is None:
        return _within(joint, bits, budget, highest)
    first = _within(outliers, bits, bits(narrow) + outlier_budget, highest) if outlier_budget else narrow

    def widths(price: float) -> list[ColumnPlan]:
        return [plan._replace(widths=_widths(one, base, price)) for plan, one in zip(first, surveys, strict=True)]

    return _within(widths, bits, budget, highest)


class Priced(NamedTuple):
    """One way to store a matrix, or several together.

    Attributes:
        bits: stored bits.
        loss: what its errors cost, in a unit that all matrices share.
    """

    bits: int
    loss: float


def give_out(choices: Sequence[Sequence[Priced]], budget: float) -> list[int]:
    """Which of its choices each matrix gets: always the next one that pays best for its bits and still fits.

    Args:
        choices: of every matrix, the narrowest first, which all get at least.
        budget: stored bits of all of them together.

    Raises:
        ValueError: the narrowest take more.
    """
    taken = [0] * len(choices)
    left = budget - sum(own[0].bits for own in choices)
    if left < 0:
        raise ValueError("the budget is less than the narrowest choices take")
    waiting: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        now, *wider = choices[index][taken[index] :]
        if wider:
            heapq.heappush(waiting, ((wider[0].loss - now.loss) / (wider[0].bits - now.bits), index))

    for index in range(len(choices)):
        offer(index)
    while waiting:
        _, index = heapq.heappop(waiting)
        price = choices[index][taken[index] + 1].bits - choices[index][taken[index]].bits
        if price <= left:
            left, taken[index] = left - price, taken[index] + 1
            offer(index)
    return taken


def outlier_order(weight: torch.Tensor) -> torch.Tensor:
    """Columns ``[in]`` int64 by how many of their values are extreme (CLAQ's outlier ratio), most first.

    In most columns of most matrices none is; there the largest magnitude decides.
    """
    sizes = weight.abs()
    largest = sizes.amax(0)
    ratio = (sizes > _EXTREME * sizes.mean()).sum(0) + 0.5 * largest / largest.max().clamp_min(1e-30)
    return ratio.argsort(descending=True, stable=True)


def hessian_order(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Columns ``[in]`` int64 by ``Σ_i w_ij² / U_jj²``, largest first: what losing a column altogether would cost."""
    return (weight.square().sum(0) * importance).argsort(descending=True, stable=True)


def allocate_by_order(
    order: torch.Tensor, out_features: int, base: Base, budget: float, outlier_budget: float = 0
) -> ColumnPlan:
    """The published allocation in one matrix: as many columns as the budget lets get 4 bits, the first of an order.

    A tenth of the columns, the first in the order, keep 3.5 times as many outliers as the others.

    Args:
        order: ``[in]`` int64.
        out_features: rows.
        base: width of the other columns.
        budget: stored bits of the matrix.
        outlier_budget: those of them that outliers get.
    """
    order = order.cpu()
    narrow = base_plan(len(order), base)
    shares = _shares(order)

    def bits(plans: Sequence[ColumnPlan]) -> int:
        return bits_of(plans[0], base, out_features)

    def outliers_at(price: float) -> list[ColumnPlan]:
        counts = (shares * out_features / price).round().clamp(max=out_features // 2)
        return [narrow._replace(outliers=counts.long())]

    if outlier_budget > 0:
        narrow = _within(outliers_at, bits, bits([narrow]) + outlier_budget, 8.0 * out_features)[0]

    def widened_at(price: float) -> list[ColumnPlan]:
        widths = narrow.widths.clone()
        widths[order[: int(len(order) / (1 + price))]] = WIDEST
        return [narrow._replace(widths=widths)]

    return _within(widened_at, bits, budget, 4.0 * len(order))[0]


def published_plan(
    order: torch.Tensor, processing: torch.Tensor, out_features: int, base: Base, target: float, outlier_bits: float
) -> ColumnPlan:
    """What the published code makes of nominal bits, its slips included.

    Half of the target's excess over 2 bits, or all of it over 3, is the share of columns that get 4. Outliers are
    taken at both tails of a column, twice what was meant, and a column's share of them is looked up by its place in
    its block: the first 128 columns' shares are everybody's.

    Args:
        order: ``[in]`` int64, by which columns are widened.
        processing: ``[in]`` int64, in which they are processed.
        out_features: rows.
        base: width of the other columns, 2 or 3.
        target: nominal bits of the codes, from ``base`` to 4.
        outlier_bits: nominal bits a weight of the outliers, 0.07 in the paper.
    """
    order = order.cpu()
    plan = base_plan(len(order), base)
    share = (target - base) / (WIDEST - base) if target > base else 0.0
    plan.widths[order[: round(share * len(order))]] = WIDEST
    mean = outlier_bits / NOMINAL_OUTLIER_BITS
    shares = _shares(order)
    shares *= mean / (1 + _TOP_COLUMNS * (_TOP_RATIO - 1))
    looked_up = shares[processing.cpu()[:_PUBLISHED_BLOCK]]
    used = torch.empty_like(shares)
    used[processing.cpu()] = looked_up.repeat(-(-len(order) // len(looked_up)))[: len(order)]
    return plan._replace(outliers=2 * (used * out_features).round().long())


def _shares(order: torch.Tensor) -> torch.Tensor:
    """``[in]`` how many outliers each column keeps, relative to most columns."""
    shares = torch.ones(len(order))
    shares[order[: round(_TOP_COLUMNS * len(order))]] = _TOP_RATIO
    return shares


def _widths(one: Survey, base: Base, price: float) -> torch.Tensor:
    """``[in]`` the width of each column that pays at a price of loss per bit."""
    widths = torch.arange(base, base + len(one.losses))
    cost = widths * one.out_features + _LEVEL_BITS * 2**widths
    return widths[(one.losses + price * cost.unsqueeze(1)).argmin(0)]


def _outliers(one: Survey, price: float) -> torch.Tensor:
    """``[in]`` how many values of each column pay, were it of the base width."""
    pays = one.gains > price * OUTLIER_BITS
    return one.columns[pays].bincount(minlength=one.losses.shape[1])


def _joint(one: Survey, base: Base, price: float) -> ColumnPlan:
    """What pays together: a widened column needs no outliers."""
    widths = _widths(one, base, price)
    return ColumnPlan(widths, _outliers(one, price) * (widths == base))


def _within(
    plans: Callable[[float], list[ColumnPlan]],
    bits: Callable[[Sequence[ColumnPlan]], int],
    budget: float,
    highest: float,
) -> list[ColumnPlan]:
    """The plans of the lowest price that stay within a budget, found by bisection of the price's logarithm."""
    low, high = highest * 1e-15, highest
    best = plans(high)
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        tried = plans(middle)
        if bits(tried) <= budget:
            high, best = middle, tried
        else:
            low = middle
    return best
