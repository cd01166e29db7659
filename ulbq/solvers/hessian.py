"""Second moments of a layer's inputs, factored so that the error of one column is made good in the next ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ulbq import distributed
from ulbq.errors import NumericsError

_FIRST_DAMPING = 1e-4
"""Where damping starts to be raised from 0."""
_MOST_DAMPING = 1.0
"""A share of the mean diagonal at which no sum of squares is singular any more."""

_STRIP = 1024
"""Columns of a sum of squares that are added up at once, of those on and below the diagonal alone."""
_WHOLE = 512
"""A triangular matrix of up to so many rows is inverted at once."""
_SOLVED = 4096
"""Rows or columns that are factored, or solved for, at once."""

_TINY = 1e-12
"""A token whose input is smaller counts for nothing."""

FEWEST_TOKENS = 1 / 4
"""Tokens a column. With fewer, errors go to where these samples happen not to look: on other samples of correlated
random inputs, the error is then no lower than that of rounding to nearest; at two a column it is a quarter of that."""


class HessianSum:
    """``2/n XᵀX``, the Hessian of a layer's squared output error, added up input by input.

    Args:
        columns: input dimension of the layer.
        device: where it is added up.
        relative: divide each row of X by its root mean square, so that every token counts by its relative error. An
            attention sink's activations are larger than all others together: by plain squares they are all that counts.
        groups: of the layer's outputs, each with a weight of its own for every token.
        diagonal: keep the squares on the diagonal alone, for inputs of which there will be too few tokens.

    Attributes:
        tokens: how many rows of X it is made of.
        heldout: the same of samples that nothing is fitted to; None where nothing has to be judged.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        *,
        relative: bool = False,
        groups: int = 1,
        diagonal: bool = False,
    ) -> None:
        self._relative = relative
        self._diagonal = diagonal
        self._sums = torch.zeros(groups, columns, min(columns, _STRIP) if diagonal else columns, device=device)
        self._whole = True
        self.tokens = 0
        self.heldout: HessianSum | None = None
        self._lent = 0

    @property
    def known_by(self) -> int:
        """Rows by which the matrix is known: those of X, and of what was lent to it."""
        return self.tokens + self._lent

    @property
    def columns(self) -> int:
        """Input dimension of the layer."""
        return self._sums.shape[1]

    @property
    def few(self) -> bool:
        """Whether it is known by too few tokens to say how columns depend on each other."""
        return self._diagonal or self.known_by < FEWEST_TOKENS * self.columns

    @property
    def diagonal(self) -> torch.Tensor:
        """``[in]`` float32, the mean over the groups."""
        if not self._diagonal:
            return self.matrix.diagonal()
        squares = self._sums.split(_STRIP, 1)
        return torch.cat([square.diagonal(dim1=1, dim2=2) for square in squares], 1).mean(0)

    @property
    def matrices(self) -> torch.Tensor:
        """``[groups, in, in]`` float32; zeros before the first token."""
        if self._diagonal:
            raise ValueError("the diagonal alone was kept")
        if not self._whole:
            for first in range(0, self._sums.shape[1], _STRIP):
                last = first + _STRIP
                self._sums[:, first:last, last:] = self._sums[:, last:, first:last].mT
            self._whole = True
        return self._sums

    @property
    def matrix(self) -> torch.Tensor:
        """``[in, in]`` float32, the mean over the groups."""
        return self.matrices[0] if len(self._sums) == 1 else self.matrices.mean(0)

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take in some inputs.

        Args:
            inputs: ``[..., in]`` of any float dtype.
            weights: ``[n, groups]`` of their rows, whose mean product with a row's mean square is about 1. They say
                half of what a row counts. The other half is the same for all relative errors: with few samples, a few
                tokens that others attend to have nearly all the weight of some layers.
        """
        rows = inputs.float().flatten(0, -2)
        if not len(rows):
            return
        sizes = rows.square().mean(1, keepdim=True)
        if weights is not None:
            weights = (1 + weights * sizes) / 2
        if self._relative or weights is not None:
            rows = rows / sizes.sqrt().clamp_min(_TINY)
        total = self.tokens + len(rows)
        for group, own in enumerate(self._sums):
            weighted = rows if weights is None else rows * weights[:, group : group + 1]
            for first in range(0, len(own), _STRIP):
                strip = weighted[:, first : first + _STRIP]
                # It is symmetric: what lies above the strip's square has been added up below the diagonal.
                last, at = (first + _STRIP, 0) if self._diagonal else (None, first)
                below = own[first:last, at : at + strip.shape[1]]
                below.addmm_(rows[:, first:last].t(), strip, beta=self.tokens / total, alpha=2 / total)
        self._whole = self.columns <= _STRIP
        self.tokens = total

    @classmethod
    def mean(cls, sums: Sequence["HessianSum"]) -> "HessianSum":
        """That of the rows of all of them together."""
        groups, columns, _ = sums[0].matrices.shape
        whole = cls(columns, sums[0].matrices.device, groups=groups)
        whole.tokens = sum(one.tokens for one in sums)
        for one in sums:
            whole._sums.add_(one.matrices, alpha=one.tokens / max(whole.tokens, 1))
        return whole

    def borrow(self, other: "HessianSum", count: float) -> None:
        """Take in another's mean as that of ``count`` rows; nothing where it has none."""
        if other.tokens:
            self.matrices.lerp_(other.matrices, count / (self.tokens + count))
            self._lent = other.tokens

    def reduce(self) -> None:
        """Take in what the other processes of the run have added up; all hold the same then."""
        total = int(distributed.total(self.tokens)[0])
        sums = self._sums if self._diagonal else self.matrices
        if total > self.tokens:
            sums.mul_(self.tokens / total)
        distributed.sum_(sums)
        self.tokens = total


