"""Triton kernels for matrices in words (:mod:`ulbq.kernels.words`); :mod:`ulbq.kernels.triton_launch` calls them.

Importing this needs the package ``triton``. Under ``TRITON_INTERPRET=1`` the kernels run on the CPU; since bfloat16
arithmetic is wrong there without a word, floats are widened as they are loaded.

All sums are float32. Codes are exact in every floating type, so products are made of codes and scaled by the group:
``Σ s·(q − z)·x = s·(Σ q·x − z·Σ x)``. For a row or two of 16 bits the kernel for vectors adds up
``Σ (2ᵉ + q)·x`` and takes what comes of 2ᵉ ≤ 256 off once a group: 1e-5 of the result, and an operation a weight less.
"""
# mypy: ignore-errors
# Kernels are a language of their own, without types. They take what they need as plain arguments; names in capitals are
# compiled in.

import triton
import triton.language as tl


@triton.jit
def _field(word, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """The code at a bit below 16 as float32: put behind an exponent whose last place is one, then freed of it.

    One logical operation and one subtraction, where shifting, masking and converting take three, two of them slow.
    """
    exponent: tl.constexpr = (150 - SHIFT) << 23
    bias: tl.constexpr = (1 << (23 - SHIFT)) * 1.0
    return ((word & (MASK << SHIFT)) | exponent).to(tl.float32, bitcast=True) - bias


@triton.jit
def _fields(
    sums,
    totals,
    word,
    x,
    order,
    levels,
    at,
    columns,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the products with all codes of one word to ``sums``, for each row ``[BLOCK_N]``; x alone to ``totals``.

    ``x`` are four rows, of which ``ROWS`` count.
    """
    upper = word >> 16
    x0, x1, x2, x3 = x
    half: tl.constexpr = 16 // WIDTH
    mask: tl.constexpr = (1 << BITS) - 1
    s0, s1, s2, s3 = sums
    t0, t1, t2, t3 = totals
    for j in tl.static_range(2 * half):
        if LOOKUP:
            column = tl.load(order + at + j)
            inside = column >= 0
            code = ((word >> (j * WIDTH)) & mask) + ((at + j) << BITS)
            weight = tl.load(levels + code).to(tl.float32)
        else:
            column = at + j
            inside = column < columns
            weight = _field(word, j * WIDTH, mask) if j < half else _field(upper, (j - half) * WIDTH, mask)
        # A scalar each: a vector of the rows would be loaded once for every output of a thread.
        v0 = _activation(x0 + column, inside, EVEN)
        s0 += weight * v0
        t0 += v0
        if ROWS > 1:
            v1 = _activation(x1 + column, inside, EVEN)
            s1 += weight * v1
            t1 += v1
        if ROWS > 2:
            v2 = _activation(x2 + column, inside, EVEN)
            s2 += weight * v2
            t2 += v2
            v3 = _activation(x3 + column, inside, EVEN)
            s3 += weight * v3
            t3 += v3
    return (s0, s1, s2, s3), (t0, t1, t2, t3)


@triton.jit
def _pair(where, KIND: tl.constexpr):
    """Two activations of 16 bits, loaded as one word, float32."""
    both = tl.load(where)
    if tl.bfloat16 == KIND:
        return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = (both & 0xFFFF).to(tl.int16), (both >> 16).to(tl.int16)
        return low.to(KIND, bitcast=True).to(tl.float32), high.to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def _behind(word, exponent, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """The code at a bit from 15 to 22, and 2²³ over the value of that bit, float32."""
    return ((word & (MASK << SHIFT)) | (exponent - (SHIFT << 23))).to(tl.float32, bitcast=True)


@triton.jit
def _shift(low, high, FIELD: tl.constexpr, WIDTH: tl.constexpr):
    """What comes with the codes of two fields of a byte, of the sums of their activations."""
    return (1 << (8 - FIELD * WIDTH)) * 1.0 * low + (1 << (8 - (FIELD + 1) * WIDTH)) * 1.0 * high


@triton.jit
def _pairs(
    sums,
    totals,
    shifts,
    word,
    x,
    at,
    exponent,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What ``_fields`` adds, of one row or two, for activations ``x`` of 16 bits, two in a word.

    A code stands behind an exponent whose last place is one, and is not freed of it: what comes with it is the same for
    all outputs, and is added to ``shifts``. Each byte of the word is moved to the upper end of a mantissa, where that
    is at most 2⁸. ``exponent`` is that of 2²³, and no constant: so one logical operation takes a code out and puts it
    behind.
    """
    x0, x1, _, _ = x
    s0, s1, s2, s3 = sums
    t0, t1, t2, t3 = totals
    b0, b1 = shifts
    fields: tl.constexpr = 8 // WIDTH
    mask: tl.constexpr = (1 << BITS) - 1
    nil = tl.full([], 0.0, tl.float32)
    for j in tl.static_range(0, fields, 2):
        l0, h0, l1, h1 = nil, nil, nil, nil
        for byte in tl.static_range(4):
            moved = word << (15 - 8 * byte) if byte < 2 else word >> (8 * byte - 15)
            first = _behind(moved, exponent, 15 + j * WIDTH, mask)
            second = _behind(moved, exponent, 15 + (j + 1) * WIDTH, mask)
            pair = at // 2 + (byte * fields + j) // 2
            v, w = _pair(x0 + pair, KIND)
            s0 += first * v
            s0 += second * w
            l0 += v
            h0 += w
            if ROWS > 1:
                v, w = _pair(x1 + pair, KIND)
                s1 += first * v
                s1 += second * w
                l1 += v
                h1 += w
        t0, t1 = t0 + (l0 + h0), t1 + (l1 + h1)
        b0 += _shift(l0, h0, j, WIDTH)
        b1 += _shift(l1, h1, j, WIDTH)
    return (s0, s1, s2, s3), (t0, t1, t2, t3), (b0, b1)


@triton.jit
def _word(
    sums,
    totals,
    shifts,
    word,
    x,
    order,
    levels,
    at,
    columns,
    exponent,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The products with all codes of one word: by pairs of activations, or one by one."""
    if PAIRS:
        x0, x1, x2, x3 = x
        two: tl.constexpr = tl.pointer_type(tl.int32)
        kind: tl.constexpr = x0.dtype.element_ty
        both = x0.to(two), x1.to(two), x2.to(two), x3.to(two)
        return _pairs(sums, totals, shifts, word, both, at, exponent, WIDTH, BITS, kind, ROWS)
    else:
        sums, totals = _fields(sums, totals, word, x, order, levels, at, columns, WIDTH, BITS, LOOKUP, EVEN, ROWS)
        return sums, totals, shifts


@triton.jit
def _activation(where, inside, EVEN: tl.constexpr):
    """One activation, float32."""
    if EVEN:
        return tl.load(where).to(tl.float32)
    else:
        return tl.load(where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vectors(
    x,
    words,
    scales,
    zeros,
    order,
    levels,
    n,
    split,
    columns,
    outs,
    group,
    spans,
    spans_each,
    part_words,
    part_scales,
    exponent,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Products of four rows, of which ``ROWS`` count, with a share of the columns, for outputs ``n`` ``[BLOCK_N]``.

    A thread has some outputs to itself, goes down the columns, and reads an activation as the same number as its
    neighbours do: nothing passes between threads. Scales are loaded once for ``SPAN`` columns.
    """
    inside = n < outs
    none = tl.zeros([BLOCK_N], tl.float32)
    nil = tl.full([], 0.0, tl.float32)
    r0, r1, r2, r3 = none, none, none, none
    for span in range(split * spans_each, tl.minimum((split + 1) * spans_each, spans)):
        for part in tl.static_range(PARTS):
            sums = none, none, none, none
            totals = nil, nil, nil, nil
            shifts = nil, nil
            for chunk in tl.static_range(SPAN // 32):
                at = span * SPAN + chunk * 32
                here = words + part * part_words + (at // 32 * BITS) * outs + n
                if BITS == 3:
                    high = tl.load(here + 2 * outs, mask=inside, other=0)
                    for m in tl.static_range(4):
                        low = tl.load(here + (m // 2) * outs, mask=inside, other=0) >> (m % 2 * 2)
                        word = (low & 0x33333333) | (((high >> m) & 0x11111111) << 2)
                        sums, totals, shifts = _word(
                            sums, totals, shifts, word, x, order, levels, at + m * 8, columns, exponent, 4, 3, LOOKUP,
                            EVEN, PAIRS, ROWS,
                        )  # fmt: skip
                else:
                    for m in tl.static_range(BITS):
                        word = tl.load(here + m * outs, mask=inside, other=0)
                        sums, totals, shifts = _word(
                            sums, totals, shifts, word, x, order, levels, at + m * (32 // BITS), columns, exponent,
                            BITS, BITS, LOOKUP, EVEN, PAIRS, ROWS,
                        )  # fmt: skip
            s0, s1, s2, s3 = sums
            t0, t1, t2, t3 = totals
            if PAIRS:
                b0, b1 = shifts
                s0, s1 = s0 - b0, s1 - b1
            if LOOKUP:
                r0, r1, r2, r3 = r0 + s0, r1 + s1, r2 + s2, r3 + s3
            else:
                where = span * SPAN // group * outs + n
                scale = tl.load(scales + part * part_scales + where, mask=inside, other=0.0).to(tl.float32)
                zero = tl.load(zeros + where, mask=inside, other=0).to(tl.float32) if HAS_ZEROS else CENTRE
                r0 += scale * (s0 - zero * t0)
                r1 += scale * (s1 - zero * t1)
                r2 += scale * (s2 - zero * t2)
                r3 += scale * (s3 - zero * t3)
    return r0, r1, r2, r3


@triton.jit
def vector_kernel(
    x,
    words,
    scales,
    zeros,
    order,
    levels,
    partial,
    rows,
    columns,
    outs,
    group,
    spans,
    spans_each,
    part_words,
    part_scales,
    exponent,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Products of 1, 2 or up to 4 rows with a share of the columns: ``partial`` float32 ``[splits, rows, outs]``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outs
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS
    # Beyond the last row the last, whose products are stored nowhere.
    last = rows - 1
    x0 = x + row * columns
    x1 = x + tl.minimum(row + 1, last) * columns
    x2 = x + tl.minimum(row + 2, last) * columns
    x3 = x + tl.minimum(row + 3, last) * columns
    r0, r1, r2, r3 = _vectors(
        (x0, x1, x2, x3), words, scales, zeros, order, levels, n, split, columns, outs, group, spans, spans_each,
        part_words, part_scales, exponent, CENTRE, BITS, PARTS, HAS_ZEROS, LOOKUP, EVEN, PAIRS, SPAN, ROWS, BLOCK_N,
    )  # fmt: skip
    where = partial + (split * rows + row).to(tl.int64) * outs + n
    tl.store(where, r0, mask=inside)
    if ROWS > 1:
        tl.store(where + outs, r1, mask=inside & (row + 1 < rows))
    if ROWS > 2:
        tl.store(where + 2 * outs, r2, mask=inside & (row + 2 < rows))
        tl.store(where + 3 * outs, r3, mask=inside & (row + 3 < rows))


@triton.jit
def _codes(words, at, n, outs, BITS: tl.constexpr, SPAN: tl.constexpr):
    """Codes int32 ``[SPAN, BLOCK_N]`` from column ``at`` on, of outputs ``n`` ``[1, BLOCK_N]``; zero beyond the last.

    Each word is loaded once, and spread over its columns in registers.
    """
    here = words + at // 32 * (BITS * outs) + n
    inside = n < outs
    width: tl.constexpr = 4 if BITS == 3 else BITS
    if BITS == 3:
        chunk = tl.arange(0, SPAN // 32)[:, None]
        half = tl.arange(0, SPAN // 16)[:, None]
        high = tl.load(here + (3 * chunk + 2) * outs, mask=inside, other=0)
        low = tl.load(here + (half // 2 * 3 + half % 2) * outs, mask=inside, other=0)
        high = ((high[:, None, :] >> tl.arange(0, 4)[None, :, None]) & 0x11111111) << 2
        low = (low[:, None, :] >> (2 * tl.arange(0, 2))[None, :, None]) & 0x33333333
        count: tl.constexpr = SPAN // 8
        word = tl.reshape(low, (count, n.shape[1])) | tl.reshape(high, (count, n.shape[1]))
    else:
        word = tl.load(here + tl.arange(0, SPAN * BITS // 32)[:, None] * outs, mask=inside, other=0)
    fields = (word[:, None, :] >> (width * tl.arange(0, 32 // width))[None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(fields, (SPAN, n.shape[1]))


@triton.jit
def _weights(
    words,
    scales,
    zeros,
    levels,
    at,
    n,
    outs,
    group,
    part_words,
    part_scales,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Weights float32 ``[SPAN, BLOCK_N]``; what is beyond the last output is zero."""
    inside = n < outs
    if LOOKUP:
        k = at + tl.arange(0, SPAN)[:, None]
        index = _codes(words, at, n, outs, BITS, SPAN) + (k << BITS)
        return tl.load(levels + index, mask=inside, other=0.0).to(tl.float32)
    else:
        where = at // group * outs + n
        zero = tl.load(zeros + where, mask=inside, other=0).to(tl.float32) if HAS_ZEROS else CENTRE
        scale = tl.load(scales + where, mask=inside, other=0.0).to(tl.float32)
        weight = (_codes(words, at, n, outs, BITS, SPAN).to(tl.float32) - zero) * scale
        if PARTS == 2:
            scale = tl.load(scales + part_scales + where, mask=inside, other=0.0).to(tl.float32)
            weight += _codes(words + part_words, at, n, outs, BITS, SPAN).to(tl.float32) * scale
        return weight


@triton.jit
def _matrix(
    x,
    words,
    scales,
    zeros,
    order,
    levels,
    m,
    there,
    n,
    split,
    columns,
    outs,
    group,
    spans,
    spans_each,
    part_words,
    part_scales,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Products ``[BLOCK_M, BLOCK_N]`` of the rows ``m`` that are there with a share of the columns.

    Weights exist for one tile.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for span in range(split * spans_each, tl.minimum((split + 1) * spans_each, spans)):
        at = span * SPAN
        k = at + tl.arange(0, SPAN)[None, :]
        if LOOKUP:
            k = tl.load(order + k)
        tile = tl.load(x + m * columns + k, mask=there & (k >= 0) & (k < columns), other=0.0)
        if LOOKUP or PARTS == 2:
            weight = _weights(
                words, scales, zeros, levels, at, n, outs, group, part_words, part_scales,
                CENTRE, BITS, PARTS, HAS_ZEROS, LOOKUP, SPAN,
            )  # fmt: skip
            total = tl.dot(tile, weight.to(tile.dtype), total, input_precision="ieee")
        else:
            product = tl.dot(tile, _codes(words, at, n, outs, BITS, SPAN).to(tile.dtype), input_precision="ieee")
            where = at // group * outs + n
            scale = tl.load(scales + where, mask=n < outs, other=0.0).to(tl.float32)
            zero = tl.load(zeros + where, mask=n < outs, other=0).to(tl.float32) if HAS_ZEROS else CENTRE
            total += scale * (product - zero * tl.sum(tile.to(tl.float32), 1)[:, None])
    return total


@triton.jit
def matrix_kernel(
    x,
    words,
    scales,
    zeros,
    order,
    levels,
    result,
    rows,
    columns,
    outs,
    width,
    group,
    spans,
    spans_each,
    part_words,
    part_scales,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Products of many rows by the tensor cores, a share of the columns each: ``[splits, rows, width]``.

    ``result`` is float32 where other shares are to be added, else of the type of ``x``.
    """
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    split = tl.program_id(2)
    total = _matrix(
        x, words, scales, zeros, order, levels, m, m < rows, n, split, columns, outs, group, spans, spans_each,
        part_words, part_scales, CENTRE, BITS, PARTS, HAS_ZEROS, LOOKUP, SPAN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    where = (split * rows + m) * width + n
    tl.store(result + where, total.to(result.dtype.element_ty), mask=(m < rows) & (n < width))


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
    scales,
    zeros,
    table,
    jobs,
    places,
    partial,
    rows,
    share,
    columns,
    outs,
    group,
    spans,
    spans_each,
    part_words,
    part_scales,
    exponent,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What ``vector_kernel`` does, for several matrices. A program finds its own and up to ``ROWS`` rows in ``jobs``.

    ``jobs`` int64 ``[jobs, 3]``: a matrix, and from which place to which its rows lie. ``table`` int64
    ``[matrices, 3]``: how many elements behind those given its words, scales and zero points begin.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outs
    split = tl.program_id(1)
    job = jobs + 3 * tl.program_id(2)
    own = table + 3 * tl.load(job)
    begin = tl.load(job + 1)
    last = tl.load(job + 2) - 1
    p0 = _place(places, begin, True)
    p1 = _place(places, tl.minimum(begin + 1, last), True)
    p2 = _place(places, tl.minimum(begin + 2, last), True)
    p3 = _place(places, tl.minimum(begin + 3, last), True)
    x0 = x + p0 // share * columns
    x1 = x + p1 // share * columns
    x2 = x + p2 // share * columns
    x3 = x + p3 // share * columns
    words += tl.multiple_of(tl.load(own), 16)
    scales += tl.multiple_of(tl.load(own + 1), 16)
    if HAS_ZEROS:
        zeros += tl.multiple_of(tl.load(own + 2), 16)
    r0, r1, r2, r3 = _vectors(
        (x0, x1, x2, x3), words, scales, zeros, None, None, n, split, columns, outs, group, spans, spans_each,
        part_words, part_scales, exponent, CENTRE, BITS, PARTS, HAS_ZEROS, False, EVEN, PAIRS, SPAN, ROWS, BLOCK_N,
    )  # fmt: skip
    where = partial + split.to(tl.int64) * rows * outs + n
    tl.store(where + p0 * outs, r0, mask=inside)
    if ROWS > 1:
        tl.store(where + p1 * outs, r1, mask=inside & (begin < last))
    if ROWS > 2:
        tl.store(where + p2 * outs, r2, mask=inside & (begin + 1 < last))
        tl.store(where + p3 * outs, r3, mask=inside & (begin + 2 < last))


@triton.jit
def matrix_each_kernel(
    x,
    words,
    scales,
    zeros,
    table,
    jobs,
    places,
    result,
    rows,
    share,
    columns,
    outs,
    width,
    group,
    spans,
    spans_each,
    part_words,
    part_scales,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What ``matrix_kernel`` does, for several matrices, as ``vectors_each_kernel``: up to ``BLOCK_M`` rows a job."""
    job = jobs + 3 * tl.program_id(0)
    own = table + 3 * tl.load(job)
    at = (tl.load(job + 1) + tl.arange(0, BLOCK_M))[:, None]
    there = at < tl.load(job + 2)
    m = _place(places, at, there)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    split = tl.program_id(2)
    words += tl.multiple_of(tl.load(own), 16)
    scales += tl.multiple_of(tl.load(own + 1), 16)
    if HAS_ZEROS:
        zeros += tl.multiple_of(tl.load(own + 2), 16)
    total = _matrix(
        x, words, scales, zeros, None, None, m // share, there, n, split, columns, outs, group, spans, spans_each,
        part_words, part_scales, CENTRE, BITS, PARTS, HAS_ZEROS, False, SPAN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    where = (split * rows + m) * width + n
    tl.store(result + where, total.to(result.dtype.element_ty), mask=there & (n < width))


@triton.jit
def gradient_kernel(
    grad,
    words,
    scales,
    zeros,
    order,
    levels,
    result,
    rows,
    columns,
    outs,
    width,
    group,
    part_words,
    part_scales,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of the input ``[rows, columns]`` of that of the output ``[rows, width]``, ``SPAN`` columns a program."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    at = tl.program_id(1) * SPAN
    total = tl.zeros([BLOCK_M, SPAN], tl.float32)
    for begin in range(0, outs, BLOCK_N):
        n = (begin + tl.arange(0, BLOCK_N))[None, :]
        tile = tl.load(grad + m * width + n, mask=(m < rows) & (n < width), other=0.0)
        weight = _weights(
            words, scales, zeros, levels, at, n, outs, group, part_words, part_scales,
            CENTRE, BITS, PARTS, HAS_ZEROS, LOOKUP, SPAN,
        )  # fmt: skip
        total = tl.dot(tile, tl.trans(weight.to(tile.dtype)), total, input_precision="ieee")
    k = at + tl.arange(0, SPAN)[None, :]
    if LOOKUP:
        k = tl.load(order + k)
    inside = (m < rows) & (k >= 0) & (k < columns)
    tl.store(result + m * columns + k, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def weight_kernel(
    words,
    scales,
    zeros,
    order,
    levels,
    result,
    columns,
    outs,
    begin,
    count,
    group,
    part_words,
    part_scales,
    CENTRE: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Dense weights ``[columns, count]`` of the outputs from ``begin`` on, ``SPAN`` columns a program."""
    at = tl.program_id(0) * SPAN
    n = (begin + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    weight = _weights(
        words, scales, zeros, levels, at, n, outs, group, part_words, part_scales,
        CENTRE, BITS, PARTS, HAS_ZEROS, LOOKUP, SPAN,
    )  # fmt: skip
    k = at + tl.arange(0, SPAN)[:, None]
    if LOOKUP:
        k = tl.load(order + k)
    inside = (k >= 0) & (k < columns) & (n < begin + count)
    tl.store(result + k.to(tl.int64) * count + (n - begin), weight.to(result.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    partial,
    result,
    x,
    starts,
    outlier_columns,
    deltas,
    gates,
    out_scales,
    sums,
    zeros,
    rows,
    columns,
    outs,
    width,
    splits,
    OUTLIERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ZERO_OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the shares up; then outliers, or the outer scales of a mixture: ``[rows, width]``, outputs padded to outs."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    total = tl.zeros([BLOCK_N], tl.float32)
    for split in range(0, splits):
        total += tl.load(partial + (split * rows + row) * outs + n, mask=inside, other=0.0)
    if OUTLIERS:
        at = tl.load(starts + n, mask=inside, other=0)
        count = tl.load(starts + n + 1, mask=inside, other=0) - at
        for i in range(0, tl.max(count, 0)):
            some = i < count
            column = tl.load(outlier_columns + at + i, mask=some, other=0)
            value = tl.load(x + row * columns + column, mask=some, other=0.0).to(tl.float32)
            total += tl.load(deltas + at + i, mask=some, other=0.0) * value
    if EXPERTS:
        total += tl.load(sums + 2 * row + 1)
        if ZERO_OUTPUTS:
            total += tl.load(zeros + n, mask=inside, other=0.0).to(tl.float32) * tl.load(sums + 2 * row)
        outer = tl.zeros([BLOCK_N], tl.float32)
        for e in tl.static_range(EXPERTS):
            scale = tl.load(out_scales + e * width + n, mask=inside, other=0.0).to(tl.float32)
            outer += tl.load(gates + row * EXPERTS + e) * scale
        total *= outer
    tl.store(result + row * width + n, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(
    x,
    router,
    in_scales,
    zeros,
    scaled,
    gates,
    sums,
    columns,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    ZERO_INPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Before the product of a mixture, for each row: gates ``[EXPERTS]``, and activations times their inner scales.

    ``sums`` are two numbers a row, of the scaled activations: their sum, and that of their products with the zero
    points of the inputs.
    """
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PADDED)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if EXPERTS == 1:
        gate = tl.where(e == 0, 1.0, 0.0)
    else:
        logits = tl.zeros([PADDED, 1], tl.float32)
        for at in range(0, columns, BLOCK_K):
            value = tl.load(x + row * columns + at + k, mask=at + k < columns, other=0.0).to(tl.float32)
            inside = (e < EXPERTS) & (at + k < columns)
            vector = tl.load(router + e * columns + at + k, mask=inside, other=0.0).to(tl.float32)
            logits += tl.sum(vector * value, 1)[:, None]
        logits = tl.where(e < EXPERTS, logits, -float("inf"))
        gate = tl.exp(logits - tl.max(logits, 0)[None, :])
        gate = gate / tl.sum(gate, 0)[None, :]
    tl.store(gates + row * EXPERTS + e, gate, mask=e < EXPERTS)
    both = tl.zeros([1, BLOCK_K], tl.float32)
    shift = tl.zeros([1, BLOCK_K], tl.float32)
    for at in range(0, columns, BLOCK_K):
        inside = at + k < columns
        value = tl.load(x + row * columns + at + k, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(in_scales + e * columns + at + k, mask=inside & (e < EXPERTS), other=0.0).to(tl.float32)
        value *= tl.sum(gate * scale, 0)[None, :]
        tl.store(scaled + row * columns + at + k, value.to(scaled.dtype.element_ty), mask=inside)
        both += value
        if ZERO_INPUTS:
            shift += value * tl.load(zeros + at + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + 2 * row, tl.sum(both))
    tl.store(sums + 2 * row + 1, tl.sum(shift))
