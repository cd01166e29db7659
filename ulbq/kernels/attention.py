"""Causal attention in bfloat16 on the CPU, compiled (``cpu/attention.cpp``), differentiable."""

import ctypes
from typing import Any

import torch

from ulbq.kernels import build


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the compiled code serves such tensors ``[batch, heads, length, width]``."""
    tensors = (query, key, value)
    plain = all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in tensors)
    width = query.shape[-1]
    even = width % 16 == 0 and width == key.shape[-1] == value.shape[-1]
    return plain and even and build.has_pairs() and build.unavailable_reason() is None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention in which a token looks at itself and at those before it; scores and sums are float32.

    Args:
        query: ``[batch, heads, length, width]`` bfloat16.
        key, value: ``[batch, heads / n, length, width]``; ``n`` query heads in a row share one.
        scaling: of the scores.

    Returns:
        ``[batch, heads, length, width]``, differentiable; the heads of a token lie side by side.
    """
    output: torch.Tensor = _Attend.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return output


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        tensors = [_rows(x) for x in (query, key, value)]
        output, logs = _side_by_side(query), torch.empty(query.shape[:3], dtype=torch.float32)
        build.library().ulbq_attend(
            *_places(*tensors, output), *_shape(query, key), scaling, logs.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(*tensors, output, logs)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, output, logs = ctx.saved_tensors
        found = [_side_by_side(x) for x in (query, key, value)]
        given = (query, key, value, output, _rows(gradients[0]))
        build.library().ulbq_attend_back(
            *_places(*given, *found), *_shape(query, key), ctx.scaling, logs.data_ptr(), torch.get_num_threads()
        )
        return found[0], found[1], found[2], None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Room for a tensor like ``x``, as a product of ``[batch, length, heads · width]`` lies in memory."""
    batch, heads, length, width = x.shape
    return torch.empty(batch, length, heads, width, dtype=x.dtype).transpose(1, 2)


def _places(*tensors: torch.Tensor) -> list[Any]:
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    return [*(x.data_ptr() for x in tensors), (ctypes.c_int64 * len(strides))(*strides)]


def _shape(query: torch.Tensor, key: torch.Tensor) -> tuple[int, ...]:
    batch, heads, length, width = query.shape
    return batch, heads, key.shape[1], length, width
