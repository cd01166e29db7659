"""What layers are called with while a block or a model runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

Key = TypeVar("Key")


class Enough(Exception):
    """For a watcher to raise, and its caller to suppress: ends the pass where all that was wanted has been seen."""


@contextmanager
def watching(layers: Mapping[Key, nn.Module], see: Callable[[Key, torch.Tensor], None]) -> Iterator[None]:
    """Have ``see`` told, before each call of a layer, which it is and what its input is, while the context lasts."""

    def hook_for(key: Key) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: see(key, arguments[0])

    handles = [layer.register_forward_pre_hook(hook_for(key)) for key, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Input(NamedTuple):
    """What some layers read.

    Attributes:
        layers: their names, in execution order.
        calls: how often a pass calls each of them; 0 for a layer that it misses.
        rows: vectors ``[in]`` that it gives each of them.
    """

    layers: tuple[str, ...]
    calls: int
    rows: int


def distinct_inputs(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[Input]:
    """The inputs of layers in execution order; layers that are called with the very same tensors share theirs.

    Args:
        layers: by name. Those that the pass misses come last, each with an input of its own.
        run: one forward pass.
    """
    calls: dict[str, list[torch.Tensor]] = {}
    with watching(layers, lambda name, tensor: calls.setdefault(name, []).append(tensor)):
        run()
    # The tensors are alive as long as `calls` is, so no two of them have the same id.
    shared: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in calls.items():
        shared.setdefault(tuple(map(id, tensors)), []).append(name)
    rows = {key: sum(tensor[..., 0].numel() for tensor in calls[names[0]]) for key, names in shared.items()}
    found = [Input(tuple(names), len(key), rows[key]) for key, names in shared.items()]
    return found + [Input((name,), 0, 0) for name in layers if name not in calls]
