"""What a block does between its products, by compiled kernels while it runs or trains on a CPU.

Nothing is known of architectures: a norm is taken over whose answer to random numbers is that of the kernel's formula,
and so are gated layers, and functions that rotate queries and keys. What they give differs by rounding alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ulbq.kernels import between
from ulbq.models.watch import watching
from ulbq.quantizers.base import remember_cast
from ulbq.training.precision import Precision
from ulbq.training.sharding import gathered

_ROTATION = "apply_rotary_pos_emb"
_WIDTH = 8
_LIKE_THIS = 1e-4
"""Largest distance of two answers, relative to their norm, that is rounding; another activation is further away."""

# What a module or function raises that takes something else than its names promise.
_TAKES_ELSE = (TypeError, RuntimeError, ValueError, IndexError, AttributeError)


class FusedParts:
    """The parts of a block, or of several, that kernels take over; none on other devices, or where nothing is compiled.

    Args:
        block: the block, or a list of them; its layers are called to see what they do.
        precision: device and dtype.
    """

    def __init__(self, block: nn.Module, precision: Precision) -> None:
        self._norms: list[nn.Module] = []
        self._gates: list[nn.Module] = []
        self._modules: list[ModuleType] = []
        if not between.takes(torch.empty(0, device=precision.device)):
            return
        defined: set[ModuleType] = set()
        for part in block if isinstance(block, nn.ModuleList) else (block,):
            modules = list(part.modules())
            defined |= {sys.modules[type(module).__module__] for module in modules}
            with gathered(part):
                self._norms += [module for module in modules if _is_rms_norm(module)]
                self._gates += [module for module in modules if _is_gated(module)]
        self._modules = [one for one in defined if _rotates(getattr(one, _ROTATION, None))]

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts, the block computes so."""
        with ExitStack() as stack:
            for norm in self._norms:
                _replace(stack, norm, "forward", partial(_norm, norm, _epsilon(norm) or 0.0, norm.forward))
            for gate in self._gates:
                _replace(stack, gate, "forward", partial(_gated, gate))
            for module in self._modules:
                _replace(stack, module, _ROTATION, partial(_rotate, getattr(module, _ROTATION)))
            yield


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack unwinds, as it was before then."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    if before is missing:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)


def _epsilon(norm: nn.Module) -> float | None:
    """ε of a root mean square norm; None where a module has none."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is ``weight · x / √(mean(x²) + ε)``."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if epsilon is None or not isinstance(weight, nn.Parameter) or len(list(module.parameters())) > 1:
        return False
    if weight.dim() != 1 or weight.dtype != torch.float32:
        return False
    # Not around zero: whoever subtracts the mean gives something else.
    x = 1 + torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0))
    wanted = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    try:
        return _alike(module(x), wanted)
    except _TAKES_ELSE:
        return False


def _alike(found: object, wanted: torch.Tensor) -> bool:
    """Whether an answer is the one that is wanted; nothing is known from an answer of zero."""
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape or not wanted.any():
        return False
    return bool((found - wanted).norm() <= _LIKE_THIS * wanted.norm())


def _norm(
    norm: nn.Module, epsilon: float, plain: Callable[..., torch.Tensor], x: torch.Tensor, *gate: Any, **more: Any
) -> torch.Tensor:
    if x.dtype != torch.float32 or gate or more:  # norms of Mamba-2 take a gate besides
        return plain(x, *gate, **more)
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    whole, rounded = between.rms_norm(x.contiguous(), norm.get_parameter("weight"), epsilon, half=half)
    if half:
        remember_cast(whole, rounded)
    return whole


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Whether a module is ``down(silu(gate(x)) · up(x))``, by calls of its layers and not of their weights."""
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not (isinstance(gate, nn.Module) and isinstance(up, nn.Module) and isinstance(down, nn.Module)):
        return False
    columns = getattr(gate, "in_features", None)
    if not isinstance(columns, int):
        return False
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    try:
        # Near zero all activations are alike: what the gate says has to be of the size of one.
        x = x / gate(x).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        wanted = down(nn.functional.silu(gate(x)) * up(x))
        called: set[str] = set()
        with watching({"gate": gate, "up": up, "down": down}, lambda name, _: called.add(name)):
            found = module(x)
    except _TAKES_ELSE:
        return False
    return len(called) == 3 and _alike(found, wanted)


def _gated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.get_submodule("gate_proj")(x), module.get_submodule("up_proj")(x)
    product: torch.Tensor = module.get_submodule("down_proj")(between.gated(gate, up))
    return product


@cache
def _rotates(function: Any) -> bool:
    """Whether a function rotates queries and keys by their halves."""
    if function is None:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 3, _WIDTH, generator=generator) for heads in (4, 2))
    cosines, sines = torch.randn(2, 1, 3, _WIDTH, generator=generator)
    try:
        found = function(query, key, cosines, sines)
    except _TAKES_ELSE:
        return False
    wanted = [
        x * cosines + torch.cat([-x[..., _WIDTH // 2 :], x[..., : _WIDTH // 2]], -1) * sines for x in (query, key)
    ]
    return len(found) == 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def _rotate(
    plain: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    query: torch.Tensor,
    key: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    *more: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    fits = not more and not named and cosines.dim() == 3 and cosines.shape[-1] == query.shape[-1]
    exact = cosines.dtype == sines.dtype == torch.float32 and not cosines.requires_grad
    if not (fits and exact and query.stride(-1) == key.stride(-1) == 1 and between.takes(query) and between.takes(key)):
        return plain(query, key, cosines, sines, *more, **named)
    # Products take no other type afterwards, where autocast is on.
    on = torch.is_autocast_enabled("cpu")
    given = (cosines.contiguous(), sines.contiguous())
    rotated = [between.rotate(x, *given, torch.get_autocast_dtype("cpu") if on else x.dtype) for x in (query, key)]
    return rotated[0], rotated[1]
