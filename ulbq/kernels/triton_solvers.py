"""Triton kernels for the column loops of the closed-form solvers; :mod:`ulbq.kernels.solver_launch` calls them.

:mod:`ulbq.solvers.gptq` and :mod:`ulbq.solvers.kmeans` say what is computed. Importing this needs the package
``triton``. No sum is made by atomics, so a run repeats itself.
"""
# mypy: ignore-errors
# Kernels are a language of their own, without types. They take what they need as plain arguments; names in capitals are
# compiled in.

import triton
import triton.language as tl


@triton.jit
def compensate_kernel(
    columns, upper, groups, scales, zeros, codes, errors, count, outs, top, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Quantize a block of columns ``[count, outs]`` one after the other, ``BLOCK_N`` outputs a program.

    ``upper`` ``[count, count]`` is transposed, ``groups`` int64 ``[count]`` are rows of ``scales`` and ``zeros``. The
    errors of earlier columns stay in registers; what a column was when its turn came replaces it.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outs
    k = tl.arange(0, BLOCK_K)
    made = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for at in range(0, count):
        row = tl.load(upper + at * count + k, mask=k < at, other=0.0)
        value = tl.load(columns + at * outs + n, mask=inside, other=0.0) - tl.sum(row[:, None] * made, 0)
        grid = tl.load(groups + at) * outs + n
        scale = tl.load(scales + grid, mask=inside, other=1.0)
        zero = tl.load(zeros + grid, mask=inside, other=0.0)
        code = tl.minimum(tl.maximum(tl.div_rn(value, scale) + zero, 0.0), top)
        # To the nearest, ties to even: beyond 2²³ floats are whole numbers.
        code = (code + 8388608.0) - 8388608.0
        error = tl.div_rn(value - (code - zero) * scale, tl.load(upper + at * count + at))
        made = tl.where((k == at)[:, None], error[None, :], made)
        tl.store(columns + at * outs + n, value, mask=inside)
        tl.store(codes + at * outs + n, code.to(tl.uint8), mask=inside)
        tl.store(errors + at * outs + n, error, mask=inside)


@triton.jit
def refine_kernel(values, weights, levels, count, STEPS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """``STEPS`` of Lloyd's steps for the centroids ``[LEVELS]`` of a row of ``values`` ``[rows, count]``, in place."""
    row = tl.program_id(0).to(tl.int64)
    values += row * count
    levels += row * LEVELS
    j = tl.arange(0, LEVELS)
    for _ in tl.static_range(STEPS):
        level = tl.load(levels + j)
        lower = 0.5 * tl.load(levels + j - 1, mask=j > 0, other=0.0) + 0.5 * level
        upper = 0.5 * level + 0.5 * tl.load(levels + j + 1, mask=j < LEVELS - 1, other=0.0)
        mass = tl.zeros([LEVELS], tl.float64)
        total = tl.zeros([LEVELS], tl.float64)
        for begin in range(0, count, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            value = tl.load(values + at, mask=at < count, other=0.0)
            if weights is None:
                weight = tl.where(at < count, 1.0, 0.0)
            else:
                weight = tl.load(weights + row * count + at, mask=at < count, other=0.0)
            above = (value[None, :] > lower[:, None]) | (j == 0)[:, None]
            own = above & ((value[None, :] <= upper[:, None]) | (j == LEVELS - 1)[:, None])
            own = tl.where(own, weight[None, :], 0.0)
            mass += tl.sum(own, 1).to(tl.float64)
            total += tl.sum(own * value[None, :], 1).to(tl.float64)
        mean = (total / tl.maximum(mass, 1e-300)).to(tl.float32)
        tl.debug_barrier()  # others still read what is replaced
        tl.store(levels + j, tl.where(mass > 0, mean, level))
        tl.debug_barrier()
