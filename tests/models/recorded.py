"""What stands in for a CUDA graph where there is no GPU: a step that is run again in its place."""

from collections.abc import Callable

import torch


def record(step: Callable[[], torch.Tensor], rewind: Callable[[], object]) -> tuple[torch.Tensor, Callable[[], object]]:
    """As :func:`ulbq.models.graph_decoding.record`: steps that warm it up are undone, and the recorded one runs not."""
    for _ in range(2):
        rewind()
        made = torch.empty_like(step())
    rewind()
    return made, lambda: made.copy_(step())
