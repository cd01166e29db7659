import itertools

import pytest
import torch

from ulbq.solvers import allocation
from ulbq.solvers.allocation import Survey, allocate, allocate_by_order, base_plan, bits_of, published_plan, survey
from ulbq.solvers.claq import ColumnPlan

ROWS, COLUMNS = 64, 32


def matrices(count: int = 3) -> list[Survey]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        weight = torch.randn(ROWS, COLUMNS, generator=generator) ** 3
        importance = torch.randn(COLUMNS, generator=generator).exp() ** 2
        found.append(survey(weight, importance, 2))
    return found


def total_bits(plans: list[ColumnPlan]) -> int:
    return sum(bits_of(plan, 2, ROWS) for plan in plans)


def loss(plans: list[ColumnPlan], surveys: list[Survey]) -> float:
    return sum(
        float(one.losses[plan.widths - 2, torch.arange(COLUMNS)].sum())
        for plan, one in zip(plans, surveys, strict=True)
    )


def test_a_survey_is_what_clustering_says() -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    importance = torch.arange(1.0, COLUMNS + 1)
    found = survey(weight, importance, 2)
    assert found.losses.shape == (3, COLUMNS)
    assert bool((found.losses.diff(dim=0) < 0).all())
    # A gain is a squared distance to a level, times what the column's errors cost.
    assert len(found.gains) == len(found.columns) == round(0.01 * weight.numel())
    assert bool((found.gains <= found.losses[0][found.columns.long()]).all())
    assert bool((found.gains.diff() <= 0).all())


def test_the_budget_is_kept_and_used() -> None:
    surveys = matrices()
    plain = total_bits([base_plan(COLUMNS, 2)] * 3)
    for more in (0, 2_000, 6_000):
        for outliers in (None, 0.0, more / 2):
            plans = allocate(surveys, 2, plain + more, outliers)
            assert total_bits(plans) <= plain + more
            # The next step would cost a column of 64 values and its levels, an outlier, or the map of columns.
            assert total_bits(plans) > plain + more - 400
            if outliers == 0.0:
                assert not any(plan.outliers.any() for plan in plans)


def test_widths_are_the_best_there_are() -> None:
    """Against all plans of one small matrix that cost as much or less."""
    weight = torch.randn(16, 5, generator=torch.Generator().manual_seed(2))
    one = survey(weight, torch.tensor([1.0, 9.0, 0.1, 3.0, 30.0]), 2)
    none = torch.zeros(5, dtype=torch.int64)
    best: dict[int, float] = {}
    for widths in itertools.product((2, 3, 4), repeat=5):
        plan = ColumnPlan(torch.tensor(widths), none)
        bits, lost = bits_of(plan, 2, 16), float(one.losses[plan.widths - 2, torch.arange(5)].sum())
        best[bits] = min(best.get(bits, float("inf")), lost)
    for budget in range(min(best), max(best), 50):
        [found] = allocate([one], 2, budget, 0.0)
        spent = bits_of(found, 2, 16)
        assert spent <= budget
        lost = float(one.losses[found.widths - 2, torch.arange(5)].sum())
        # On the convex hull: for the bits that it spends nothing is better.
        assert lost <= min(value for bits, value in best.items() if bits <= spent) + 1e-6


def test_one_budget_for_all_beats_as_much_for_each() -> None:
    surveys = matrices()
    surveys[0].losses.mul_(100)
    plain = bits_of(base_plan(COLUMNS, 2), 2, ROWS)
    apart = [allocate([one], 2, plain + 1_500, 0.0)[0] for one in surveys]
    together = allocate(surveys, 2, 3 * (plain + 1_500), 0.0)
    assert loss(together, surveys) < 0.7 * loss(apart, surveys)


def test_orders_widen_their_first_columns() -> None:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))
    plain = bits_of(base_plan(COLUMNS, 2), 2, ROWS)
    plan = allocate_by_order(order, ROWS, 2, plain + 3_000)
    count = int((plan.widths == 4).sum())
    assert count > 0
    assert set(order[:count].tolist()) == set((plan.widths == 4).nonzero().flatten().tolist())
    assert plain + 3_000 - 700 < bits_of(plan, 2, ROWS) <= plain + 3_000
    kept = allocate_by_order(order, 1000, 2, 1e9, 20_000).outliers
    first = order[: round(0.1 * COLUMNS)]
    rest = order[round(0.1 * COLUMNS) :]
    assert float(kept[first].float().mean() / kept[rest].float().mean()) == pytest.approx(3.5, rel=0.05)


def test_the_published_orders() -> None:
    weight = torch.full((ROWS, COLUMNS), 0.1)
    weight[:2, 3], weight[0, 7], weight[5, 9] = 50.0, 60.0, 0.2
    assert allocation.outlier_order(weight)[:3].tolist() == [3, 7, 9]
    importance = torch.ones(COLUMNS)
    importance[20] = 1e6
    assert allocation.hessian_order(weight, importance)[:3].tolist() == [20, 3, 7]


def test_the_published_slips() -> None:
    columns = 400
    order, processing = torch.arange(columns), torch.arange(columns).flip(0)
    plan = published_plan(order, processing, 1000, 2, 2.05, 0.07)
    assert int((plan.widths == 4).sum()) == round(0.025 * columns)
    # 0.4 % at both tails, for all: the columns that should keep more are looked up beyond the first 128 processed.
    assert set(plan.outliers.tolist()) == {8}
    swapped = published_plan(order, torch.arange(columns), 1000, 2, 2.05, 0.07)
    assert swapped.outliers[:30].tolist() == [28] * 30
    assert swapped.outliers[128:158].tolist() == [28] * 30
    half = published_plan(order, processing, 1000, 3, 3.5, 0.0)
    assert half.outliers.sum() == 0
    assert int((half.widths == 4).sum()) == columns // 2
    assert set(published_plan(order, processing, 1000, 2, 2.0, 0.07).widths.tolist()) == {2}


@pytest.mark.parametrize("base", [2, 3, 4])
def test_every_base_width(base: allocation.Base) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) ** 3
    one = survey(weight, torch.ones(COLUMNS), base)
    assert one.losses.shape == (5 - base, COLUMNS)
    plain = bits_of(base_plan(COLUMNS, base), base, ROWS)
    [plan] = allocate([one], base, plain + 500)
    assert plain < bits_of(plan, base, ROWS) <= plain + 500
    assert int(plan.widths.min()) >= base
    order = torch.arange(COLUMNS)
    assert bits_of(allocate_by_order(order, ROWS, base, plain + 500, 500), base, ROWS) <= plain + 500
