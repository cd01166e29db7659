"""A loaded model whose blocks lie on several devices, one run of blocks on each, in their order."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq import runtime
from ulbq.errors import ResourceError
from ulbq.models.adapter_files import adapter_folder, attach_adapter
from ulbq.models.blocks import block_list, load_outer, materialize
from ulbq.models.load import load_model, loading_memory, unfilled_model
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import QuantLinear

_FILLED = 0.9
"""Share of a GPU's free memory that weights may take: the rest is for keys, values and activations."""


def load_spread(
    source: ModelSource,
    devices: Sequence[torch.device],
    *,
    dtype: torch.dtype,
    adapter: bool = True,
    prefill_cache: bool = False,
) -> PreTrainedModel:
    """A model on the first of some devices where that has room for it, else on all of them.

    What is no block lies on the first, where inputs and logits are. A block gets its inputs sent to its device.

    Args:
        source: the model.
        devices: one, or GPUs with the CPU behind them or without it.
        dtype, adapter, prefill_cache: as of :func:`~ulbq.models.load.load_model`.

    Raises:
        ResourceError: they have no room for it together.
        InputError: as of :func:`~ulbq.models.load.load_model`.
    """
    first = devices[0]
    if len(devices) == 1 or loading_memory(source, dtype) <= _FILLED * runtime.free_memory(first):
        return load_model(source, dtype=dtype, device=first, adapter=adapter, prefill_cache=prefill_cache)
    model = unfilled_model(source, dtype)
    prefix, blocks = block_list(model)
    sizes = _block_sizes(source, model, prefix)
    load_outer(model, source, None, first)
    for index, (block, place) in enumerate(zip(blocks, block_places(sizes, devices), strict=True)):
        materialize(block, source, None, prefix=f"{prefix}.{index}.", device=devices[place])
        block.register_forward_pre_hook(partial(_bring, devices[place]), with_kwargs=True)
    blocks[-1].register_forward_hook(partial(_bring_back, first))
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.cache = prefill_cache
    folder = adapter_folder(source) if adapter else None
    return model if folder is None else attach_adapter(model, folder)


def room_of(devices: Sequence[torch.device]) -> float:
    """Bytes that :func:`load_spread` may put on some devices."""
    if len(devices) == 1:
        return runtime.free_memory(devices[0])
    return sum((1.0 if device.type == "cpu" else _FILLED) * runtime.free_memory(device) for device in devices)


def block_places(sizes: Sequence[int], devices: Sequence[torch.device]) -> list[int]:
    """Which device each block goes to: GPUs get shares in proportion to their room, the CPU what is left over.

    Args:
        sizes: bytes of each block; everything else is on the first device already, or counts in neither.
        devices: as of :func:`load_spread`.

    Raises:
        ResourceError: there is too little room.
    """
    gpus = [device for device in devices if device.type != "cpu"]
    rooms = [_FILLED * runtime.free_memory(device) for device in gpus]
    on_gpus = min(1.0, sum(rooms) / sum(sizes))
    if on_gpus < 1 and len(gpus) == len(devices):
        raise ResourceError(
            f"The model's blocks take {sum(sizes) / 2**30:.1f} GiB, and the GPUs have room for "
            f"{sum(rooms) / 2**30:.1f}.",
            hint="Take more of them, or put the CPU behind them: `device=cuda:0,cuda:1,cpu`.",
        )
    share = min(1.0, sum(sizes) / (sum(rooms) or 1))
    ends = [share * sum(rooms[: number + 1]) for number in range(len(gpus))]
    # A block lies where its last byte does; shares are rounded.
    places = (next((n for n, end in enumerate(ends) if taken <= end + 1), len(gpus)) for taken in accumulate(sizes))
    return [min(place, len(devices) - 1) for place in places]


def _block_sizes(source: ModelSource, model: PreTrainedModel, prefix: str) -> list[int]:
    """Bytes of each block, packed layers as they are stored."""
    layers = source.quantized.layers if source.quantized else ()
    packed = {f"{layer.name}.weight": sum(layer.bits.values()) // 8 for layer in layers}
    found = []
    for index, block in enumerate(block_list(model)[1]):
        named = block.named_parameters(prefix=f"{prefix}.{index}")
        found.append(sum(packed.get(name, parameter.nbytes) for name, parameter in named))
    return found


def _bring(device: torch.device, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _sent(args, device), _sent(kwargs, device)


def _bring_back(device: torch.device, block: nn.Module, args: Any, output: Any) -> Any:
    return _sent(output, device)


def _sent(value: Any, device: torch.device) -> Any:
    """Tensors, in tuples and dictionaries too, on a device; keys and values that are kept stay with their block."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_sent(one, device) for one in value)
    return {name: _sent(one, device) for name, one in value.items()} if type(value) is dict else value
