"""An attention of our own in the place of torch's, in models that transformers runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None]
"""From queries ``[batch, heads, length, width]``, keys and values ``[batch, heads / n, …]`` and the scores' factor to
``[batch, heads, length, value's width]``; None for what it does not take."""


@contextmanager
def own_attention(attend: Attend, device: torch.device) -> Iterator[None]:
    """While it lasts, models on a CPU whose attention is torch's take this one; what it cannot do stays torch's.

    Args:
        attend: is asked for causal attention without a mask, dropout or anything of the kind, and for that alone.
        device: of the models; on any but a CPU nothing changes.
    """
    if device.type != "cpu":
        yield
        return

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers calls an attention; ``[batch, length, heads, width]`` and no weights."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        special = any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
        if causal and attention_mask is None and not dropout and not special:
            output = attend(query, key, value, 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
            if output is not None:
                return output.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = forward
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
