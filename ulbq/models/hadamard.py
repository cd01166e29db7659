"""Hadamard matrices: square, every entry 1 or -1, rows orthogonal to one another.

Sylvester's construction gives the powers of two, Paley's two the orders q + 1 and 2 (q + 1) over a prime q; a Kronecker
product of any of them is one again. Paley's hold over prime powers too, which no width of a known model has needed.
"""

from functools import lru_cache

import torch

# Two products by matrices this small take less than one by their Kronecker product.
_LARGEST_SYLVESTER = 64


@lru_cache
def hadamard_factors(order: int) -> tuple[torch.Tensor, ...] | None:
    """Matrices whose Kronecker product is a Hadamard matrix.

    Args:
        order: rows and columns of the product, 1 or more.

    Returns:
        Square float64 matrices of entries ±1, none of them for order 1; None where these constructions give none.
    """
    if order == 1:
        return ()
    if order & (order - 1) == 0:
        part = min(order, _LARGEST_SYLVESTER)
        return (*(hadamard_factors(order // part) or ()), sylvester(part))
    for divisor in range(12, order + 1, 4):
        if order % divisor == 0 and (matrix := paley(divisor)) is not None:
            rest = hadamard_factors(order // divisor)
            if rest is not None:
                return (matrix, *rest)
    return None


def sylvester(order: int) -> torch.Tensor:
    """The Hadamard matrix ``[order, order]``, float64, of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def paley(order: int) -> torch.Tensor | None:
    """A Hadamard matrix ``[order, order]``, float64, by one of Paley's constructions; None where neither gives one."""
    first, second = order - 1, order // 2 - 1
    if _is_prime(first) and first % 4 == 3:
        bordered = _bordered(_residues(first))
        bordered[1:, 0] = -1.0
        return bordered + torch.eye(order, dtype=torch.float64)
    if order % 2 == 0 and _is_prime(second) and second % 4 == 1:
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(_residues(second)), plus) + torch.kron(
            torch.eye(second + 1, dtype=torch.float64), minus
        )
    return None


def _residues(prime: int) -> torch.Tensor:
    """``[prime, prime]``: 1 where row minus column is a square modulo the prime, -1 where not, 0 at 0."""
    character = -torch.ones(prime, dtype=torch.float64)
    numbers = torch.arange(prime)
    character[numbers.square() % prime] = 1.0
    character[0] = 0.0
    return character[(numbers[:, None] - numbers) % prime]


def _bordered(core: torch.Tensor) -> torch.Tensor:
    """The matrix with a row and a column of ones before it, and 0 in the corner."""
    bordered = torch.ones(len(core) + 1, len(core) + 1, dtype=torch.float64)
    bordered[0, 0] = 0.0
    bordered[1:, 1:] = core
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
