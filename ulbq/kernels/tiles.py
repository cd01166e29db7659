"""The tiled layout of integer codes and the compiled products with it (``cpu/tiles.h`` has it to the bit).

A tile holds the same codes as the stored planes, in the order in which the processor's dot products take them: it
replaces the stored tensors in memory, and gives them back exactly. Zero points are nibbles.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme
from ulbq.formats.bits import pack_planes, unpack_planes
from ulbq.kernels import build
from ulbq.kernels.build import library
from ulbq.kernels.product import Product

TILE = 64
"""Outputs of a tile, and columns of a chunk."""

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of activations, by the number that the C++ code knows them by."""

MANY_ROWS = 96
"""From so many rows on, making slabs of dense weights and one large product of each is faster than taking codes."""

MANY_PAIRS = 512
"""The same for bfloat16 rows, where the processor multiplies pairs of them."""

FEW_ROWS = 4
"""Fewer bfloat16 rows multiply the codes as integers; so many or more, the codes turned into bfloat16 once for all."""

# Below that many multiplications a second thread costs more than it brings.
_WORTH_A_THREAD = 1 << 20
SLAB = 32 << 20
"""Bytes of dense weights that exist at a time where products are not taken from the codes."""


class Shape(NamedTuple):
    """What the C++ code has to know of a matrix.

    Attributes:
        bits: of a part.
        parts: 2 where two planes have scales of their own.
        centre: the zero point, where none are stored.
        group: columns that share a scale.
    """

    bits: int
    parts: int
    outs: int
    columns: int
    centre: float
    group: int


def shape_of(scheme: AnyScheme, outs: int, columns: int) -> Shape:
    """Raises TypeError for a format that has no tiles."""
    group = columns if scheme.group_size == -1 else scheme.group_size
    if isinstance(scheme, AffineScheme):
        return Shape(scheme.bits, 1, outs, columns, scheme.centre if scheme.symmetric else 0.0, group)
    if isinstance(scheme, DualBinaryScheme):
        return Shape(1, 2, outs, columns, 0.0, group)
    if isinstance(scheme, BinaryMosScheme):  # 2 · (code − 1/2)
        return Shape(1, 1, outs, columns, 0.5, columns)
    raise TypeError(f"no tiles for {scheme.format}")


def unsupported_reason(scheme: AnyScheme, columns: int) -> str | None:
    """Why a matrix has no tiles, whatever the machine; None where it has."""
    if scheme.bits > 4:
        return f"{scheme.bits} bits: at most 4"
    size = scheme.group_size
    if size not in (-1, 32, columns) and size % TILE:
        return f"groups of {size}: 32, or a multiple of {TILE}"
    return None


