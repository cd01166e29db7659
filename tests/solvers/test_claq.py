"""Column codebooks by compensation, and the common fit, against what is written out."""

import pytest
import torch

from ulbq.formats.codebook import Columns
from ulbq.formats.levels import assign
from ulbq.solvers.claq import ClaqSettings, ColumnPlan, claq
from ulbq.solvers.hessian import HessianFactor, HessianSum, activation_order, factorize
from ulbq.solvers.kmeans import kmeans_1d, refine
from ulbq.solvers.refit import refit

ROWS, COLUMNS = 24, 40
PLAIN = ColumnPlan(torch.full((COLUMNS,), 2), torch.zeros(COLUMNS, dtype=torch.int64))
MIXED = ColumnPlan(torch.arange(COLUMNS) % 3 + 2, torch.arange(COLUMNS) % 4)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with heavy tails, and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) ** 3
    inputs = torch.randn(300, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    total = HessianSum(COLUMNS)
    total.add(inputs)
    return weight, total.matrix


def factored(hessian: torch.Tensor, order: bool = True) -> HessianFactor:
    return factorize(hessian, order=activation_order(hessian) if order else None)


def dense(columns: Columns) -> torch.Tensor:
    values = columns.codebooks.gather(1, columns.codes.long())
    if columns.outliers is not None:
        values.view(-1)[columns.outliers.positions] = columns.outliers.values
    return values.T


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)


def loss(weight: torch.Tensor, columns: Columns, hessian: torch.Tensor) -> float:
    error = weight - dense(columns)
    return float((error @ damped(hessian) * error).sum())


def test_against_the_loop_written_out() -> None:
    weight, hessian = problem()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian).double()), upper=True)
    values = weight.double().clone()
    expected = torch.zeros_like(values)
    books = kmeans_1d(weight.T.contiguous(), 4).centroids
    for j in range(COLUMNS):
        column = values[:, j].float().unsqueeze(0)
        book = refine(column, books[j : j + 1]).half().float()
        expected[:, j] = book[0][assign(column, book)[0].long()]
        values -= torch.outer((values[:, j] - expected[:, j]) / upper[j, j], upper[j])
    found = claq(weight, hessian, factored(hessian, order=False), PLAIN, ClaqSettings(refit=False))
    # A value in the middle of two levels may fall to either side.
    assert ((dense(found.columns) - expected).abs() > 1e-4).float().mean() < 0.01
    assert found.loss == pytest.approx(loss(weight, found.columns, hessian), rel=1e-3)


@pytest.mark.parametrize("plan", [PLAIN, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("whole_fit", [False, True])
def test_every_column_gets_what_the_plan_says(plan: ColumnPlan, whole_fit: bool) -> None:
    weight, hessian = problem()
    settings = ClaqSettings(block_size=16, whole_fit=whole_fit)
    found = claq(weight, hessian, factored(hessian), plan, settings)
    columns = found.columns
    assert torch.equal(columns.widths, plan.widths)
    assert bool((columns.codes < (1 << plan.widths).unsqueeze(1)).all())
    placed = torch.zeros(COLUMNS, dtype=torch.int64)
    if columns.outliers is not None:
        assert bool((columns.outliers.positions.diff() > 0).all())
        placed = (columns.outliers.positions // ROWS).bincount(minlength=COLUMNS)
    assert torch.equal(placed, plan.outliers)
    assert found.loss == pytest.approx(loss(weight, columns, hessian), rel=1e-3)


def test_outliers_out_of_the_fit_are_better_than_in_it() -> None:
    plan = PLAIN._replace(outliers=torch.full((COLUMNS,), 2))
    losses = dict.fromkeys((False, True), 0.0)
    for seed in range(4):
        weight, hessian = problem(seed)
        for whole in losses:
            settings = ClaqSettings(refit=False, whole_fit=whole)
            losses[whole] += claq(weight, hessian, factored(hessian), plan, settings).loss
    assert losses[False] < 0.8 * losses[True]


@pytest.mark.parametrize("plan", [PLAIN, MIXED], ids=["plain", "mixed"])
def test_the_common_fit_solves_its_normal_equations(plan: ColumnPlan) -> None:
    weight, hessian = problem()
    factor = factored(hessian)
    start = claq(weight, hessian, factor, plan, ClaqSettings(refit=False)).columns
    # Levels far from where they should be: the pass leaves little to gain.
    noise = 1 + 0.3 * torch.randn(start.codebooks.shape, generator=torch.Generator().manual_seed(5))
    spoiled = start._replace(codebooks=start.codebooks * noise)
    found = refit(weight, hessian, factor, spoiled)
    assert found.loss == pytest.approx(loss(weight, found.columns, hessian), rel=1e-3)
    assert found.loss < 0.5 * loss(weight, spoiled, hessian)
    # What is left does not pull at any level; against the pull of the levels alone, each by itself.
    pull = damped(hessian) @ (weight - dense(found.columns)).T
    served = torch.ones_like(pull)
    if found.columns.outliers is not None:
        served.view(-1)[found.columns.outliers.positions] = 0
    codes, zero = found.columns.codes.long(), torch.zeros_like(found.columns.codebooks)
    left = zero.scatter_add(1, codes, pull * served).norm()
    before = damped(hessian) @ (weight - dense(spoiled)).T
    assert left < 0.02 * zero.scatter_add(1, spoiled.codes.long(), before * served).norm()


def test_the_fit_after_the_pass_lowers_the_loss() -> None:
    weight, hessian = problem()
    factor = factored(hessian)
    plain = claq(weight, hessian, factor, PLAIN, ClaqSettings(refit=False)).loss
    assert claq(weight, hessian, factor, PLAIN, ClaqSettings()).loss < plain
