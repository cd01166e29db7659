"""Triton kernels for trellis codes (:mod:`ulbq.formats.trellis`); :mod:`ulbq.kernels.trellis_launch` calls them.

Importing this needs the package ``triton``. What a thread of a tile's order has are eight elements in a row; their
states are windows over two neighbouring words. All sums are float32.
"""
# mypy: ignore-errors
# Kernels are a language of their own, without types. They take what they need as plain arguments; names in capitals are
# compiled in.

import triton
import triton.language as tl


@triton.jit
def _values(
    words,
    tile,
    inside,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
):
    """Elements float32 ``[tiles, 32, 8]`` of the tiles of an index, by thread; of no use where it is not inside."""
    thread = tl.arange(0, 32)[None, :]
    last = (8 * BITS * (thread + 1) - 1) // 32
    here = words + tile[:, None] * (8 * BITS)
    own = tl.load(here + last, mask=inside[:, None], other=0).to(tl.uint32, bitcast=True)
    before = tl.load(here + (last + 8 * BITS - 1) % (8 * BITS), mask=inside[:, None], other=0)
    both = (before.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | own.to(tl.uint64)
    both = both >> (32 * (last + 1) - 8 * BITS * (thread + 1)).to(tl.uint64)
    behind = (BITS * (7 - tl.arange(0, 8)))[None, None, :].to(tl.uint64)
    state = (both[:, :, None] >> behind).to(tl.uint32) & ((1 << STATE_BITS) - 1)
    product = state * tl.full([], MULTIPLIER, tl.uint32)
    halves = (product & 0x00FF00FF) + ((product >> 8) & 0x00FF00FF)
    sums = (halves + (halves >> 16)) & 0xFFFF
    return (sums + 1024).to(tl.float32) * SCALE + SHIFT


@triton.jit
def _inputs():
    """Which input of a tile each element of each thread has, ``[32, 8]``."""
    thread = tl.arange(0, 32)[:, None]
    element = tl.arange(0, 8)[None, :]
    return 2 * (thread % 4) + element % 2 + 8 * (element % 4 // 2)


@triton.jit
def _vectors(
    x,
    words,
    split,
    columns,
    outs,
    each,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Products of four rows, of which ``ROWS`` count, with a share of the columns, as the threads have them."""
    n = tl.program_id(0) * TILES + tl.arange(0, TILES)
    across = outs // 16
    inputs = _inputs()
    x0, x1, x2, x3 = x
    s0 = tl.zeros([TILES, 32, 8], tl.float32)
    s1, s2, s3 = s0, s0, s0
    for k in range(split * each, tl.minimum((split + 1) * each, columns // 16)):
        value = _values(words, k * across + n, n < across, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS)
        here = k * 16 + inputs
        s0 += value * tl.load(x0 + here)[None, :, :]
        if ROWS > 1:
            s1 += value * tl.load(x1 + here)[None, :, :]
        if ROWS > 2:
            s2 += value * tl.load(x2 + here)[None, :, :]
            s3 += value * tl.load(x3 + here)[None, :, :]
    return s0, s1, s2, s3


@triton.jit
def vector_kernel(
    x,
    words,
    partial,
    rows,
    columns,
    outs,
    each,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Products of 1, 2 or up to 4 rows with a share of the columns: ``partial`` float32 ``[splits, rows, outs]``.

    ``each`` rows of tiles are a share. Products stay with the thread that decodes; they are added up once, at the end.
    """
    split = tl.program_id(1)
    last = rows - 1
    x1 = x + tl.minimum(1, last) * columns
    x2 = x + tl.minimum(2, last) * columns
    x3 = x + tl.minimum(3, last) * columns
    s0, s1, s2, s3 = _vectors(
        (x, x1, x2, x3), words, split, columns, outs, each, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS, ROWS, TILES,
    )  # fmt: skip
    where = partial + split * rows * outs
    _store_vector(where, s0, outs, TILES, True)
    if ROWS > 1:
        _store_vector(where + outs, s1, outs, TILES, rows > 1)
    if ROWS > 2:
        _store_vector(where + 2 * outs, s2, outs, TILES, rows > 2)
        _store_vector(where + 3 * outs, s3, outs, TILES, rows > 3)


@triton.jit
def _place(places, at, there):
    """Row of the results at a place; ``places`` None where they come in order."""
    if places is None:
        return at
    else:
        return tl.load(places + at, mask=there, other=0)


@triton.jit
def vectors_each_kernel(
    x,
    words,
    table,
    jobs,
    places,
    partial,
    rows,
    columns,
    outs,
    each,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """What ``vector_kernel`` does, for several matrices. A program finds its own and up to ``ROWS`` rows in ``jobs``.

    ``jobs`` int64 ``[jobs, 3]``: a matrix, and from which place to which its rows lie. ``table`` int64
    ``[matrices, 3]``: how many words behind those given its own begin. Rows of ``x`` are those of the results.
    """
    split = tl.program_id(1)
    job = jobs + 3 * tl.program_id(2)
    words += tl.multiple_of(tl.load(table + 3 * tl.load(job)), 16)
    begin = tl.load(job + 1)
    last = tl.load(job + 2) - 1
    p0 = _place(places, begin, True)
    p1 = _place(places, tl.minimum(begin + 1, last), True)
    p2 = _place(places, tl.minimum(begin + 2, last), True)
    p3 = _place(places, tl.minimum(begin + 3, last), True)
    s0, s1, s2, s3 = _vectors(
        (x + p0 * columns, x + p1 * columns, x + p2 * columns, x + p3 * columns), words, split, columns, outs, each,
        MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS, ROWS, TILES,
    )  # fmt: skip
    where = partial + split.to(tl.int64) * rows * outs
    _store_vector(where + p0 * outs, s0, outs, TILES, True)
    if ROWS > 1:
        _store_vector(where + p1 * outs, s1, outs, TILES, begin < last)
    if ROWS > 2:
        _store_vector(where + p2 * outs, s2, outs, TILES, begin + 1 < last)
        _store_vector(where + p3 * outs, s3, outs, TILES, begin + 2 < last)


@triton.jit
def _store_vector(where, sums, outs, TILES: tl.constexpr, there):
    """Add up what threads have of each output, and store it."""
    by_output = tl.sum(tl.sum(tl.reshape(sums, (TILES, 8, 4, 2, 4)), 4), 2)
    n = (tl.program_id(0) * TILES + tl.arange(0, TILES))[:, None, None] * 16
    n = n + tl.arange(0, 8)[None, :, None] + 8 * tl.arange(0, 2)[None, None, :]
    tl.store(where + n, by_output, mask=(n < outs) & there)


@triton.jit
def _weights(
    words,
    at,
    begin,
    columns,
    outs,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DEEP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Elements float32 ``[16 · DEEP, 16 · TILES]`` from a row of tiles and a tile of it on."""
    k = at + tl.arange(0, DEEP)[:, None]
    n = begin + tl.arange(0, TILES)[None, :]
    tile = tl.reshape(k * (outs // 16) + n, (DEEP * TILES,))
    inside = tl.reshape((k < columns // 16) & (n < outs // 16), (DEEP * TILES,))
    value = _values(words, tile, inside, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS)
    # Thread: output of eight, pair of inputs; element: half of the outputs, half of the inputs, input of the pair.
    value = tl.reshape(value, (DEEP, TILES, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(value, (0, 5, 3, 6, 1, 4, 2)), (16 * DEEP, 16 * TILES))


@triton.jit
def _matrix(
    x,
    words,
    m,
    there,
    split,
    columns,
    outs,
    each,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """Products ``[BLOCK_M, 16 · TILES]`` of the rows ``m`` that are there with a share of the columns."""
    total = tl.zeros([BLOCK_M, 16 * TILES], tl.float32)
    for at in range(split * each, tl.minimum((split + 1) * each, columns // 16), DEEP):
        k = at * 16 + tl.arange(0, 16 * DEEP)[None, :]
        tile = tl.load(x + m * columns + k, mask=there & (k < columns), other=0.0)
        weight = _weights(
            words, at, tl.program_id(1) * TILES, columns, outs, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS, DEEP, TILES,
        )  # fmt: skip
        total = tl.dot(tile, weight.to(tile.dtype), total, input_precision="ieee")
    return total


@triton.jit
def matrix_kernel(
    x,
    words,
    partial,
    rows,
    columns,
    outs,
    each,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """Products of many rows by the tensor cores, a share of the columns each: float32 ``[splits, rows, outs]``.

    ``each`` rows of tiles are a share, a multiple of ``DEEP``.
    """
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    n = (tl.program_id(1) * (16 * TILES) + tl.arange(0, 16 * TILES))[None, :]
    split = tl.program_id(2)
    total = _matrix(
        x, words, m, m < rows, split, columns, outs, each, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS, DEEP, BLOCK_M,
        TILES,
    )  # fmt: skip
    tl.store(partial + (split * rows + m) * outs + n, total, mask=(m < rows) & (n < outs))


@triton.jit
def matrix_each_kernel(
    x,
    words,
    table,
    jobs,
    places,
    partial,
    rows,
    columns,
    outs,
    each,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """What ``matrix_kernel`` does, for several matrices, as ``vectors_each_kernel``: up to ``BLOCK_M`` rows a job."""
    job = jobs + 3 * tl.program_id(0)
    words += tl.multiple_of(tl.load(table + 3 * tl.load(job)), 16)
    at = (tl.load(job + 1) + tl.arange(0, BLOCK_M))[:, None]
    there = at < tl.load(job + 2)
    m = _place(places, at, there)
    n = (tl.program_id(1) * (16 * TILES) + tl.arange(0, 16 * TILES))[None, :]
    split = tl.program_id(2)
    total = _matrix(
        x, words, m, there, split, columns, outs, each, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS, DEEP, BLOCK_M,
        TILES,
    )  # fmt: skip
    tl.store(partial + (split * rows + m) * outs + n, total, mask=there & (n < outs))


@triton.jit
def gradient_kernel(
    grad,
    words,
    result,
    rows,
    columns,
    outs,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
):
    """The product ``[rows, columns]`` float32 of ``[rows, outs]`` and the matrix, ``16 · DEEP`` columns a program."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    at = tl.program_id(1) * DEEP
    total = tl.zeros([BLOCK_M, 16 * DEEP], tl.float32)
    for begin in range(0, outs // 16, TILES):
        n = (begin * 16 + tl.arange(0, 16 * TILES))[None, :]
        tile = tl.load(grad + m * outs + n, mask=(m < rows) & (n < outs), other=0.0)
        weight = _weights(
            words, at, begin, columns, outs, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS, DEEP, TILES,
        )  # fmt: skip
        total = tl.dot(tile, tl.trans(weight.to(tile.dtype)), total, input_precision="ieee")
    k = at * 16 + tl.arange(0, 16 * DEEP)[None, :]
    tl.store(result + m * columns + k, total, mask=(m < rows) & (k < columns))


@triton.jit
def weight_kernel(
    words,
    result,
    columns,
    outs,
    begin,
    count,
    MULTIPLIER: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    DEEP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Elements ``[columns, count]`` of the outputs from ``begin`` on, ``16 · DEEP`` columns a program."""
    at = tl.program_id(0) * DEEP
    across = tl.program_id(1) * TILES
    weight = _weights(
        words, at, begin // 16 + across, columns, outs, MULTIPLIER, SCALE, SHIFT, BITS, STATE_BITS, DEEP, TILES,
    )  # fmt: skip
    k = (at * 16 + tl.arange(0, 16 * DEEP))[:, None]
    n = (across * 16 + tl.arange(0, 16 * TILES))[None, :]
    where = result + k.to(tl.int64) * count + n
    tl.store(where, weight.to(result.dtype.element_ty), mask=(k < columns) & (n < count))


@triton.jit
def transform_kernel(
    x,
    before,
    after,
    own,
    result,
    rows,
    width,
    splits,
    norm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``(Σ x ⊙ before) · H ⊙ after``: ``[rows, width]`` of ``[splits, rows, width]``, ``BLOCK_N`` columns a program.

    With ``own`` int64 ``[rows]`` each row has vectors of its own, so many elements behind those given. ``DEPTH``
    columns are multiplied at a time: registers do not hold a whole block and its signs.
    """
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    begin = tl.program_id(1) * BLOCK_N
    index = tl.arange(0, BLOCK_N)[None, :]
    first = 0 if own is None else tl.load(own + m, mask=m < rows, other=0)
    transformed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, BLOCK_N, DEPTH):
        k = at + tl.arange(0, DEPTH)
        n = begin + k[None, :]
        total = tl.zeros([BLOCK_M, DEPTH], tl.float32)
        for split in range(0, splits):
            total += tl.load(x + (split * rows + m) * width + n, mask=m < rows, other=0.0).to(tl.float32)
        if before is not None:
            total *= tl.load(before + first + n).to(tl.float32)
        # An element is negative where row and column share an odd number of bits.
        shared = k[:, None] & index
        shared = shared ^ (shared >> 4)
        shared = shared ^ (shared >> 2)
        shared = shared ^ (shared >> 1)
        sign = (1 - 2 * (shared & 1)).to(tl.float32)
        transformed = tl.dot(total, sign, transformed, input_precision="ieee")
    transformed *= norm
    n = begin + index
    if after is not None:
        transformed *= tl.load(after + first + n).to(tl.float32)
    tl.store(result + m * width + n, transformed.to(result.dtype.element_ty), mask=m < rows)
