"""Products of rows with several matrices of one shape in one call: a mixture's tokens with its experts.

A bank holds the addresses of its matrices, which stay where they are. On the CPU what a row gets is bit for bit what
the kernel for one matrix gives it with the rows that go the same way (``cpu/routes.h``).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from ulbq.formats import CodebookScheme, TrellisScheme, trellis
from ulbq.kernels import columns, tiles
from ulbq.kernels import trellis as trellis_products
from ulbq.kernels.build import library

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]
Job = tuple[int, int, int]
"""A matrix, and from which place to which its rows lie."""

# Below that many multiplications a second thread costs more than it brings.
_WORTH_A_THREAD = 1 << 20


class Routes(NamedTuple):
    """Which rows go to which matrices. A row of the results is a place; those of a matrix come one behind the other.

    Attributes:
        jobs: matrices that have rows, in the order of their places.
        order: int64 ``[places]``, which row of the results each place is; None where they come in order.
        places: rows of the results.
    """

    jobs: list[Job]
    order: Tensor | None
    places: int

    @classmethod
    def of(cls, chosen: Tensor, matrices: int) -> "Routes":
        """Those of rows whose matrices are int64 ``[rows]``; a number beyond the last one is in no job."""
        order = chosen.argsort(stable=True)
        jobs, begin = [], 0
        for number, count in enumerate(torch.bincount(chosen, minlength=matrices)[:matrices].tolist()):
            if count:
                jobs.append((number, begin, begin + count))
                begin += count
        return cls(jobs, order, len(order))

    @property
    def most(self) -> int:
        """Rows of the matrix that has most."""
        return max((end - begin for _, begin, end in self.jobs), default=0)


class Bank(ABC):
    """Matrices of one scheme and shape.

    Args:
        scheme: of all.
        matrices: the tensors that products take, by the matrices' numbers.
        outs, columns: dimensions of each.

    Attributes:
        names: of the tensors whose addresses the kernels take, in their order.
        lone: whether it writes all places, so that no other bank can have some of them.
    """

    names: ClassVar[tuple[str, ...]]
    lone: ClassVar[bool] = False

    def __init__(self, scheme: Any, matrices: Mapping[int, Tensors], outs: int, columns: int) -> None:
        self.scheme, self.matrices, self.outs, self.columns = scheme, matrices, outs, columns
        table = torch.zeros(max(matrices) + 1, len(self.names), dtype=torch.int64)
        for number, tensors in matrices.items():
            found = (tensors.get(name) for name in self.names)
            table[number] = torch.tensor([0 if one is None else one.data_ptr() for one in found])
        self.table = table

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        """Whether one call serves inputs of a dtype best, up to so many rows a matrix."""
        return dtype in tiles.FLOATS

    @abstractmethod
    def fill(self, y: Tensor, x: Tensor, routes: Routes, jobs: list[Job], share: int) -> None:
        """Write the rows of jobs; see :func:`multiply`."""

    def _threads(self, jobs: list[Job]) -> int:
        rows = sum(end - begin for _, begin, end in jobs)
        return torch.get_num_threads() if rows * self.outs * self.columns > _WORTH_A_THREAD else 1


def multiply(banks: Sequence[Bank], x: Tensor, routes: Routes, share: int) -> Tensor:
    """Products ``[places, out]`` in the dtype of ``x``.

    Args:
        banks: of matrices of one shape; each matrix is in one of them.
        x: ``[rows, in]``.
        routes: whose places are ``share`` times as many as the rows; what is in no job is not written.
        share: results that have one row of inputs, one behind the other: the choices of one token.
    """
    x = x.contiguous()
    y = x.new_empty(routes.places, banks[0].outs)
    for bank in banks:
        jobs = routes.jobs if len(banks) == 1 else [job for job in routes.jobs if job[0] in bank.matrices]
        if jobs:
            bank.fill(y, x, routes, jobs, share)
    return y


class TilesBank(Bank):
    """Of integer codes in tiles."""

    names = ("tiled_codes", "tiled_scales", "tiled_zeros")

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        return rows <= tiles.most_rows(dtype)

    def fill(self, y: Tensor, x: Tensor, routes: Routes, jobs: list[Job], share: int) -> None:
        bits, parts, outs, wide, centre, group = tiles.shape_of(self.scheme, self.outs, self.columns)
        shape = self.table.data_ptr(), bits, parts, outs, wide, centre, group
        paired, few = _split(jobs, x.dtype)
        if few:
            keep, way = _way(few, routes, share)
            library().ulbq_multiply_each(
                *shape, *way, x.data_ptr(), tiles.FLOATS[x.dtype], y.data_ptr(), self._threads(few)
            )
        if paired:
            keep, way = _way(paired, routes, share)
            library().ulbq_dots_each(*shape, *way, x.data_ptr(), y.data_ptr(), self._threads(paired))
        del keep


class ColumnsBank(Bank):
    """Of column codebooks."""

    names = ("codes", "codebooks", "column_order", "outlier_starts", "outlier_columns", "outlier_deltas")
    scheme: CodebookScheme

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        return columns.takes(dtype, rows)

    def fill(self, y: Tensor, x: Tensor, routes: Routes, jobs: list[Job], share: int) -> None:
        counts = columns.plane_counts(self.scheme, self.columns)
        shape = self.table.data_ptr(), self.outs, self.columns, counts.data_ptr()
        paired, few = _split(jobs, x.dtype)
        if few:
            keep, way = _way(few, routes, share)
            library().ulbq_columns_each(
                *shape, *way, x.data_ptr(), tiles.FLOATS[x.dtype], y.data_ptr(), torch.get_num_threads()
            )
        if paired:
            keep, way = _way(paired, routes, share)
            library().ulbq_column_dots_each(*shape, *way, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        del keep


class TrellisBank(Bank):
    """Of trellis codes, with both transforms in the same call."""

    names = ("codes", "su", "sv")
    scheme: TrellisScheme

    def fill(self, y: Tensor, x: Tensor, routes: Routes, jobs: list[Job], share: int) -> None:
        mixes = [trellis_products.mixing(width) for width in (self.columns, self.outs)]
        ends = (
            (trellis.block_width(width), None if mix is None else mix.data_ptr())
            for width, mix in zip((self.columns, self.outs), mixes, strict=True)
        )
        keep, way = _way(jobs, routes, share)
        library().ulbq_trellis_each(
            self.table.data_ptr(), *trellis_products.facts(self.scheme), self.outs, self.columns,
            *(fact for end in ends for fact in end), *way, x.data_ptr(), tiles.FLOATS[x.dtype],
            2 if x.dtype == torch.float32 else 1, y.data_ptr(), self._threads(jobs),
        )  # fmt: skip
        del keep


def _split(jobs: list[Job], dtype: torch.dtype) -> tuple[list[Job], list[Job]]:
    """Jobs that are multiplied as pairs of bfloat16, and the others."""
    paired: list[Job] = []
    few: list[Job] = []
    for job in jobs:
        (paired if tiles.takes_pairs(dtype, job[2] - job[1]) else few).append(job)
    return paired, few


def _way(jobs: list[Job], routes: Routes, share: int) -> tuple[Tensor, tuple[Any, ...]]:
    """What the library takes of the routes of some jobs, and a tensor to be kept as long as it reads."""
    table = torch.tensor(jobs, dtype=torch.int64)
    order = None if routes.order is None else routes.order.data_ptr()
    return table, (table.data_ptr(), len(jobs), order, routes.places, share)
