"""Flexible dual binarization (DB-LLM, https://arxiv.org/abs/2402.11960), trainable.

``Ŵ = α₁b₁ + α₂b₂`` with ``b₁ = H(w − (α₁+α₂)/2)`` and ``b₂ = H(−(w − α₁b₁ − α₂/2))``: nearest rounding to the levels
``α₂ < 0 < α₁ + α₂ < α₁`` (mirrored where ``α₁ < 0``).

Everything that trains is kept in *grid steps*: the weight as ``w / s`` and the scales as ``α / s``, where ``s`` is the
group's signed starting step. One learning rate then means the same fraction of a step in every group, whatever its
scale; a fixed absolute rate moves no 2-bit weight across a threshold in a few dozen steps.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from ulbq.formats import AnyScheme, dual_binary
from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.kernels import fake_quantize, solvers
from ulbq.quantizers.base import CELL_MARGIN, SCALE_FLOOR, Quantizer


def search_scales(
    weight: torch.Tensor, importance: torch.Tensor, group_size: int, *, candidates: int = 8, refits: int = 4
) -> torch.Tensor:
    """Scales of every group by weighted least squares: a search over step and orientation, then alternating fits.

    Every candidate step ``s`` (a fraction of the largest magnitude, both signs) gives ``α = (2s, −s)``; the best one
    is refined by Lloyd's alternation: assign each weight its nearest level, solve the 2 × 2 normal equations for α.
    A fit that makes a group worse is not taken, so the error never rises. On a CPU with a compiler all of it is one
    compiled pass (:mod:`ulbq.kernels.solvers`).

    Args:
        weight: ``[out, in]`` float32.
        importance: ``[in]``, non-negative weight of each column's squared error (the mean squared input).
        group_size: columns in a group; divides ``in``.

    Returns:
        ``[2, out, G]`` float32: ``α₁`` and ``α₂``.
    """
    fractions = torch.linspace(0.12, 0.6, candidates)
    if solvers.take(weight, importance):
        return solvers.search_scales(
            weight, importance, group_size, floor=SCALE_FLOOR, fractions=fractions, refits=refits
        )
    grouped = weight.unflatten(1, (-1, group_size))
    cost = importance.unflatten(0, (-1, group_size)).expand_as(grouped)
    return _search_with_torch(grouped, cost, fractions.tolist(), refits)


def _search_with_torch(grouped: torch.Tensor, cost: torch.Tensor, fractions: list[float], refits: int) -> torch.Tensor:
    """The same for ``[out, G, g]`` weights and the costs of their errors, on any device."""
    largest = grouped.abs().amax(-1).clamp_min(SCALE_FLOOR)
    best = torch.full_like(largest, torch.inf)
    scales = torch.stack([largest, -largest / 2])
    for fraction in fractions:
        for sign in (1.0, -1.0):
            step = sign * fraction * largest
            scales, best = _keep_better(grouped, cost, torch.stack([2 * step, -step]), scales, best)
    for _ in range(refits):
        scales, best = _keep_better(grouped, cost, _refit(grouped, cost, scales), scales, best)
    return scales


def _keep_better(
    grouped: torch.Tensor, cost: torch.Tensor, trial: torch.Tensor, scales: torch.Tensor, best: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    error = ((nearest(grouped, trial) - grouped).square_() * cost).sum(-1)
    better = error < best
    return torch.where(better, trial, scales), torch.where(better, error, best)


def _planes(grouped: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boolean planes of ``[out, G, g]`` weights for scales with ``α₂ < 0 < α₁``."""
    first, second = scales.unsqueeze(-1)
    upper = grouped > (first + second) / 2
    lower = grouped < torch.addcmul(second / 2, upper, first)
    return upper, lower


