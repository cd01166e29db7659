"""Causal attention for training on a CPU: the same sums as torch's, in about half of its time.

Torch's own kernel for the CPU works with small tiles, and takes longer to go back through 512 tokens than all linear
layers before it together. Here queries go a chunk at a time through plain batched products, each chunk with the keys
that it may look at and no others, and the way back makes the probabilities anew, so that nothing of the size of
``length × length`` is kept. In bfloat16 scores are rounded before the softmax, whose sums are float32; where a compiled
kernel takes the work, they are not.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

from ulbq.kernels import attention
from ulbq.models.attention import own_attention
from ulbq.training.precision import Precision

_CHUNK = 64
"""Queries at a time: few enough that their scores stay in the cache, and that little is computed to be masked."""


def chunked_attention(precision: Precision) -> AbstractContextManager[None]:
    """While it lasts, models on a CPU whose attention is torch's take this one; what it cannot do stays torch's."""
    return own_attention(_attend, precision.device)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention in which a token looks at itself and at those before it.

    Args:
        query: ``[batch, heads, length, width]``.
        key, value: ``[batch, heads / n, length, …]``; ``n`` query heads in a row share one.
        scaling: of the scores.

    Returns:
        ``[batch, heads, length, value's width]``, differentiable.
    """
    if attention.takes(query, key, value):
        return attention.attend(query, key, value, scaling)
    output: torch.Tensor = _CausalAttention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return output


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor | None:
    if query.shape[2] != key.shape[2]:
        return None
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return causal_attention(query, key, value, scaling)


class _CausalAttention(torch.autograd.Function):
    """Heads that share keys are rows of one product: ``[batch · key heads, n · chunk, width]``."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        batch, heads, length, width = query.shape
        shared = batch * key.shape[1]
        queries = (query * scaling).reshape(shared, -1, length, width)
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        outputs = queries.new_empty(*queries.shape[:3], value.shape[-1])
        with torch.autocast(query.device.type, enabled=False):
            for start, end in _chunks(length):
                probabilities = _probabilities(queries[:, :, start:end], keys[:, :end])
                outputs[:, :, start:end] = _split(torch.bmm(probabilities, values[:, :end]), end - start)
        ctx.save_for_backward(queries, keys, values, outputs)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape, value.shape)
        return outputs.view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        queries, keys, values, outputs = ctx.saved_tensors
        gradient = gradients[0].reshape(outputs.shape)
        # What the softmax takes off the gradient of each row of scores.
        shift = (gradient.float() * outputs.float()).sum(-1, keepdim=True).to(gradient.dtype)
        to_queries = torch.empty_like(queries)
        to_keys, to_values = (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
        for start, end in _chunks(queries.shape[2]):
            rows = slice(start, end)
            incoming = gradient[:, :, rows].flatten(1, 2)
            probabilities = _probabilities(queries[:, :, rows], keys[:, :end])
            to_values[:, :end] += torch.bmm(probabilities.transpose(1, 2), incoming)
            scores = torch.bmm(incoming, values[:, :end].transpose(1, 2))
            scores.sub_(shift[:, :, rows].flatten(1, 2)).mul_(probabilities)
            to_queries[:, :, rows] = _split(torch.bmm(scores, keys[:, :end]).mul_(ctx.scaling), end - start)
            to_keys[:, :end] += torch.bmm(scores.transpose(1, 2), queries[:, :, rows].flatten(1, 2))
        query, key, value = ctx.shapes
        return to_queries.view(query), to_keys.to(keys.dtype).view(key), to_values.to(values.dtype).view(value), None


def _chunks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK)]


def _probabilities(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[shared, n · chunk, keys]`` of a chunk of queries, the last of which may look at all keys."""
    rows = queries.shape[2]
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    later = torch.full((rows, rows), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    _split(scores, rows)[..., -rows:].add_(later)
    return scores.softmax(-1)


def _split(product: torch.Tensor, rows: int) -> torch.Tensor:
    """``[shared, n · rows, …]`` as ``[shared, n, rows, …]``."""
    return product.view(len(product), -1, rows, product.shape[-1])
