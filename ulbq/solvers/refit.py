"""The codebooks of all columns fitted together, the codes fixed: least squares against the layer's outputs.

Column by column a codebook fits its own values; what the layer puts out is wrong by the sum over columns. With T what
the codebooks have to make (the weight, less what is stored as outliers) and S(C) the matrix of codebooks C, the codes
fixed, ``tr((T − S(C)) H (T − S(C))ᵀ)`` is quadratic in C. Its normal equations couple all columns, 2^b unknowns each;
conjugate gradients solve them with nothing larger than the weight itself.
"""

from typing import NamedTuple

import torch

from ulbq.formats.codebook import Columns, ascending
from ulbq.formats.levels import sum_by_level
from ulbq.solvers.hessian import HessianFactor, damped_diagonal

_STEPS = 16
_TOLERANCE = 3e-3
"""Of the residual relative to the start's: what is left then is far below float16's rounding of the codebooks."""


class Refitted(NamedTuple):
    """Columns with other codebooks (float16 values), and ``tr((W − Q) H (W − Q)ᵀ)`` with them, H damped."""

    columns: Columns
    loss: float


@torch.no_grad()
def refit(weight: torch.Tensor, hessian: torch.Tensor, factor: HessianFactor, columns: Columns) -> Refitted:
    """Fit codebooks.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``[in, in]`` float32 second moments of its inputs, without damping.
        factor: says how much the Hessian is damped.
        columns: what a pass found.
    """
    damped = hessian.clone()
    damped.diagonal().copy_(damped_diagonal(hessian, factor.damping))
    system = _System(columns, damped)
    error = weight.T - matrix_of(columns)
    change = system.solve(damped @ error)
    books = (columns.codebooks + change).half().float()
    error = error - system.matrix(books - columns.codebooks)
    loss = (error * (damped @ error)).sum(dtype=torch.float64).item()
    return Refitted(ascending(columns._replace(codebooks=books)), loss)


def matrix_of(columns: Columns) -> torch.Tensor:
    """``[in, out]`` what columns stand for."""
    values: torch.Tensor = columns.codebooks.gather(1, columns.codes.long())
    if columns.outliers is not None:
        values.view(-1)[columns.outliers.positions] = columns.outliers.values
    return values


class _System:
    """The normal equations of codebooks ``[in, k]``, never written out."""

    def __init__(self, columns: Columns, hessian: torch.Tensor) -> None:
        self._codes, self._hessian = columns.codes.long(), hessian
        self._served = torch.ones(columns.codes.shape, device=hessian.device)
        if columns.outliers is not None:
            self._served.view(-1)[columns.outliers.positions] = 0
        self._levels = columns.codebooks.shape[1]
        counts = self.gather(torch.ones_like(self._served))
        # A level that no value has stays where it is.
        self._scale = (counts * hessian.diagonal().unsqueeze(1)).clamp_min(1e-30).reciprocal() * (counts > 0)

    def matrix(self, books: torch.Tensor) -> torch.Tensor:
        """``[in, out]`` values of codebooks ``[in, k]``; 0 for outliers."""
        return books.gather(1, self._codes).mul_(self._served)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """``[in, k]`` sums of values ``[in, out]`` over those that have a level; the transpose of :meth:`matrix`."""
        return sum_by_level(values * self._served, self._codes, self._levels)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Codebooks ``[in, k]`` whose matrix M has ``gather(H M) = gather(right)``, by conjugate gradients."""
        found = torch.zeros_like(self._scale)
        residual = self.gather(right)
        step = scaled = residual * self._scale
        size = first = (residual * scaled).sum()
        for _ in range(_STEPS):
            image = self.gather(self._hessian @ self.matrix(step))
            length = size / (step * image).sum().clamp_min(1e-30)
            found = found + length * step
            residual = residual - length * image
            scaled = residual * self._scale
            before, size = size, (residual * scaled).sum()
            if size <= _TOLERANCE**2 * first:
                break
            step = scaled + size / before * step
        return found
