import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulbq.errors import NumericsError, UsageError
from ulbq.formats.levels import assign
from ulbq.solvers import cuts
from ulbq.solvers.kmeans import kmeans_1d, refine


def exact_error(values: torch.Tensor, k: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The least error by dynamic programming over all values, ``[columns]``: k·n² a column."""
    order = values.double().argsort(1)
    ordered = values.double().gather(1, order)
    ordered -= ordered.mean(1, keepdim=True)
    weight = torch.ones_like(ordered) if weights is None else weights.double().gather(1, order)
    mass, sums, squares = (torch.nn.functional.pad((weight * ordered**power).cumsum(1), (1, 0)) for power in (0, 1, 2))

    def between(total: torch.Tensor) -> torch.Tensor:
        return total.unsqueeze(2) - total.unsqueeze(1)  # [columns, end, start]

    cost = between(squares) - between(sums) ** 2 / between(mass).clamp_min(1e-300)
    above = torch.ones(cost.shape[1:], dtype=torch.bool).triu(1)
    cost = cost.clamp_min(0).masked_fill(above, torch.inf)
    best = cost[:, :, 0]
    for _ in range(k - 1):
        best = (cost + best.unsqueeze(1)).amin(2)
    return best[:, -1]


FAMILIES = ("gaussian", "slash", "student-t", "bimodal", "outliers", "few values", "uniform", "shifted")


def columns(family: str, count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal, uniform = (draw(count, size, generator=generator) for draw in (torch.randn, torch.rand))
    if family == "slash":
        return normal / uniform.sqrt()
    if family == "student-t":  # two degrees of freedom
        return normal / torch.empty(count, size).exponential_(generator=generator).sqrt()
    if family == "bimodal":
        return normal + 4 * (uniform > 0.7)
    if family == "outliers":
        normal[:, :3] *= 30
    if family == "few values":
        return (13 * uniform).floor() * 0.1 - 0.6
    if family == "shifted":
        return 10 + 0.01 * normal
    return uniform if family == "uniform" else normal


def uneven(count: int, size: int, seed: int) -> torch.Tensor:
    return 10 * torch.rand(count, size, generator=torch.Generator().manual_seed(seed)) ** 3


def nearest_error(values: torch.Tensor, centroids: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    squares = (values.double().unsqueeze(2) - centroids.double().unsqueeze(1)).square().amin(2)
    return (squares if weights is None else squares * weights).sum(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("k", "worst"), [(2, 1e-3), (4, 1e-3), (8, 1e-3), (16, 1e-3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_good_as_the_exact_solution(family: str, k: int, worst: float, weighted: bool) -> None:
    values = columns(family, 12, 180, seed=k)
    weights = uneven(12, 180, seed=k) if weighted else None
    found, best = kmeans_1d(values, k, weights=weights).error, exact_error(values, k, weights)
    floor = 1e-9 * values.double().var(1) * values.shape[1]  # few values may be reached exactly
    assert (found >= best * (1 - 1e-6) - floor).all()
    assert (found <= best * (1 + worst) + floor).all()
    assert (found <= best * (1 + 1e-5) + floor).double().mean() >= (0.9 if k <= 4 else 0.75)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
@pytest.mark.parametrize("family", ["gaussian", "student-t", "bimodal", "outliers", "few values"])
@pytest.mark.parametrize("k", [4, 8, 16])
def test_never_worse_than_the_best_of_50_starts_of_scikit_learn(k: int, family: str) -> None:
    from sklearn.cluster import KMeans

    values, weights = columns(family, 2, 300, seed=3), uneven(2, 300, seed=3)
    for weight in (None, weights):
        found = kmeans_1d(values, k, weights=weight).error
        for row, column in enumerate(values.double().numpy()):
            fitted = KMeans(k, n_init=50, random_state=0).fit(
                column[:, None], sample_weight=None if weight is None else weight[row].numpy()
            )
            assert found[row] <= fitted.inertia_ * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("weighted", [False, True])
def test_columns_of_few_values_are_solved_exactly(weighted: bool) -> None:
    values = torch.cat([columns(family, 8, 96, seed=4) for family in ("gaussian", "slash", "bimodal")])
    weights = uneven(24, 96, seed=4) if weighted else None
    torch.testing.assert_close(
        kmeans_1d(values, 4, weights=weights).error, exact_error(values, 4, weights), rtol=1e-5, atol=0
    )


@given(
    k=st.sampled_from([2, 3, 4, 8]),
    size=st.integers(1, 40),
    levels=st.integers(1, 12),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
    seed=st.integers(0, 10_000),
    weighted=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_returned_fits_together(
    k: int, size: int, levels: int, scale: float, seed: int, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randint(levels, (3, size), generator=generator) - levels // 2).float() * scale
    weights = torch.randint(3, (3, size), generator=generator).float() if weighted else None
    centroids, error = kmeans_1d(values, k, weights=weights)
    assert centroids.shape == (3, k)
    assert (centroids.diff(dim=1) >= 0).all()
    codes = assign(values, centroids)
    decoded = centroids.gather(1, codes.long())
    torch.testing.assert_close(
        (values.double() - decoded).square().mul(1 if weights is None else weights).sum(1), error, rtol=1e-9, atol=0
    )
    best = exact_error(values / scale, k, weights) * scale**2
    assert (error <= best * 1.0001 + 1e-9 * scale**2).all()
    if levels <= k and not weighted:
        assert (error <= 1e-12 * (levels * scale) ** 2).all()


def test_every_part_of_a_large_matrix_is_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = columns("gaussian", 37, 200, seed=5), uneven(37, 200, seed=5)
    whole = kmeans_1d(values, 4, weights=weights)
    monkeypatch.setattr("ulbq.solvers.kmeans._VALUES", 1000)
    monkeypatch.setattr(cuts, "_PAIRS", 2 * 97**2)
    parts = kmeans_1d(values, 4, weights=weights)
    torch.testing.assert_close(parts.error, whole.error)
    torch.testing.assert_close(parts.centroids, whole.centroids)
    single = kmeans_1d(values[5:6], 4, weights=weights[5:6])
    torch.testing.assert_close(single.centroids, whole.centroids[5:6])
    assert kmeans_1d(values[:0], 4).centroids.shape == (0, 4)


def test_columns_may_be_a_transposed_matrix() -> None:
    matrix = columns("gaussian", 200, 6, seed=6)
    torch.testing.assert_close(kmeans_1d(matrix.T, 4), kmeans_1d(matrix.T.contiguous(), 4))


def test_the_order_of_the_values_does_not_matter_and_weights_stay_with_theirs() -> None:
    values, weights = columns("student-t", 4, 300, seed=7), uneven(4, 300, seed=7)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        kmeans_1d(values[:, order], 4, weights=weights[:, order]), kmeans_1d(values, 4, weights=weights)
    )


def test_a_weight_counts_like_as_many_values() -> None:
    values = columns("gaussian", 1, 120, seed=8)
    weights = torch.randint(0, 4, (1, 120), generator=torch.Generator().manual_seed(8))
    repeated = values[0].repeat_interleave(weights[0]).unsqueeze(0)
    torch.testing.assert_close(kmeans_1d(values, 4, weights=weights.float()), kmeans_1d(repeated, 4))


def test_columns_without_any_weight_are_clustered_as_if_it_were_equal() -> None:
    values = columns("gaussian", 2, 300, seed=9)
    weights = torch.stack([torch.zeros(300), torch.ones(300)])
    found, plain = kmeans_1d(values, 4, weights=weights), kmeans_1d(values, 4)
    torch.testing.assert_close(found.centroids, plain.centroids)
    assert found.error[0] == 0
    torch.testing.assert_close(found.error[1], plain.error[1])


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_that_are_not_finite_are_refused(bad: float, weighted: bool) -> None:
    values = columns("gaussian", 2, 50, seed=10)
    weights = torch.ones_like(values) if weighted else None
    values[1, 20] = bad
    with pytest.raises(NumericsError):
        kmeans_1d(values, 4, weights=weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_weights_that_are_not_finite_or_negative_are_refused(bad: float) -> None:
    weights = torch.ones(2, 50)
    weights[1, 20] = bad
    with pytest.raises(NumericsError):
        kmeans_1d(columns("gaussian", 2, 50, seed=10), 4, weights=weights)


@pytest.mark.parametrize("k", [1, 257])
def test_a_number_of_clusters_that_no_code_holds_is_refused(k: int) -> None:
    with pytest.raises(UsageError):
        kmeans_1d(torch.zeros(1, 5), k)


@pytest.mark.parametrize("k", [2, 4, 16, 32])
def test_assign_takes_the_nearest_centroid(k: int) -> None:
    values = columns("slash", 5, 200, seed=11)
    centroids = columns("gaussian", 5, k, seed=12).sort(1).values
    codes = assign(values, centroids)
    assert codes.dtype == torch.uint8
    chosen = (values - centroids.gather(1, codes.long())).abs()
    nearest = (values.unsqueeze(2) - centroids.unsqueeze(1)).abs().amin(2)
    torch.testing.assert_close(chosen, nearest, rtol=0, atol=1e-6)


def test_adjacent_floats_get_their_own_codes() -> None:
    up = torch.tensor(torch.inf)
    first = torch.tensor([[1.0], [1.5], [-2.0], [3e38]])
    second = first.nextafter(up)  # the middle of two floats rounds to the even one: down here, up for the next pair
    for pair in (torch.cat((first, second), 1), torch.cat((second, second.nextafter(up)), 1)):
        assert assign(pair, pair).tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("weighted", [False, True])
def test_refine_makes_lloyds_steps(weighted: bool) -> None:
    values, centroids = columns("gaussian", 3, 400, seed=13), torch.linspace(-1, 2, 4).expand(3, -1)
    weights = uneven(3, 400, seed=13) if weighted else None
    expected = centroids.double().numpy().copy()
    for _ in range(2):
        for row in range(3):
            column = values[row].double().numpy()
            nearest = np.abs(column[:, None] - expected[row]).argmin(1)
            heavy = np.ones(400) if weights is None else weights[row].double().numpy()
            for code in range(4):
                inside = nearest == code
                expected[row, code] = (heavy[inside] * column[inside]).sum() / heavy[inside].sum()
    found = refine(values, centroids, 2, weights)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    assert (nearest_error(values, found, weights) < nearest_error(values, centroids, weights)).all()


def test_refine_keeps_what_is_fitted_and_what_is_empty() -> None:
    values = columns("gaussian", 4, 400, seed=14)
    fitted = kmeans_1d(values, 4).centroids
    torch.testing.assert_close(refine(values, fitted), fitted)
    apart = torch.tensor([[-50.0, -0.5, 0.5, 60.0]])
    assert refine(values[:1], apart)[0, [0, 3]].tolist() == [-50.0, 60.0]
