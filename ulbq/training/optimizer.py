"""What block-wise and end-to-end training share: parameters by role, the optimizer, the schedule, snapshots."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ulbq.training.linear import TrainedLinear
from ulbq.training.settings import TrainSettings


@dataclass(frozen=True)
class Group:
    """Parameters that train at one rate."""

    parameters: list[nn.Parameter]
    rate: float
    decay: float


def parameters_by_role(module: nn.Module, layers: Iterable[TrainedLinear]) -> dict[str, list[nn.Parameter]]:
    """Parameters by role; everything is frozen meanwhile. Vectors beside the linear layers are norms.

    Args:
        module: a block, or the list of all blocks.
        layers: its trained linear layers.
    """
    module.requires_grad_(False)
    roles: dict[str, list[nn.Parameter]] = {}
    owned: set[nn.Parameter] = set()
    for layer in layers:
        for role, parameters in layer.trainable().items():
            roles.setdefault(role, []).extend(parameters)
        owned.update(layer.parameters())
    roles["norms"] = [p for p in module.parameters() if p not in owned and p.dim() == 1]
    return roles


def make_optimizer(groups: Sequence[Group], rate: float = 1.0) -> torch.optim.AdamW:
    """AdamW over groups, their rates multiplied by ``rate``."""
    scaled = [{"params": g.parameters, "lr": rate * g.rate, "weight_decay": g.decay} for g in groups]
    return torch.optim.AdamW(scaled, fused=True)


def rate_factor(settings: TrainSettings, steps: int) -> Callable[[int], float]:
    """The schedule: from the number of steps that were made to the factor of the rates of the next one."""
    warmup = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup)
        if settings.schedule == "constant":
            return rising
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return rising * (settings.final_rate + (1 - settings.final_rate) * cosine)

    return factor


def snapshot(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Copies of the parameters' values."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Put values back, and drop what gradients are left."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
        parameter.grad = None