def _oriented_planes(grouped: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for either orientation: where ``α₁ < 0`` weights and levels are mirrored together."""
    sign = torch.where(scales[0] < 0, -1.0, 1.0)
    return _planes(grouped * sign.unsqueeze(-1), scales * sign)


def nearest(grouped: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[out, G, g]`` weights rounded to the nearest of the four levels of scales ``[2, out, G]``."""
    upper, lower = _oriented_planes(grouped, scales)
    first, second = scales.unsqueeze(-1)
    return torch.addcmul(upper * first, lower, second)


def _refit(grouped: torch.Tensor, cost: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weighted least squares for α with the planes fixed; the old α where the system is singular."""
    upper, lower = (plane.float() for plane in _oriented_planes(grouped, scales))
    a = (cost * upper).sum(-1)
    b = (cost * upper * lower).sum(-1)
    d = (cost * lower).sum(-1)
    x = (cost * upper * grouped).sum(-1)
    y = (cost * lower * grouped).sum(-1)
    determinant = a * d - b * b
    safe = determinant > 1e-6 * (a * d).clamp_min(1e-30)
    fitted: torch.Tensor = torch.stack([d * x - b * y, a * y - b * x]) / torch.where(safe, determinant, 1.0)
    # Nearest rounding needs α₂ opposite to α₁ and smaller; other solutions would change what the planes mean.
    ordered = (fitted[0] * fitted[1] < 0) & (fitted[1].abs() < fitted[0].abs())
    return torch.where(safe & ordered, fitted, scales)


class _FakeQuantizePlanes(torch.autograd.Function):
    """Dequantized weight from the weight and scales in grid steps, with the straight-through estimator on H.

    Gradients: to the weight the incoming one inside the range that the levels cover (half a step beyond both ends
    included), 0 outside; to ``α₁`` and ``α₂`` the sums of the incoming gradient over the ones of their plane.
    """

    @staticmethod
    def forward(
        ctx: Any, latent: torch.Tensor, scales: torch.Tensor, step: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(latent, scales, step)
        if fake_quantize.takes(latent, dtype):
            return fake_quantize.dual_binary(latent, scales, step, dtype)
        upper, lower = _planes(latent, scales)
        first, second = scales.unsqueeze(-1)
        return torch.addcmul(upper * (first * step), lower, second * step).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        latent, scales, step = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        if fake_quantize.takes(latent, gradients[0].dtype):
            found = fake_quantize.dual_binary_back(latent, scales, step, gradients[0], to_latents=wanted)
            return *found, None, None
        upper, lower = _planes(latent, scales)
        gradient = gradients[0].float().view(upper.shape) * step
        to_scales = torch.stack([(gradient * upper).sum(-1), (gradient * lower).sum(-1)])
        if not wanted:
            return None, to_scales, None, None
        first, second = scales.unsqueeze(-1)
        inside = (latent > 1.5 * second) & (latent < first - second / 2)
        return gradient * inside, to_scales, None, None


class DualBinaryQuantizer(Quantizer):
    """One weight matrix under training.

    Args:
        weight: ``[out, in]``, the full-precision weight.
        scales: ``[2, out, G]`` starting scales, as :func:`search_scales` gives them.
        scheme: the format's parameters.
        train_weights: let the weights move too (DB-LLM's quantization-aware training); otherwise only α trains.

    Attributes:
        latents: the weight in grid steps, ``[out, G, g]`` float32; a parameter, or a buffer where frozen.
        scales: ``α / step``, ``[2, out, G]`` float32; starts near ``(2, −1)``.
        step: signed starting step of each group, ``[out, G, 1]``; negative where the levels are mirrored.
    """

    latents: torch.Tensor
    step: torch.Tensor
    scheme: DualBinaryScheme

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, scheme: DualBinaryScheme, *, train_weights: bool = True
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.shape = (weight.shape[0], weight.shape[1])
        step = torch.where(scales[0] < 0, -1.0, 1.0) * scales[1].abs().clamp_min(SCALE_FLOOR)
        self.register_buffer("step", step.unsqueeze(-1))
        latents = weight.float().unflatten(1, (scales.shape[2], -1)) / self.step
        if train_weights:
            self.latents = nn.Parameter(latents)
        else:
            self.register_buffer("latents", latents)
        self.scales = nn.Parameter(scales / step)

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` in ``dtype``, differentiable in the latents and the scales."""
        weight: torch.Tensor = _FakeQuantizePlanes.apply(self.latents, self.scales, self.step, dtype)  # type: ignore[no-untyped-call]
        return weight

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``weights`` (none where frozen) and ``scales``."""
        latents = [self.latents] if isinstance(self.latents, nn.Parameter) else []
        return {"weights": latents, "scales": [self.scales]}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; scales are rounded to float16 only here."""
        upper, lower = _planes(self.latents, self.scales)
        planes = torch.stack([upper, lower]).flatten(2)
        return dual_binary.pack(self.scheme, planes, self.scales * self.step.squeeze(-1))

    @classmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says."""
        if not isinstance(scheme, DualBinaryScheme):
            raise TypeError(f"{scheme.format} is not dual-binary")
        planes, scales = dual_binary.unpack(scheme, tensors, weight.shape[1])
        made = cls(weight, scales, scheme, train_weights=train_weights)
        upper, lower = (plane.view(made.latents.shape).bool() for plane in planes)
        first, second = made.scales.detach().unsqueeze(-1)
        # The borders between the four levels α₂ < 0 < α₁ + α₂ < α₁, from below.
        bottom, middle, top = second / 2, (first + second) / 2, first + second / 2
        low = torch.where(upper, torch.where(lower, middle, top), torch.where(lower, -torch.inf, bottom))
        high = torch.where(upper, torch.where(lower, top, torch.inf), torch.where(lower, bottom, middle))
        with torch.no_grad():
            made.latents.copy_(made.latents.clamp(low + CELL_MARGIN, high - CELL_MARGIN))
        return made
