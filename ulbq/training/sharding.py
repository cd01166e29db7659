"""Blocks that are sharded over the processes of a run, by FSDP2: a process has all of a block while that runs.

FSDP gathers parameters and no buffers. So codes, and whatever else lies packed, become parameters without a gradient,
in the dtype that they have; FSDP sends mixed dtypes as bytes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from ulbq import distributed
from ulbq.nn.quant_linear import QuantLinear
from ulbq.quantizers.base import Quantizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard


def is_sharded(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether :func:`shard` was called for a module."""
    if distributed.size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def shard(block: nn.Module, device: torch.device) -> None:
    """Leave this process its part of every tensor of a block that is whole on a device; all processes take part."""
    from torch.distributed.fsdp import fully_shard

    for module in block.modules():
        if isinstance(module, QuantLinear | Quantizer):
            _gatherable(module)
    parts = fully_shard(block, mesh=_mesh(device), reshard_after_forward=True, shard_placement_fn=_placement)
    parts.set_gradient_divide_factor(1.0)
    # Gloo knows sums alone.
    parts.set_force_sum_reduction_for_comms(True)
    # Of a mixture an expert may have been called in some processes and not in others.
    parts.set_reduce_scatter_unused_params(True)


def join(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Have sharded blocks share streams and buffers: called once, when all of a model's are sharded."""
    from torch.distributed.fsdp import fully_shard

    root = _Root(blocks)
    fully_shard(root, mesh=_mesh(device))
    root()


class _Root(nn.Module):
    """FSDP finds out which blocks belong together when a module is called that has them below it.

    The model is none: its head runs a chunk of positions at a time, forth and back, while the blocks stand still.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self) -> None:
        """Nothing."""


@contextmanager
def gathered(block: nn.Module) -> Iterator[None]:
    """While it lasts, all processes have all of a sharded block. What is written to it is lost."""
    if not is_sharded(block):
        yield
        return
    block.unshard()
    try:
        yield
    finally:
        block.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; all processes take part."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor in the first process's memory, and nothing in that of the others; any other as it is."""
    found = whole(tensor)
    return found if found is tensor else found.cpu() if distributed.is_main() else found.new_empty(0)


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole value on a parameter's device; beside a sharded one this process's part of it."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        raise TypeError("no part of a tensor")
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def clip_parts(parameters: Sequence[nn.Parameter], largest: float) -> torch.Tensor:
    """As torch's ``clip_grad_norm_``, for sharded parameters and stretches of whole ones.

    Scales their gradients, and returns the norm of all.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
    norm = nn.utils.get_total_norm(parts).to(parameters[0].device).double().square()
    distributed.sum_(norm)
    norm = norm.sqrt_()
    if parts and math.isfinite(largest):
        torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp_max(1.0).to(parts[0].dtype))
    return norm


class Gradients:
    """Which parameters of sharded blocks got a gradient in any process: FSDP makes zeros of what got none.

    An optimizer moves a parameter by what it remembers where the gradient is zero, and lets it be where there is none.

    Args:
        blocks: sharded.
        parameters: those that train.
    """

    def __init__(self, blocks: Iterable[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._known = torch.zeros(len(parameters))
        places = {parameter: place for place, parameter in enumerate(parameters)}
        for block in blocks:
            parts = list(block.parameters())
            with gathered(block):
                for part, full in zip(parts, block.parameters(), strict=True):
                    if part in places:
                        full.register_post_accumulate_grad_hook(partial(self._note, places[part]))

    def _note(self, place: int, parameter: torch.Tensor) -> None:
        self._known[place] = 1

    def settle(self) -> None:
        """Drop the gradients of parameters that got none since the last call."""
        distributed.sum_(self._known)
        for parameter, known in zip(self._parameters, self._known.tolist(), strict=True):
            if not known:
                parameter.grad = None
        self._known.zero_()


def _gatherable(module: nn.Module) -> None:
    """Make parameters of a layer's own buffers, but for those with less than a value for each process."""
    for name, tensor in list(module.named_buffers(recurse=False)):
        if tensor.dim() and tensor.numel() >= distributed.size():
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))


def _placement(parameter: nn.Parameter) -> "Shard":
    """The first dimension that divides evenly: of codes there are fewer planes than there may be processes."""
    from torch.distributed.tensor import Shard

    even = (dim for dim, size in enumerate(parameter.shape) if size and size % distributed.size() == 0)
    return Shard(next(even, 0))


def _mesh(device: torch.device) -> "DeviceMesh":
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (distributed.size(),))
