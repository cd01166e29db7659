"""Binary weights with a mixture of scales (BinaryMoS, https://arxiv.org/abs/2406.12311), trainable.

``y = ((x ⊙ s_in(x)) · (B + z)ᵀ) ⊙ s_out(x)`` with ``B = sign(latents)``; :mod:`ulbq.formats.binary_mos` has the whole
equation. The start is OneBit's: the best rank-one approximation of ``|W|``, copied to every expert. Zero points per
output or input channel are ULB-SAPR's addition.

Everything that trains is relative to where it started: scales as multiples of themselves, latents as ``W`` over the
starting scales (so that the two levels are −1 and 1), the router in units of its initial range.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from ulbq.errors import NumericsError
from ulbq.formats import AnyScheme, binary_mos
from ulbq.formats.binary_mos import BinaryMosScheme, Mixture
from ulbq.quantizers.base import SCALE_FLOOR, Quantizer

STE_BOUND = 1.0
"""The gradient passes through the sign where a latent is smaller than this: at the levels' own distance from zero."""

_CELL_MARGIN = 1e-3
"""Distance that a negative latent keeps from 0, which counts as positive."""

# Scales lose 2^-11 of themselves in storage and the logits of the gates as much, of which the largest are near 10.
_ROUNDING = 2.0**-6

_SETTLED = 3e-7
"""A unit vector that an iteration changes by no more is as good as float32 has it."""

_LEAST_COST = 1e-6
"""Smallest weight of a column's error, relative to the mean; a layer that was never called has no better measure."""

_LEAST_UNIT = 1e-3
"""Smallest unit of a scale, relative to the mean of its expert; a scale of 0 can leave 0 in steps of this."""


@torch.no_grad()
def rank_one(
    weight: torch.Tensor, importance: torch.Tensor | None = None, *, iterations: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-one approximation of ``|W|``: ``min Σ h_j (|W_ij| − u_i v_j)²``, by power iteration.

    A matrix without negative elements has a first singular value far above the second, so few iterations reach
    float32's precision, where they end; its singular vectors have no negative elements either.

    Args:
        weight: ``[out, in]``.
        importance: ``[in]``, ``h``: non-negative weight of each column's squared error; None for ones.
        iterations: at most.

    Returns:
        ``u`` ``[out]`` and ``v`` ``[in]`` float32 of equal norms: ``√σ₁·u₁`` and ``√σ₁·v₁`` where all ``h`` are 1.
    """
    magnitude = weight.float().abs()
    weighted = magnitude if importance is None else magnitude * _costs(importance).sqrt()
    u = torch.ones_like(weighted[:, 0])
    for _ in range(iterations):
        before, u = u, nn.functional.normalize(weighted @ (weighted.T @ u), dim=0)
        if (u - before).norm() <= _SETTLED:
            break
    # Least squares for v, column by column: the weight of a column does not matter any more.
    v = magnitude.T @ u
    balance = v.norm().sqrt()
    return u * balance, v / balance.clamp_min(SCALE_FLOOR)


@torch.no_grad()
def closed_form_start(
    weight: torch.Tensor,
    scheme: BinaryMosScheme,
    *,
    importance: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    refits: int = 4,
) -> Mixture:
    """Signs, scales, zeros and router before any training.

    Zeros are the least-squares ones: signs to the nearest level and zeros for these signs in turns, which never
    raises the error. The router is that of a fresh ``nn.Linear``, for inputs of unit size.

    Args:
        weight: ``[out, in]``.
        importance: ``[in]`` mean squared input; weighs columns, and gives the size of the inputs.
        generator: of the router, on the CPU.
        refits: turns of signs and zeros.
    """
    weight = weight.float()
    u, v = rank_one(weight, importance)
    cost = torch.ones_like(v) if importance is None else _costs(importance)
    zeros = None
    signs = _sign(weight)
    if scheme.zeros != "none":
        unit = torch.outer(u, v)
        pull, mass = cost * unit, cost * unit.square()
        across = 1 if scheme.zeros == "output" else 0
        total = mass.sum(across).clamp_min(SCALE_FLOOR**2)
        for _ in range(refits):
            zeros = (pull * (weight - unit * signs)).sum(across) / total
            signs = _sign(weight - unit * binary_mos.shift(scheme, torch.zeros_like(unit), zeros))
    router = None
    if scheme.experts > 1:
        size = 1.0 if importance is None else importance.float().mean().sqrt().item()
        drawn = torch.rand(scheme.experts, weight.shape[1], generator=generator).mul_(2).sub_(1)
        router = drawn.to(weight.device) / (math.sqrt(weight.shape[1]) * (size or 1.0))
    copies = (scheme.experts, 1)
    return Mixture(signs, v.repeat(copies), u.repeat(copies), router, zeros)


def _costs(importance: torch.Tensor) -> torch.Tensor:
    """Importance relative to its mean, all of it positive."""
    mean = importance.float().mean()
    return (importance.float() / torch.where(mean > 0, mean, 1.0)).clamp_min(_LEAST_COST)


def _sign(values: torch.Tensor) -> torch.Tensor:
    """−1 and 1; zero counts as positive."""
    return torch.where(values >= 0, 1.0, -1.0)


class _StraightThroughSign(torch.autograd.Function):
    """Signs in ``dtype``; the gradient passes where ``|latent| <`` :data:`STE_BOUND`, and is 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(latents.abs() < STE_BOUND)
        return _sign(latents).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0].float() * inside, None


