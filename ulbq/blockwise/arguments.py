"""What blocks are called with beside hidden states, for all samples alike or for each its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ulbq.blockwise.activations import Hidden

Arguments = dict[str, Any] | Sequence[dict[str, Any]]
"""What a block is called with beside hidden states: for all samples, of batch size 1 so that it broadcasts over any
batch; or for each sample its own."""


def run_block(block: nn.Module, hidden: Hidden, arguments: Arguments, rows: Sequence[int] | torch.Tensor) -> Hidden:
    """Output ``[batch, length, hidden]`` of a block, whether it returns a tensor or a tuple that starts with it.

    Args:
        block: it.
        hidden: ``[batch, length, hidden]``.
        arguments: what else it is called with.
        rows: the numbers of the samples that ``hidden`` is of, ``[batch]``.
    """
    return joined(outputs_of(block, hidden, arguments, rows))


def outputs_of(
    block: nn.Module, hidden: Hidden, arguments: Arguments, rows: Sequence[int] | torch.Tensor
) -> list[Hidden | tuple[Any, ...]]:
    """What a block returns, of all samples together or of one after the other."""
    if isinstance(arguments, dict):
        return [block(hidden, **arguments)]
    return [block(hidden[i : i + 1], **arguments[int(row)]) for i, row in enumerate(rows)]


def joined(outputs: Sequence[Hidden | tuple[Any, ...]]) -> Hidden:
    """Hidden states ``[batch, length, hidden]`` of what a block returned."""
    states: list[Hidden] = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return states[0] if len(states) == 1 else torch.cat(states)


class OnDevice(Sequence[dict[str, Any]]):
    """Arguments that lie on the CPU, and are brought to the device where they are asked for."""

    def __init__(self, calls: Sequence[dict[str, Any]], device: torch.device) -> None:
        self._calls, self._device = calls, device

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, row: Any) -> Any:
        return moved(self._calls[row], self._device, {})


def moved(value: Any, device: torch.device, seen: dict[int, torch.Tensor]) -> Any:
    """Tensors within a value on a device, those that are one object once; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return seen.setdefault(id(value), value.to(device))
    if isinstance(value, dict):
        return {name: moved(part, device, seen) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(part, device, seen) for part in value)
    return value
