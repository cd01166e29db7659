"""The end of a model, from its last hidden states to logits, over a chunk of positions at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ulbq.runtime import logits_room
from ulbq.training.precision import Precision

LOGITS_MEMORY = 128 << 20
"""Bytes that all copies of one chunk's logits may take on a CPU."""


def logits_memory(vocabulary: int, copies: int, positions: int, device: torch.device) -> int:
    """Bytes of one chunk's logits, of so many positions at most, where so many float32 copies live together."""
    return 4 * copies * vocabulary * min(positions_at_once(vocabulary, copies, device), positions)


def positions_at_once(vocabulary: int, copies: int, device: torch.device) -> int:
    """Positions of a chunk, where so many float32 copies of their logits live together."""
    return max(16, logits_room(device, LOGITS_MEMORY) // (4 * copies * vocabulary))


class Head:
    """What comes behind a model's trunk, however an architecture writes it: scaled, soft-capped, tied or not.

    The model itself runs, with its trunk replaced by something that returns the hidden states in question. It treats
    every position by itself, so positions may go through in any chunks.

    Args:
        model: all of it.
        precision: of the product.
    """

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        self._model = model
        self._precision = precision
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, vocabulary]`` of hidden states ``[n, hidden]`` behind the trunk's last norm."""
        with _replaced(self._model.base_model, states.unsqueeze(0)), self._precision.autocast():
            logits: torch.Tensor = self._model(inputs_embeds=states.detach().unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0)

    def chunk(self, copies: int) -> int:
        """Positions that may go through at once where so many float32 copies of their logits live together."""
        return positions_at_once(self._vocabulary, copies, self._precision.device)


class _States(BaseModelOutputWithPast):
    """Hidden states as a trunk returns them; of experts, images and whatever else a head asks for there is nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaced(trunk: nn.Module, states: torch.Tensor) -> Iterator[None]:
    """Have a trunk return these states instead of running."""

    def stand_in(*args: Any, **kwargs: Any) -> _States:
        return _States(last_hidden_state=states)

    trunk.forward = stand_in
    try:
        yield
    finally:
        del trunk.forward


def in_chunks(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], positions: torch.Tensor, size: int
) -> list[torch.Tensor]:
    """Values of many positions, a chunk at a time; what a chunk needs for its gradient is computed again there.

    Args:
        function: from positions ``[n]`` to a tuple of tensors ``[n]``.
        positions: int64 ``[N]``.
        size: of a chunk.

    Returns:
        Each of the tensors, ``[N]``.
    """
    parts = positions.split(size)
    if len(parts) == 1 or not torch.is_grad_enabled():
        found = [function(part) for part in parts]
    else:
        found = [checkpoint(function, part, use_reentrant=False) for part in parts]
    return [torch.cat(values) for values in zip(*found, strict=True)]


def sum_in_chunks(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    positions: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """The sum of a function over many positions, a chunk at a time; each chunk goes back as soon as it is summed.

    So nothing of a chunk is kept, and nothing is computed twice.

    Args:
        function: from states ``[n, hidden]`` and positions ``[m]`` to a scalar.
        states: ``[n, hidden]``, the one thing that a gradient goes back to.
        positions: int64 ``[N]``.
        size: of a chunk.

    Returns:
        A scalar.
    """
    parts = positions.split(size)
    if not (torch.is_grad_enabled() and states.requires_grad):
        return torch.stack([function(states, part) for part in parts]).sum()
    leaf = states.detach().requires_grad_()
    values = []
    for part in parts:
        value = function(leaf, part)
        value.backward()
        values.append(value.detach())
    total: torch.Tensor = _Summed.apply(states, torch.stack(values).sum(), leaf.grad)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    """A value whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, coming: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * coming, None, None
