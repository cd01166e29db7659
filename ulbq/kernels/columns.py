"""Products with column codebooks on the CPU, compiled: lookups in tables that a register holds (``cpu/columns.cpp``).

The stored tensors are read as they are. Beside them lie the order of the columns and, for each output, the columns of
its outliers and by how much each differs from the level that its code names.
"""

from collections.abc import Mapping

import torch

from ulbq.formats import CodebookScheme, codebook
from ulbq.formats.bits import pack_planes
from ulbq.kernels import build, tiles
from ulbq.kernels.build import library
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS, takes_pairs

FEW_ROWS = 64
"""Up to so many rows at a time codes are looked up for each; more take one dense weight, unless they go in pairs."""


def derive(
    scheme: CodebookScheme, stored: Mapping[str, torch.Tensor], outs: int, columns: int
) -> dict[str, torch.Tensor]:
    """What products need beside the stored tensors.

    Returns:
        ``column_order`` int32 ``[in]``, and with outliers those of :func:`outliers_by_output`.
    """
    found = codebook.unpack(scheme, stored, columns)
    order = found.widths.argsort(descending=True, stable=True)
    return {"column_order": order.int()} | outliers_by_output(found, outs, outs)


def outliers_by_output(found: codebook.Columns, outs: int, padded: int) -> dict[str, torch.Tensor]:
    """Outliers of a matrix that has some, sorted by output.

    Returns:
        ``outlier_starts`` int32 ``[padded + 1]``, ``outlier_columns`` int32 ``[n]``, and ``outlier_deltas`` float32
        ``[n]``: by how much each differs from the level that its code names.
    """
    if found.outliers is None:
        return {}
    positions, values = found.outliers
    column, out = positions // outs, positions % outs
    by_output = out.argsort(stable=True)
    starts = torch.zeros(padded + 1, dtype=torch.int32, device=out.device)
    starts[1:] = torch.bincount(out, minlength=padded).cumsum(0)
    deltas = values - found.codebooks[column, found.codes[column, out].long()]
    return {
        "outlier_starts": starts,
        "outlier_columns": column[by_output].int(),
        "outlier_deltas": deltas[by_output].contiguous(),
    }


def plane_counts(scheme: CodebookScheme, columns: int) -> torch.Tensor:
    """How many columns have each of the four planes, int64 ``[4]``."""
    widths = scheme.columns(columns)
    return torch.tensor([sum(n for width, n in widths.items() if width > plane) for plane in range(4)])


def takes(dtype: torch.dtype, rows: int) -> bool:
    """Whether :func:`multiply` serves so many rows better than a dense weight."""
    return dtype in FLOATS and (rows <= FEW_ROWS or takes_pairs(dtype, rows))


def multiply(
    x: torch.Tensor, scheme: CodebookScheme, codes: torch.Tensor, levels: torch.Tensor, derived: list[torch.Tensor]
) -> torch.Tensor:
    """Products ``[rows, out]`` of ``x`` ``[rows, in]`` in its dtype; sums are float32.

    Several bfloat16 rows take levels rounded to bfloat16, where the processor multiplies pairs of them.

    Args:
        x: float32, bfloat16 or float16.
        scheme: of the matrix.
        codes, levels: ``codes`` and ``codebooks`` as stored.
        derived: what :func:`derive` made, in its order.
    """
    x, outs = x.contiguous(), 8 * codes.shape[1]
    counts = plane_counts(scheme, x.shape[1])
    y = torch.empty(len(x), outs, dtype=x.dtype)
    order, *outliers = (tensor.data_ptr() for tensor in derived)
    matrix = (codes.data_ptr(), outs, x.shape[1], counts.data_ptr(), levels.data_ptr(), order)
    beside = outliers or (None, None, None)
    threads = torch.get_num_threads()
    if takes_pairs(x.dtype, len(x)):
        library().ulbq_column_dots(*matrix, *beside, x.data_ptr(), len(x), y.data_ptr(), threads)
    else:
        library().ulbq_columns(*matrix, *beside, x.data_ptr(), FLOATS[x.dtype], len(x), y.data_ptr(), threads)
    return y


def product(
    scheme: CodebookScheme,
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    *,
    exact: bool,
) -> Product:
    """What tokens are multiplied with, of stored and derived tensors.

    ``exact``, nothing is rounded but in float32. Otherwise codes are copied into the order of tiles, which is faster by
    far, and what levels and inputs make is rounded to 16 bits of the largest of 64 columns; not on processors that
    cannot look bytes up.
    """
    names = ("column_order", "outlier_starts", "outlier_columns", "outlier_deltas")
    derived = [tensors.get(name) for name in names]
    counts = plane_counts(scheme, shape[1])
    rest = (*shape, counts, tensors["codebooks"], *derived, bias)
    if exact or not build.looks_up_bytes():
        return Product("ulbq_columns_linear", tensors["codes"], *rest)
    return Product("ulbq_tiled_columns_linear", *_sections(scheme, tensors, shape[1]), *rest)


def _sections(scheme: CodebookScheme, tensors: Mapping[str, torch.Tensor], columns: int) -> list[torch.Tensor | None]:
    """Codes in tiles: of the columns of four bits, of three and of two; None where there are none."""
    codes = codebook.unpack(scheme, tensors, columns).codes[tensors["column_order"].long()]
    found, begin, widths = list[torch.Tensor | None](), 0, scheme.columns(columns)
    for width in (4, 3, 2):
        count = widths.get(width, 0)
        own = codes[begin : begin + count].T.contiguous()
        found.append(tiles.folded(pack_planes(own, width), width, count) if count else None)
        begin += count
    return found
