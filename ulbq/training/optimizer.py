"""What the training of a block and of a whole model share: parameters by role, optimizer, schedules, snapshots."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ulbq import runtime
from ulbq.config.finetuning import FinetuneSettings
from ulbq.config.training import TrainSettings
from ulbq.training.linear import TrainedLinear

_AT_ONCE = 1 << 20
"""Values that are updated at a time: the float32 of their moments is all that is made of them."""
_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's AdamW

_AMPLE = 7  # a second copy, gradients and both moments still follow
"""Free memory of a GPU, in sizes of what trains, at which a copy of that may lie there too."""


@dataclass(frozen=True)
class Group:
    """Parameters that train at one learning rate."""

    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float


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


class SignDescent(torch.optim.Optimizer):
    """Every value moves by its rate against its gradient's sign; no state, as AutoRound trains roundings.

    Args:
        groups: with ``params``, ``lr`` and ``weight_decay``, the latter decoupled as AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            for parameter in found:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


class HalfAdamW(torch.optim.Optimizer):
    """AdamW with both moments stored in bfloat16: half their memory, at the same arithmetic in float32.

    They are rounded up or down by chance, so that they are right on average (https://arxiv.org/abs/2010.06192). To the
    nearest the second moment would stand still: a step moves it by a thousandth, and bfloat16 has eight bits. Equal
    gradients give equal values in every process and every run.

    Args:
        groups: with ``params``, ``lr`` and ``weight_decay``, the latter decoupled.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self._chance: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["moments"] = [torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in _BETAS]
                state["step"] += 1
                rows = max(1, _AT_ONCE * len(parameter) // parameter.numel())
                parts = zip(*(x.split(rows) for x in (parameter, parameter.grad, *state["moments"])), strict=True)
                for values, gradient, first, second in parts:
                    self._update(values, gradient, first, second, group, state["step"])

    def _update(
        self,
        values: torch.Tensor,
        gradient: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        group: dict[str, Any],
        step: int,
    ) -> None:
        mean = first.float().lerp_(gradient, 1 - _BETAS[0])
        square = second.float().mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        for stored, moment in ((first, mean), (second, square)):
            stored.copy_(self._by_chance(moment))
        values.mul_(1 - group["lr"] * group["weight_decay"])
        size = square.sqrt_().div_(math.sqrt(1 - _BETAS[1] ** step)).add_(_EPS)
        values.addcdiv_(mean, size, value=-group["lr"] / (1 - _BETAS[0] ** step))

    def _by_chance(self, values: torch.Tensor) -> torch.Tensor:
        """Float32 values that bfloat16 has, each one of the two next to it, the nearer the likelier."""
        device = values.device
        if device not in self._chance:
            self._chance[device] = torch.Generator(device).manual_seed(0)
        drawn = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=device, generator=self._chance[device])
        return drawn.add_(values.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32)


def make_optimizer(groups: Sequence[Group], factor: float = 1.0) -> torch.optim.AdamW:
    """AdamW over groups, their learning rates times ``factor``."""
    return torch.optim.AdamW(_scaled(groups, factor), fused=True)


def sign_descent(groups: Sequence[Group], factor: float = 1.0) -> SignDescent:
    """Descent by signs over groups, their learning rates times ``factor``."""
    return SignDescent(_scaled(groups, factor))


def half_adamw(groups: Sequence[Group], factor: float = 1.0) -> HalfAdamW:
    """AdamW with moments in bfloat16 over groups, their learning rates times ``factor``."""
    return HalfAdamW(_scaled(groups, factor))


def _scaled(groups: Sequence[Group], factor: float) -> list[dict[str, Any]]:
    return [{"params": g.parameters, "lr": factor * g.lr, "weight_decay": g.weight_decay} for g in groups]


def lr_factor(settings: TrainSettings | FinetuneSettings, steps: int) -> Callable[[int], float]:
    """The schedule: from the number of steps that were made to the factor of the rates of the next one."""
    warmup = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup)
        if settings.schedule == "constant":
            return rising
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return rising * (settings.final_lr_factor + (1 - settings.final_lr_factor) * cosine)

    return factor


def task_lr_factor(settings: FinetuneSettings, steps: int) -> Callable[[int], float]:
    """The schedule of tasks, which is transformers': rates rise from 0, and fall to 0 over what is left then."""
    # Never all of a run: the first of these steps has a rate of 0, and a run of one would learn nothing.
    warmup = min(math.ceil(settings.warmup * steps), steps - 1)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        share = (step - warmup) / (steps - warmup)
        falling = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}
        return falling[settings.schedule]

    return factor


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> None:
    """Scale gradients down to a norm of ``largest`` over all of them; what is not finite spreads to all."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # To ask a GPU would wait for it; elsewhere a pass over all gradients is saved, which mostly are small enough.
    if norm.device.type != "cpu" or not norm.item() < largest - 1e-5:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def snapshot(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Copies of the parameters' values, in the process's memory where a GPU has little room left."""
    size = sum(p.nbytes for p in parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "cuda" and runtime.free_memory(device) < _AMPLE * size:
        return [p.detach().cpu() for p in parameters]
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Put values back, and drop what gradients are left."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
        parameter.grad = None