@dataclass(frozen=True)
class HessianFactor:
    """The damped Hessian H of a layer's inputs as the upper U with ``H⁻¹ = UᵀU``, its columns in processing order.

    Attributes:
        upper: ``[in, in]`` float32, positive on its diagonal.
        order: ``[in]`` int64, the column that is processed at each step.
        dead: ``[in]`` bool, in original order: columns whose input was always 0. They depend on no other column.
        importance: ``[in]`` float32, in original order: what a squared error in a column costs when the columns after
            it have made good what they can, ``1/U_ii²``. Dead columns count as little as the least of the others.
        damping: the share of the mean diagonal that was added to the diagonal.
    """

    upper: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    importance: torch.Tensor
    damping: float


def activation_order(hessian: torch.Tensor) -> torch.Tensor:
    """Columns ``[in]`` int64 with the largest mean square input first (GPTQ's act-order)."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def sum_memory(columns: int, *, diagonal: bool = False) -> int:
    """Bytes of a :class:`HessianSum`."""
    return 4 * columns * (min(columns, _STRIP) if diagonal else columns)


def factor_memory(columns: int, *, overwrite: bool = False) -> int:
    """Bytes that :func:`factorize` takes beside a Hessian, its result among them."""
    double, single = 8 * columns**2, 0 if overwrite else 4 * columns**2
    half = columns // 2
    # A square is factored in a copy of its own. What is solved with is copied, and of what is solved for some rows
    # twice. Strips of the result are turned round as they are rounded.
    factoring, inverting = 16 * min(columns, _SOLVED) ** 2, 8 * half * (half + 2 * min(half, _SOLVED))
    return double + max(factoring, inverting, single + 8 * columns * min(columns, _STRIP))


@torch.no_grad()
def factorize(
    hessian: torch.Tensor, *, damping: float = 0.01, order: torch.Tensor | None = None, overwrite: bool = False
) -> HessianFactor:
    """Damp, permute and factor a Hessian; the arithmetic is float64.

    GPTQ inverts H and factors the inverse. With J the reversal of all columns and ``JHJ = LLᵀ``, its factor is
    ``U = J L⁻¹ J``: one factorization less, and H is never inverted.

    Args:
        hessian: ``[in, in]`` symmetric, positive semi-definite. All zeros are taken for an identity.
        damping: share of the mean diagonal to add to the diagonal, raised tenfold as long as H is singular.
        order: ``[in]`` int64, the columns in processing order; None for as they are.
        overwrite: put the factor in the Hessian's place, which takes less memory.

    Raises:
        NumericsError: values that are not finite, or a matrix that no damping makes positive definite.
    """
    if not torch.isfinite(hessian).all():
        raise NumericsError(
            "The inputs of a layer have second moments that are not finite.",
            hint="Try `precision=fp32`, or other samples.",
        )
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    dead = hessian.diagonal() <= 0
    reverse = order.flip(0)
    while True:
        upper = _inverse_factor(hessian, damped_diagonal(hessian, damping), reverse, overwrite=overwrite)
        if upper is not None:
            return HessianFactor(upper, order, dead, _importance(upper, order, dead), damping)
        if damping >= _MOST_DAMPING:
            raise NumericsError(
                f"The second moments of a layer's inputs are singular even with a damping of {damping:g}.",
                hint="Try `precision=fp32`, more samples, or other ones.",
            )
        damping = min(max(10 * damping, _FIRST_DAMPING), _MOST_DAMPING)


def damped_diagonal(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """``[in]`` float64 diagonal of a Hessian with a share of its mean added, that of dead columns being the mean."""
    diagonal = hessian.diagonal().double()
    dead = diagonal <= 0
    mean = 1.0 if dead.all() else diagonal[~dead].mean().item()
    return diagonal.masked_fill(dead, mean) + damping * mean


def _importance(upper: torch.Tensor, order: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    cost = torch.empty_like(upper.diagonal())
    cost[order] = upper.diagonal().double().pow(-2).float()
    return cost if dead.all() else cost.masked_fill(dead, cost[~dead].min().item())


def _inverse_factor(
    hessian: torch.Tensor, diagonal: torch.Tensor, reverse: torch.Tensor, *, overwrite: bool
) -> torch.Tensor | None:
    """U of a Hessian with this diagonal, its columns taken last first; None where it is singular.

    There is one matrix in float64, which is filled, factored and inverted in its place.
    """
    size = len(hessian)
    lower = torch.empty(size, size, dtype=torch.float64, device=hessian.device)
    for first in range(0, size, _STRIP):
        lower[first : first + _STRIP] = hessian[reverse[first : first + _STRIP]][:, reverse]
    lower.diagonal().copy_(diagonal[reverse])
    if not _factor_(lower):
        return None
    _invert_(lower)
    # Float32 has less room than float64: a step would be divided by a diagonal of 0 or infinity.
    if not ((lower.diagonal().float() > 0).all() and all(_fits(rows) for rows in lower.split(_STRIP))):
        return None
    inverse = hessian if overwrite else torch.empty_like(hessian, memory_format=torch.contiguous_format)
    for first in range(0, size, _STRIP):
        last = min(first + _STRIP, size)
        inverse[first:last] = lower[size - last : size - first].flip(0, 1)
    return inverse


def _fits(rows: torch.Tensor) -> bool:
    """Whether values in float64 are finite in float32."""
    ends = torch.stack(rows.aminmax()).float()
    return bool(ends.isfinite().all())


def _factor_(matrix: torch.Tensor) -> bool:
    """Put a matrix's Cholesky factor in its place; False where it is singular, and left half done."""
    for first in range(0, len(matrix), _SOLVED):
        last = first + _SOLVED
        before = matrix[first:last, :first]
        square = matrix[first:last, first:last].addmm_(before, before.mT, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(square)
        if failed.item():
            return False
        square.copy_(lower)
        for at in range(last, len(matrix), _SOLVED):
            rows = matrix[at : at + _SOLVED]
            below = rows[:, first:last].addmm_(rows[:, :first], before.mT, alpha=-1)
            below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
        matrix[first:last, last:] = 0
    return True


def _invert_(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place: ``−C⁻¹ B A⁻¹`` for the block B below its diagonal, then A and C.

    To solve for an identity would take three times the work, most of it with zeros.
    """
    if len(lower) <= _WHOLE:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = len(lower) // 2
    above, corner, below = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    for rows in corner.split(_SOLVED):
        rows.copy_(torch.linalg.solve_triangular(above, rows, upper=False, left=False))
    for columns in corner.split(_SOLVED, 1):
        columns.copy_(torch.linalg.solve_triangular(below, columns, upper=False)).neg_()
    _invert_(above)
    _invert_(below)


def make_good(
    matrix: torch.Tensor, factor: HessianFactor, size: int, solve: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Let blocks of a matrix's rows be quantized one after the other, their errors made good in all rows after them.

    With a block ``B`` and its error ``E``, ``M_j −= (U_BB⁻¹ U_Bj)ᵀ E`` in the rows ``j`` after it (block LDLQ, QTIP).

    Args:
        matrix: ``[n, m]`` float32; it stays as it is.
        factor: ``[n, n]``, of what errors in two rows cost together, with the order of the rows.
        size: rows of a block.
        solve: takes a block ``[b, m]`` in which earlier errors are made good, and gives what it is quantized to.
    """
    rows = matrix[factor.order].contiguous()
    for first in range(0, len(rows), size):
        last = first + size
        block = rows[first:last]
        errors = block - solve(block)
        shared = torch.linalg.solve_triangular(factor.upper[first:last, first:last].T, errors, upper=False)
        rows[last:].addmm_(factor.upper[first:last, last:].T, shared, alpha=-1)


def output_cost(weight: torch.Tensor, hessian: torch.Tensor, tokens: int, scores: torch.Tensor | None) -> float:
    """What a layer's squared output error costs, in a unit that all layers share.

    With Fisher scores ``Σ (∂CE/∂W)²``, the mean squared gradient at the layer's outputs: a score is about that times a
    squared input (the layer's Fisher matrix as a Kronecker product). Without, a token's error counts relative to the
    mean output. What no token reaches costs nothing.
    """
    if not tokens:
        return 0.0
    if scores is not None:
        return (scores.sum() / (len(weight) * hessian.diagonal().sum()).clamp_min(1e-30)).item()
    return tokens / (weight @ hessian * weight).sum().clamp_min(1e-30).item()