def pack(scheme: AnyScheme, stored: Mapping[str, torch.Tensor], outs: int, columns: int) -> dict[str, torch.Tensor]:
    """Tensors ``tiled_codes``, ``tiled_scales`` and, where zero points are stored, ``tiled_zeros``.

    Args:
        scheme: one that :func:`unsupported_reason` has nothing against.
        stored: its tensors, on the CPU.
        outs, columns: the matrix's dimensions.
    """
    shape = shape_of(scheme, outs, columns)
    codes, tiles = folded(stored["codes"], shape.bits, columns), -(-outs // TILE)
    packed = {"tiled_codes": codes, "tiled_scales": _scales(scheme, stored, outs, tiles)}
    if isinstance(scheme, AffineScheme) and not scheme.symmetric:
        groups = columns // shape.group
        zeros = unpack_planes(stored["zeros"], outs * groups).view(outs, groups)
        tiled = torch.nn.functional.pad(zeros, (0, 0, 0, tiles * TILE - outs)).view(tiles, TILE, groups).transpose(1, 2)
        packed["tiled_zeros"] = (tiled[..., : TILE // 2] | tiled[..., TILE // 2 :] << 4).contiguous()
    return packed


def folded(planes: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes in the order of tiles, ``[tiles, chunks, parts, 512 · bits]`` uint8.

    Args:
        planes: ``[parts · bits, out, ceil(in / 8)]`` uint8, the planes of one part after those of the other.
        bits: of a part.
        columns: the matrix's.
    """
    planes, outs, parts, size = planes.contiguous(), planes.shape[1], len(planes) // bits, 512 * bits
    codes = torch.zeros(-(-outs // TILE), -(-columns // TILE), parts, size, dtype=torch.uint8)
    for part in range(parts):
        source, target = planes[part * bits :], codes[:, :, part]
        library().ulbq_to_tiles(
            source.data_ptr(), bits, outs, columns, target.data_ptr(), size * parts, torch.get_num_threads()
        )
    return codes


def unpack(scheme: AnyScheme, packed: Mapping[str, torch.Tensor], outs: int, columns: int) -> dict[str, torch.Tensor]:
    """Undo :func:`pack`: the tensors that it was given, save what a mixture keeps beside its signs."""
    shape = shape_of(scheme, outs, columns)
    codes = packed["tiled_codes"]
    planes = torch.empty(shape.bits * shape.parts, outs, -(-columns // 8), dtype=torch.uint8)
    for part in range(shape.parts):
        source, target = codes[:, :, part], planes[part * shape.bits :]
        stride = 512 * shape.bits * shape.parts
        library().ulbq_from_tiles(
            source.data_ptr(), shape.bits, outs, columns, target.data_ptr(), stride, torch.get_num_threads()
        )
    stored = {"codes": planes}
    if isinstance(scheme, AffineScheme | DualBinaryScheme):
        rows: torch.Tensor = packed["tiled_scales"].transpose(2, 3).transpose(0, 1).flatten(1, 2)[:, :outs].contiguous()
        stored["scales"] = rows if shape.parts == 2 else rows[0]
    if "tiled_zeros" in packed:
        tiled = torch.cat([packed["tiled_zeros"] & 15, packed["tiled_zeros"] >> 4], -1)
        zeros = tiled.transpose(1, 2).flatten(0, 1)[:outs]
        stored["zeros"] = pack_planes(zeros.flatten(), shape.bits)
    return stored


def named(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Tiles as :func:`pack` names them."""
    tensors = {"tiled_codes": codes, "tiled_scales": scales}
    return tensors if zeros is None else tensors | {"tiled_zeros": zeros}


def multiply(x: torch.Tensor, packed: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
    """Products ``[rows, out]`` of ``x`` ``[rows, in]``, in its dtype.

    Activations are rounded to fixed point, 64 columns at a time: to 16 bits of their largest where they are bfloat16 or
    float16, to 24 bits where they are float32, each less than the rounding of what comes out. All sums over a group
    are exact. A row with a value that is not finite becomes NaN.

    Several bfloat16 rows are taken as they are, where the processor multiplies pairs of them; weights of two planes are
    rounded to bfloat16 for that, codes of one part are not rounded.
    """
    x = x.contiguous()
    y = torch.empty(len(x), shape.outs, dtype=x.dtype)
    threads = torch.get_num_threads() if len(x) * shape.outs * shape.columns > _WORTH_A_THREAD else 1
    if takes_pairs(x.dtype, len(x)):
        library().ulbq_dots(*_matrix(packed, shape), x.data_ptr(), len(x), y.data_ptr(), threads)
        return y
    library().ulbq_multiply(*_matrix(packed, shape), x.data_ptr(), FLOATS[x.dtype], len(x), y.data_ptr(), threads)
    return y


def product(
    scheme: AnyScheme,
    packed: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    *,
    exact: bool,
) -> Product:
    """What tokens are multiplied with, of tiles and what a mixture has beside its signs."""
    found = shape_of(scheme, *shape)
    scales, zeros = packed["tiled_scales"], packed.get("tiled_zeros")
    matrix = (packed["tiled_codes"], *found[:4], scales, zeros, found.centre, found.group, bias)
    if not isinstance(scheme, BinaryMosScheme):
        return Product("ulbq_tiles_linear", *matrix, exact)
    beside = (packed.get(name) for name in ("in_scales", "out_scales", "router", "zeros"))
    return Product("ulbq_signs_linear", *matrix, *beside, scheme.experts, scheme.zeros == "input", exact)


def takes_pairs(dtype: torch.dtype, rows: int) -> bool:
    """Whether so many rows are multiplied as pairs of bfloat16."""
    return dtype == torch.bfloat16 and rows >= FEW_ROWS and build.has_pairs()


def most_rows(dtype: torch.dtype) -> int:
    """How many rows :func:`multiply` serves better than slabs of dense weights; 0 for a dtype that it does not take."""
    if dtype not in FLOATS:
        return 0
    return (MANY_PAIRS if takes_pairs(dtype, MANY_PAIRS) else MANY_ROWS) - 1


def slabs(packed: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The dense weight, some outputs at a time: which ones, and their rows ``[n, in]`` in ``dtype``, not contiguous.

    The arithmetic is float32 with one rounding, as in :func:`ulbq.formats.dequantize`, and gives the same bits.
    """
    step = max(1, SLAB // (shape.columns * dtype.itemsize * TILE)) * TILE
    for begin in range(0, shape.outs, step):
        count = min(step, shape.outs - begin)
        dense = torch.empty(shape.columns, count, dtype=dtype)
        library().ulbq_widen(
            *_matrix(packed, shape), begin, count, dense.data_ptr(), FLOATS[dtype], torch.get_num_threads()
        )
        yield slice(begin, begin + count), dense.T


def rows(packed: Mapping[str, torch.Tensor], shape: Shape, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dense rows ``[n, in]`` in ``dtype``, with the bits of :func:`slabs`.

    Args:
        packed: the matrix.
        shape: its own, but for the outputs.
        chosen: int64 ``[n]`` numbers of outputs.
        dtype: of the rows.

    Raises:
        IndexError: there is no such row.
    """
    shape, kind = shape._replace(outs=len(packed["tiled_codes"]) * TILE), dtype if dtype in FLOATS else torch.float32
    found, tile = (torch.empty(size, dtype=kind) for size in ((len(chosen), shape.columns), (shape.columns, TILE)))
    for row, at in enumerate(chosen.tolist()):
        if not 0 <= at < shape.outs:
            raise IndexError(f"row {at} of {shape.outs}")
        library().ulbq_widen(*_matrix(packed, shape), at - at % TILE, TILE, tile.data_ptr(), FLOATS[kind], 1)
        found[row] = tile[:, at % TILE]
    return found.to(dtype)


def _scales(scheme: AnyScheme, stored: Mapping[str, torch.Tensor], outs: int, tiles: int) -> torch.Tensor:
    """``[tiles, parts, G, 64]`` float16."""
    if isinstance(scheme, BinaryMosScheme):
        return torch.full((tiles, 1, 1, TILE), 2.0, dtype=torch.float16)
    scales = stored["scales"]
    rows = scales if scales.ndim == 3 else scales.unsqueeze(0)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, tiles * TILE - outs)).unflatten(1, (tiles, TILE))
    tiled: torch.Tensor = padded.permute(1, 0, 3, 2).contiguous()
    return tiled


def _matrix(packed: Mapping[str, torch.Tensor], shape: Shape) -> tuple[object, ...]:
    """The arguments with which every function of the library begins that reads a matrix."""
    zeros = packed.get("tiled_zeros")
    return (
        packed["tiled_codes"].data_ptr(),
        shape.bits,
        shape.parts,
        shape.outs,
        shape.columns,
        packed["tiled_scales"].data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        shape.centre,
        shape.group,
    )
