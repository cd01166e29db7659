"""Calls of the Triton kernels for the closed-form solvers on a GPU: a block of columns in one launch, instead of each.

Results differ from torch's only where two ways to round are equally good to float32.
"""

from typing import Any, NamedTuple

import torch

from ulbq.kernels import triton_launch

Tensor = torch.Tensor

MOST_COLUMNS = 128
"""Columns of a block: errors of all of them stay in registers."""


def takes(tensor: Tensor) -> bool:
    """Whether the kernels take a tensor: one on a GPU, where there is Triton."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and triton_launch.unavailable_reason() is None


class Quantized(NamedTuple):
    """Codes uint8 and errors float32 of a block of columns, ``[b, out]`` both."""

    codes: Tensor
    errors: Tensor


def compensate(block: Tensor, upper: Tensor, groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Quantized:
    """Quantize a block of columns one after the other, errors made good within it: see :mod:`ulbq.solvers.gptq`.

    Args:
        block: ``[b, out]`` float32, contiguous, ``b`` at most :data:`MOST_COLUMNS`. It is left with what each column
            was when its turn came.
        upper: ``[b, b]`` float32, the block's part of the factor.
        groups: int64 ``[b]``, the group of each column.
        scales, zeros: ``[G, out]`` float32.
        bits: of a code.
    """
    count, outs = block.shape
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    with triton_launch.on(block):
        _kernels().compensate_kernel[(-(-outs // 32),)](
            block, upper.t().contiguous(), groups, scales.contiguous(), zeros.contiguous(), codes, errors, count, outs,
            2.0**bits - 1, BLOCK_K=max(16, 1 << (count - 1).bit_length()), BLOCK_N=32, num_warps=4,
        )  # fmt: skip
    return Quantized(codes, errors)


def refine(values: Tensor, centroids: Tensor, steps: int, weights: Tensor | None) -> Tensor:
    """Centroids ``[columns, k]`` after a few of Lloyd's steps: see :func:`ulbq.solvers.kmeans.refine`.

    Args:
        values: ``[columns, n]`` float32.
        centroids: ``[columns, k]`` float32, ascending; ``k`` is a power of two.
        steps: how many.
        weights: ``[columns, n]``, or None.
    """
    found = centroids.clone(memory_format=torch.contiguous_format)
    if found.numel():
        with triton_launch.on(values):
            _kernels().refine_kernel[(len(values),)](
                values.contiguous(), None if weights is None else weights.contiguous(), found, values.shape[1],
                STEPS=steps, LEVELS=found.shape[1], BLOCK=512, num_warps=8,
            )  # fmt: skip
    return found


def _kernels() -> Any:
    from ulbq.kernels import triton_solvers

    return triton_solvers