class BinaryMosQuantizer(Quantizer):
    """One weight matrix under training.

    Args:
        weight: ``[out, in]``, the full-precision weight.
        start: where to begin, as :func:`closed_form_start` or an artifact gives it.
        scheme: the format's parameters.
        train_weights: let the latents move; otherwise the signs stay and only scales, router and zeros train.

    Attributes:
        latents: ``W / (s_out s_inᵀ) − z`` ``[out, in]`` float32, on the side of 0 that the starting sign says; a
            parameter, or a buffer where frozen.
        in_scales, out_scales: ``[e, in]`` and ``[e, out]`` in units of ``in_unit`` and ``out_unit``; start at 1.
        router: ``[e, in]`` in units of ``router_unit``; starts within ±1. None for one expert.
        zeros: ``[out]`` or ``[in]``, or None.
    """

    scheme: BinaryMosScheme
    latents: torch.Tensor
    in_unit: torch.Tensor
    out_unit: torch.Tensor
    router_unit: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, start: Mixture, scheme: BinaryMosScheme, *, train_weights: bool = True
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self._hold(start)
        latents = _latents(weight.float(), start, scheme)
        if train_weights:
            self.latents = nn.Parameter(latents)
        else:
            self.register_buffer("latents", latents)

    def _hold(self, start: Mixture) -> None:
        """Take over everything but the signs."""
        self.register_buffer("in_unit", _units(start.in_scales))
        self.register_buffer("out_unit", _units(start.out_scales))
        self.in_scales = nn.Parameter(start.in_scales / self.in_unit)
        self.out_scales = nn.Parameter(start.out_scales / self.out_unit)
        self.router: nn.Parameter | None = None
        if start.router is not None:
            # The spread of a uniform distribution over ±1 is 1/√3.
            self.register_buffer("router_unit", start.router.square().mean().mul(3).sqrt().clamp_min(SCALE_FLOOR))
            self.router = nn.Parameter(start.router / self.router_unit)
        self.zeros = None if start.zeros is None else nn.Parameter(start.zeros.clone())

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``B + z``, ``[out, in]`` in ``dtype``; differentiable in latents and zeros."""
        exact = dtype if self.zeros is None else torch.float32
        return binary_mos.shift(self.scheme, self._signs(exact), self.zeros).to(dtype)

    def multiply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The mixture's product, differentiable in scales and router too."""
        return binary_mos.apply_mixture(x, matrix, *self._scales(), self._router())

    def dense(self, matrix: torch.Tensor) -> torch.Tensor:
        """The weight at uniform gates, in the dtype of ``matrix``; exact for one expert."""
        return binary_mos.uniform_weight(matrix, *self._scales()).to(matrix.dtype)

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``weights`` (none where frozen), ``scales`` (zeros among them) and ``router``."""
        return {
            "weights": self._weights(),
            "scales": [self.in_scales, self.out_scales] + ([] if self.zeros is None else [self.zeros]),
            "router": [] if self.router is None else [self.router],
        }

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; scales, router and zeros are rounded to float16 only here."""
        return binary_mos.pack(self.scheme, self._signs(torch.float32), *self._scales(), self._router(), self.zeros)

    @torch.no_grad()
    def check_product(self, linear: str, packed: Mapping[str, torch.Tensor], *, size: float = 1.0) -> None:
        """Compare products with random inputs, as :meth:`Quantizer.check_product` says: the router is in no weight."""
        columns = self.in_unit.shape[1]
        x = (size * torch.randn(64, columns, generator=torch.Generator().manual_seed(0))).to(self.in_unit.device)
        trained = self.multiply(x, self())
        stored = binary_mos.multiply(self.scheme, packed, x, binary_mos.matrix(self.scheme, packed, columns))
        difference = ((stored - trained).norm() / trained.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
        if not math.isfinite(difference) or difference > _ROUNDING:
            raise NumericsError(
                f"The packed layer '{linear}' answers otherwise than the trained one, by {difference:.3g} of its size.",
                hint="Lower `router_lr` and `scale_lr`: float16 does not hold what they led to.",
            )

    @classmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says."""
        if not isinstance(scheme, BinaryMosScheme):
            raise TypeError(f"{scheme.format} is not binary_mos")
        start = binary_mos.unpack(scheme, tensors, weight.shape[1])
        return cls(weight, start, scheme, train_weights=train_weights)

    def _signs(self, dtype: torch.dtype) -> torch.Tensor:
        """−1 and 1, ``[out, in]`` in ``dtype``; differentiable in the latents."""
        signs: torch.Tensor = _StraightThroughSign.apply(self.latents, dtype)  # type: ignore[no-untyped-call]
        return signs

    def _weights(self) -> list[nn.Parameter]:
        return [self.latents] if isinstance(self.latents, nn.Parameter) else []

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.in_scales * self.in_unit, self.out_scales * self.out_unit

    def _router(self) -> torch.Tensor | None:
        return None if self.router is None else self.router * self.router_unit


def _units(scales: torch.Tensor) -> torch.Tensor:
    """What a scale is counted in: its own starting size, unless that is next to nothing."""
    least = (_LEAST_UNIT * scales.abs().mean(1, keepdim=True)).clamp_min(SCALE_FLOOR)
    return torch.maximum(scales.abs(), least)


@torch.no_grad()
def _latents(weight: torch.Tensor, start: Mixture, scheme: BinaryMosScheme) -> torch.Tensor:
    """The weight in units of its scales at uniform gates, moved to the nearest point that has the starting sign."""
    outer, inner = (_away_from_zero(scales.mean(0)) for scales in (start.out_scales, start.in_scales))
    latents = weight / outer.unsqueeze(1) / inner
    if start.zeros is not None:
        latents = latents - binary_mos.shift(scheme, torch.zeros_like(latents), start.zeros)
    return torch.where(start.signs > 0, latents.clamp_min(0.0), latents.clamp_max(-_CELL_MARGIN))


def _away_from_zero(scales: torch.Tensor) -> torch.Tensor:
    """A vector to divide by."""
    return _sign(scales) * _units(scales.unsqueeze(0)).squeeze(0)
