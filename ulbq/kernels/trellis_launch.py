"""Calls of the Triton kernels for trellis codes: what :mod:`ulbq.kernels.triton_launch` is for codes in words.

Two transforms go around each product; the second one adds up the shares of the columns. Triton is imported by the first
product.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ulbq.formats import TrellisScheme, trellis
from ulbq.kernels.block_sizes import Kernel, blocks
from ulbq.kernels.triton_launch import (
    HEADROOM,
    SLAB,
    SPLIT_ROWS,
    VECTOR_ROWS,
    device_facts,
    is_many,
    on,
    unavailable_reason,
)

Tensor = torch.Tensor

# Rows of tiles that a program of a matrix product takes at a time: 64 columns, and 32 of what lies in registers.
_DEEP, _DEEP_WIDE = 4, 2
# A thread of the vector kernel has an accumulator for every row and for two elements of each tile.
_VECTOR_TILES = 8
# Tiles across of a program that makes dense weights.
_DENSE_TILES = 4


class TrellisCut(NamedTuple):
    """How a product is divided: rows of a program, tiles across and down, rows of tiles of a share, shares, options."""

    block_m: int
    tiles: int
    deep: int
    each: int
    splits: int
    start: dict[str, int]


def multiply(x: Tensor, scheme: TrellisScheme, codes: Tensor, su: Tensor, sv: Tensor) -> Tensor:
    """Products ``[rows, out]`` of ``x`` ``[rows, in]``, in its dtype; ``codes`` are words, the rest as stored."""
    if not len(x):
        return x.new_empty(0, len(sv))
    vector = len(x) <= VECTOR_ROWS
    rows, columns, outs = len(x), len(su), len(sv)
    if is_many(x, scheme.bits):
        # What makes elements as small as weights are is in sv.
        less = HEADROOM if x.dtype == torch.float16 else 1.0
        inner = scaled_transform(x, x.dtype, before=su.float() * less)
        product = x.new_empty(rows, outs)
        for some, weight in slabs(scheme, codes, x):
            torch.mm(inner, weight, out=product[:, some])
        return scaled_transform(product, x.dtype, after=sv.float() / less)
    inner = scaled_transform(x, torch.float32 if vector else x.dtype, before=su)
    cut = cut_of("vector" if vector else "small" if rows <= SPLIT_ROWS else "large", scheme, codes, [rows], inner.dtype)
    partial = x.new_empty(cut.splits, rows, outs, dtype=torch.float32)
    across = -(-codes.shape[1] // cut.tiles)
    sizes = (rows, columns, outs, cut.each)
    with on(x):
        if vector:
            _kernels().vector_kernel[(across, cut.splits)](
                inner, codes, partial, *sizes, **constants(scheme), ROWS=cut.block_m, TILES=cut.tiles, **cut.start
            )
        else:
            _kernels().matrix_kernel[(-(-rows // cut.block_m), across, cut.splits)](
                inner, codes, partial, *sizes, **constants(scheme), DEEP=cut.deep, BLOCK_M=cut.block_m, TILES=cut.tiles,
                **cut.start,
            )  # fmt: skip
    return scaled_transform(partial, x.dtype, after=sv)


def input_gradient(grad: Tensor, scheme: TrellisScheme, codes: Tensor, su: Tensor, sv: Tensor) -> Tensor:
    """``[rows, in]`` of the gradient ``[rows, out]`` of what :func:`multiply` gives, in its dtype."""
    if not len(grad):
        return grad.new_empty(0, len(su))
    inner = scaled_transform(grad, grad.dtype, before=sv)
    if is_many(grad, scheme.bits):
        wide = grad.new_zeros(len(grad), len(su), dtype=torch.float32)
        for some, weight in slabs(scheme, codes, grad):
            wide += inner[:, some] @ weight.T
        return scaled_transform(wide, grad.dtype, after=su)
    cut = cut_of("gradient", scheme, codes, [len(grad)], inner.dtype)
    result = grad.new_empty(len(grad), len(su), dtype=torch.float32)
    with on(grad):
        _kernels().gradient_kernel[(-(-len(grad) // cut.block_m), -(-codes.shape[0] // cut.deep))](
            inner, codes, result, len(grad), len(su), len(sv), **constants(scheme), DEEP=cut.deep, BLOCK_M=cut.block_m,
            TILES=cut.tiles, **cut.start,
        )  # fmt: skip
    return scaled_transform(result, grad.dtype, after=su)


def slabs(scheme: TrellisScheme, codes: Tensor, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Elements ``[columns, n]`` of some outputs at a time, between the transforms, in the dtype of ``x``."""
    columns, outs = (trellis.TILE * count for count in codes.shape[:2])
    wide = trellis.TILE * _DENSE_TILES
    step = max(wide, SLAB // columns // wide * wide)
    for begin in range(0, outs, step):
        count = min(step, outs - begin)
        weight = x.new_empty(columns, count)
        with on(x):
            _kernels().weight_kernel[(-(-codes.shape[0] // _DEEP), -(-count // wide))](
                codes, weight, columns, outs, begin, count, **constants(scheme), DEEP=_DEEP, TILES=_DENSE_TILES,
                num_warps=4,
            )  # fmt: skip
        yield slice(begin, begin + count), weight


def searches(sequences: Tensor) -> bool:
    """Whether :func:`search` takes sequences: those that lie on a GPU, where there is Triton."""
    return sequences.is_cuda and unavailable_reason() is None


def search(sequences: Tensor, bits: int, state_bits: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and what they stand for, ``[n, length]`` both: :func:`ulbq.solvers.trellis.search` says which.

    Args:
        sequences: ``[n, length]`` float32, contiguous.
        bits, state_bits: of an element, and of a state.
        values: ``[2^state_bits]`` float32, where the sequences are.
    """
    from ulbq.kernels import triton_viterbi

    count, length = sequences.shape
    codes, found = torch.empty_like(sequences, dtype=torch.uint8), torch.empty_like(sequences)
    origins = torch.empty(count, length, len(values) >> bits, dtype=torch.uint8, device=sequences.device)
    with on(sequences):
        triton_viterbi.search_kernel[(count,)](
            sequences, values, origins, codes, found, BITS=bits, STATE_BITS=state_bits, LENGTH=length,
            # 16 costs and as many values a thread; of 16-bit states 64, which do not all fit into its registers.
            num_warps=8 if state_bits <= 12 else 32, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, found


def scaled_transform(
    x: Tensor, dtype: torch.dtype, *, before: Tensor | None = None, after: Tensor | None = None
) -> Tensor:
    """``(Σ x ⊙ before) · H ⊙ after``, ``[rows, n]`` in ``dtype``.

    Args:
        x: ``[rows, n]``, or ``[splits, rows, n]`` to be added up.
        dtype: of the result.
        before, after: ``[n]`` floating; ones where not given.
    """
    if trellis.is_mixed(x.shape[-1]):
        return mix(blocks_transform(x, torch.float32, before, None), dtype, after)
    return blocks_transform(x, dtype, before, after)


def mix(x: Tensor, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    """``[rows, n]`` in ``dtype``, what a transform's first half gave: its blocks mixed, ``⊙ after``."""
    mixed = trellis.mix(x)
    return (mixed if after is None else mixed * after).to(dtype)


def blocks_transform(
    x: Tensor, dtype: torch.dtype, before: Tensor | None, after: Tensor | None, own: Tensor | None = None
) -> Tensor:
    """The same for a dimension whose blocks are not mixed.

    ``own`` is int64 ``[rows]`` where each row has vectors of its own, so many elements behind those given.
    """
    x = x.contiguous()
    rows, width = x.shape[-2:]
    result = x.new_empty(rows, width, dtype=dtype)
    block = trellis.block_width(width)
    with on(x):
        _kernels().transform_kernel[(-(-rows // 16), width // block)](
            x, before, after, own, result, rows, width, x.numel() // result.numel(), block**-0.5, BLOCK_M=16,
            BLOCK_N=block, DEPTH=min(32, block), num_warps=4,
        )  # fmt: skip
    return result


def cut_of(kernel: Kernel, scheme: TrellisScheme, codes: Tensor, rows: Sequence[int], dtype: torch.dtype) -> TrellisCut:
    """How matrices of these words are divided of which each is multiplied with so many rows of a dtype."""
    name, processors = device_facts(codes.device)
    wide = dtype == torch.float32
    size = blocks(name, kernel, scheme.bits, wide)
    down, across = codes.shape[:2]
    tiles = min(size.block_n // trellis.TILE, 1 << (across - 1).bit_length())
    start = {"num_warps": size.warps, "num_stages": size.stages}
    usual = max(rows) if kernel == "vector" else -(-sum(rows) // len(rows))
    block_m = min(size.block_m, 1 << (usual - 1).bit_length())
    if kernel == "vector":
        tiles, deep = min(tiles, _VECTOR_TILES), 1
    else:
        block_m = max(16, block_m)
        deep = _DEEP_WIDE if wide and kernel in ("small", "large") else _DEEP
    programs = -(-across // tiles) * sum(-(-count // block_m) for count in rows)
    # As for other codes: large batches have programs enough.
    shares = 1 if kernel in ("large", "gradient") else max(1, -(-processors * size.programs // programs))
    spans = -(-down // deep)
    each = -(-spans // min(shares, spans)) * deep
    return TrellisCut(block_m, tiles, deep, each, -(-down // each), start)


def constants(scheme: TrellisScheme) -> dict[str, Any]:
    """What is compiled into the kernels of a scheme."""
    return {
        "MULTIPLIER": trellis.MULTIPLIERS[scheme.state_bits],
        "SCALE": trellis.VALUE_SCALE,
        "SHIFT": trellis.VALUE_SHIFT,
        "BITS": scheme.bits,
        "STATE_BITS": scheme.state_bits,
    }


def _kernels() -> Any:
    from ulbq.kernels import triton_trellis

    return triton_trellis
