"""Hadamard matrices of the orders that models have."""

from functools import reduce

import pytest
import torch

from ulbq.models.hadamard import hadamard_factors, paley

# Of Paley's first kind, of his second, powers of two, products; widths and head widths of known models among them.
ORDERS = [2, 4, 12, 16, 20, 24, 28, 36, 40, 44, 48, 60, 64, 72, 80, 96, 104, 108, 112, 120, 128, 144, 160, 192, 256]
WIDTHS = [576, 896, 960, 1152, 1536, 2048, 2560, 3072, 3200, 3584, 4096, 4608, 5120, 6144, 6656, 7168, 8192, 18432]


@pytest.mark.parametrize("order", ORDERS)
def test_entries_are_signs_and_rows_are_orthogonal(order: int) -> None:
    factors = hadamard_factors(order)
    assert factors is not None
    matrix = reduce(torch.kron, factors)
    assert matrix.shape == (order, order)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_known_width_is_a_product_of_small_ones(width: int) -> None:
    factors = hadamard_factors(width)
    assert factors is not None
    product = 1
    for factor in factors:
        assert torch.equal(factor @ factor.T, len(factor) * torch.eye(len(factor), dtype=torch.float64))
        product *= len(factor)
    assert product == width
    assert max(map(len, factors)) <= 104


@pytest.mark.parametrize("order", [3, 6, 10, 50, 52, 92, 100, 130])
def test_what_these_constructions_do_not_give_is_not_made_up(order: int) -> None:
    assert hadamard_factors(order) is None


def test_paleys_own_twelve() -> None:
    matrix = paley(12)
    assert matrix is not None
    # Over the field of 11, whose squares are 1, 3, 4, 5 and 9: the second row looks up 0 - 0, 0 - 1, ….
    assert matrix[0].tolist() == [1] * 12
    assert matrix[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]
