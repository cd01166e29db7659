"""Coordinate descent over codes: no step raises the error, and where it ends no single code could do better."""

import pytest
import torch

from tests.solvers.test_claq import COLUMNS, MIXED, PLAIN, ROWS, damped, dense, factored, loss, problem
from ulbq.formats.codebook import Columns
from ulbq.solvers.claq import ClaqSettings, ColumnPlan, claq
from ulbq.solvers.descent import descend
from ulbq.solvers.hessian import factorize


def test_a_code_answers_the_error_of_another_column() -> None:
    weight, hessian = torch.full((1, 2), 0.6), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    columns = Columns(
        torch.zeros(2, 1, dtype=torch.uint8), torch.ones(2, dtype=torch.int64), torch.tensor([[0.0, 1.0]] * 2)
    )
    factor = factorize(hessian, damping=0.0)
    # 0.6 alone is nearest to 1. The second column then makes good what that is too much, though 0 is farther from it.
    assert descend(weight, hessian, factor, columns).codes.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("plan", [PLAIN, MIXED], ids=["plain", "mixed"])
def test_the_error_falls_until_no_single_code_lowers_it(plan: ColumnPlan) -> None:
    weight, hessian = problem()
    factor = factored(hessian)
    start = columns = claq(weight, hessian, factor, plan, ClaqSettings()).columns
    losses = [loss(weight, columns, hessian)]
    for _ in range(50):
        moved = descend(weight, hessian, factor, columns)
        losses.append(loss(weight, moved, hessian))
        assert losses[-1] <= losses[-2] * (1 + 1e-6)
        if torch.equal(moved.codes, columns.codes):
            break
        columns = moved
    assert torch.equal(moved.codes, columns.codes)
    assert losses[-1] < 0.97 * losses[0]
    assert torch.equal(columns.codebooks, start.codebooks)
    assert bool((columns.codes < (1 << plan.widths).unsqueeze(1)).all())
    # Every other code of every value: its change of the error, written out.
    error, costs = (weight - dense(columns)).double(), damped(hessian).double()
    pull = error @ costs
    outliers = torch.zeros(COLUMNS, ROWS, dtype=torch.bool)
    if columns.outliers is not None:
        outliers.view(-1)[columns.outliers.positions] = True
    for column, width in enumerate(plan.widths.tolist()):
        now = columns.codebooks[column].double()[columns.codes[column].long()]
        for level in columns.codebooks[column, : 1 << width].double():
            change = level - now
            rise = -2 * change * pull[:, column] + change.square() * costs[column, column]
            assert bool((rise[~outliers[column]] > -1e-4 * losses[-1]).all())


def test_sweeps_lower_the_loss_and_stop_where_other_samples_lose() -> None:
    weight, hessian = problem()
    factor = factored(hessian)
    plain = claq(weight, hessian, factor, PLAIN, ClaqSettings())
    swept = claq(weight, hessian, factor, PLAIN, ClaqSettings(sweeps=3))
    assert swept.loss < 0.97 * plain.loss
    assert swept.loss == pytest.approx(loss(weight, swept.columns, hessian), rel=1e-3)
    once = claq(weight, hessian, factor, PLAIN, ClaqSettings(sweeps=1))
    before, after = (weight - dense(one.columns) for one in (plain, once))
    # Samples of one direction alone, that in which the first sweep lost most.
    worst = torch.linalg.eigh(after.T @ after - before.T @ before).eigenvectors[:, -1]
    kept = claq(weight, hessian, factor, PLAIN, ClaqSettings(sweeps=3), torch.outer(worst, worst))
    assert torch.equal(dense(kept.columns), dense(plain.columns))
