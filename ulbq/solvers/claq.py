"""Column codebooks with errors made good in later columns (CLAQ, https://arxiv.org/abs/2405.17233).

GPTQ's loop, in which every column is clustered by itself when its turn comes, on the values that it has with all
earlier errors made good. Beyond the paper, outliers are chosen where the codebook leaves the largest errors, and the
codebooks of all columns are fitted together afterwards (:mod:`~ulbq.solvers.refit`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ulbq.formats.codebook import Columns, Outliers
from ulbq.formats.levels import assign
from ulbq.solvers.descent import descend
from ulbq.solvers.gptq import compensate
from ulbq.solvers.hessian import HessianFactor
from ulbq.solvers.kmeans import kmeans_1d, refine
from ulbq.solvers.refit import matrix_of, refit

_STEPS = 2
"""Lloyd's steps that follow what earlier columns of the same block have changed in a column."""


class ColumnPlan(NamedTuple):
    """What each column of a matrix gets, in original order.

    Attributes:
        widths: ``[in]`` int64 bits of a code.
        outliers: ``[in]`` int64, how many of its values are stored as they are.
    """

    widths: torch.Tensor
    outliers: torch.Tensor


@dataclass(frozen=True)
class ClaqSettings:
    """How :func:`claq` goes about it.

    Attributes:
        block_size: as :func:`~ulbq.solvers.gptq.compensate` takes it; also how many columns are clustered at once.
        refit: fit all codebooks together afterwards, the codes fixed.
        sweeps: how often codes may move after that, and the codebooks be fitted to them anew.
        whole_fit: cluster a column with its outliers in it, as the published code does.
    """

    block_size: int = 128
    refit: bool = True
    sweeps: int = 0
    whole_fit: bool = False


class ClaqSolution(NamedTuple):
    """A quantized matrix.

    Attributes:
        columns: codes, widths, codebooks (float16 values) and outliers.
        loss: ``tr((W − Q) H (W − Q)ᵀ)``, H with its damping.
    """

    columns: Columns
    loss: float


@torch.no_grad()
def claq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    factor: HessianFactor,
    plan: ColumnPlan,
    settings: ClaqSettings,
    heldout: torch.Tensor | None = None,
) -> ClaqSolution:
    """Quantize a matrix.

    Args:
        weight: ``[out, in]`` float32.
        hessian: ``[in, in]`` float32 second moments of its inputs.
        factor: of the same, with the order of the columns.
        plan: of the columns.
        settings: of the passes.
        heldout: ``[in, in]`` second moments of other samples' inputs. Sweeps end with the first that does not lower
            the error on them; without, with the first that does not lower the loss.

    Raises:
        NumericsError: a column is not finite.
    """
    quantizer = _Codebooks(weight, factor, plan, settings.whole_fit)
    loss = compensate(weight, factor, quantizer, settings.block_size).loss
    found = ClaqSolution(quantizer.columns(), loss)
    if not settings.refit:
        return found
    # Rounded to float16 a fit may come out worse than the pass, if it had nothing to gain.
    found = min(found, ClaqSolution(*refit(weight, hessian, factor, found.columns)), key=lambda solution: solution.loss)
    for _ in range(settings.sweeps):
        moved = descend(weight, hessian, factor, found.columns)
        fitted = ClaqSolution(*refit(weight, hessian, factor, moved))
        if fitted.loss >= found.loss or (heldout is not None and not _better(weight, fitted, found, heldout)):
            break
        found = fitted
    return found


def _better(weight: torch.Tensor, one: ClaqSolution, other: ClaqSolution, hessian: torch.Tensor) -> bool:
    """Whether the first has the lower error, by second moments ``[in, in]``."""
    first, second = (((left := weight - matrix_of(each.columns).T) @ hessian * left).sum() for each in (one, other))
    return bool(first < second)


class _Codebooks:
    """Clusters columns when their turns come."""

    def __init__(self, weight: torch.Tensor, factor: HessianFactor, plan: ColumnPlan, whole_fit: bool) -> None:
        out_features, in_features = weight.shape
        self._order, self._whole_fit = factor.order, whole_fit
        self._widths, self._counts = plan.widths[factor.order].tolist(), plan.outliers[factor.order].tolist()
        self._plan = plan
        self._start: dict[int, torch.Tensor] = {}
        self._codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
        self._books = torch.zeros(in_features, 2 ** max(self._widths), device=weight.device)
        self._positions: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def begin(self, first: int, columns: torch.Tensor) -> None:
        """Cluster a block's columns as they are when it begins: where each of them starts from."""
        self._start.clear()
        last = first + columns.shape[1]
        for width in set(self._widths[first:last]):
            for cut in (True, False):
                chosen = [
                    i
                    for i in range(first, last)
                    if self._widths[i] == width and cut == (self._counts[i] > 0 and not self._whole_fit)
                ]
                if chosen:
                    values = columns.T[[i - first for i in chosen]]
                    kept = self._without_extremes(values, chosen) if cut else None
                    found = kmeans_1d(values, 2**width, weights=kept).centroids
                    self._start |= {i: found[row, None] for row, i in enumerate(chosen)}

    def _without_extremes(self, values: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        """Ones for the values ``[columns, out]`` that stay, zeros for as many of the largest as are taken out."""
        kept = torch.ones_like(values)
        for row, i in enumerate(chosen):
            kept[row, values[row].abs().topk(self._counts[i]).indices] = 0
        return kept

    def quantize(self, index: int, column: torch.Tensor) -> torch.Tensor:
        """Follow what changed in the column since, choose outliers, round."""
        values, book, count = column.unsqueeze(0), self._start[index], self._counts[index]
        outliers = self._farthest(values, book, count)
        kept = None
        if outliers is not None and not self._whole_fit:
            kept = torch.ones_like(values)
            kept[0, outliers] = 0
        book = refine(values, book, _STEPS, kept).half().float()
        if kept is not None:
            outliers = self._farthest(values, book, count)
        codes = assign(values, book)[0]
        self._codes[index] = codes
        self._books[index, : book.shape[1]] = book[0]
        quantized = book[0][codes.long()]
        if outliers is not None:
            stored = column[outliers].half()
            quantized[outliers] = stored.float()
            self._positions.append(self._order[index] * len(column) + outliers)
            self._values.append(stored)
        return quantized

    def _farthest(self, values: torch.Tensor, book: torch.Tensor, count: int) -> torch.Tensor | None:
        """Places of the values that the codebook serves worst, or of both tails as published; None for none."""
        if not count:
            return None
        if self._whole_fit:
            upper = values[0].topk(count // 2).indices
            return torch.cat([upper, values[0].topk(count - count // 2, largest=False).indices])
        nearest = book[0][assign(values, book)[0].long()]
        return (values[0] - nearest).abs().topk(count).indices

    def columns(self) -> Columns:
        """What was made of all columns, in original order."""
        codes, books = torch.empty_like(self._codes), torch.empty_like(self._books)
        codes[self._order], books[self._order] = self._codes, self._books
        outliers = None
        if self._positions:
            positions = torch.cat(self._positions)
            order = positions.argsort()
            outliers = Outliers(positions[order], torch.cat(self._values)[order].float())
        return Columns(codes, self._plan.widths, books, outliers)
