"""Uniform affine codes with learnable clipping (ApiQ, ULB-SAPR, OmniQuant's LWC), trainable.

A group's grid spans from a lower to an upper *clip end*: ``s = (hi − lo) / (2^b − 1)``, ``z = round(−lo / s)``,
``q = clamp(round(W / s) + z, 0, 2^b − 1)``, ``Ŵ = s (q − z)``. Asymmetric grids train both ends, symmetric ones their
scale; a symmetric grid that reaches further to the positive side has a negative step.

The published parametrization keeps the ends as ``σ(u) · max`` and ``σ(l) · min`` of the group with u = l = 4 at the
start. Here the ends are kept in *grid steps* of a searched start, which leaves them free on both sides and makes one
rate mean the same for all groups, and the gradient passes straight through the rounding of ``z``: a weight that is
clipped pulls at the end that clips it, and at nothing else.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from ulbq.formats import AnyScheme, affine
from ulbq.formats.affine import AffineScheme
from ulbq.quantizers.base import CELL_MARGIN, SCALE_FLOOR, Quantizer

_LEAST_SPAN = 1e-3
"""Smallest scale relative to the start; training that drives a scale to 0 stops there."""


class _FakeQuantize(torch.autograd.Function):
    """Dequantized weight from latents, scales and zero points in grid steps, straight-through on the rounding.

    Gradients: to the latent the incoming one inside the range, 0 outside; to the scale ``q − u`` inside, where
    ``u = w / s + z``, and ``q − z`` outside; to the zero point ``−s`` outside, 0 inside.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        step: torch.Tensor,
        top: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        scale, zero = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        position = torch.addcmul(zero, latent, scale.reciprocal())
        inside = (position > -0.5) & (position < top + 0.5)
        codes = position.round().clamp_(0, top)
        slope = torch.where(inside, codes - position, codes - zero)
        ctx.save_for_backward(slope, inside, scale, step)
        return ((codes - zero) * (scale * step)).flatten(1).to(dtype)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None, None, None]:
        slope, inside, scale, step = ctx.saved_tensors
        gradient = gradients[0].float().view(slope.shape) * step
        to_latent = gradient * inside
        to_scales = (gradient * slope).sum(-1)
        to_zeros = None
        if ctx.needs_input_grad[2]:
            to_zeros = (to_latent.sum(-1) - gradient.sum(-1)) * scale.squeeze(-1)
        return to_latent if ctx.needs_input_grad[0] else None, to_scales, to_zeros, None, None, None


class AffineQuantizer(Quantizer):
    """One weight matrix under training.

    Args:
        weight: ``[out, in]``, the full-precision weight.
        scales: ``[out, G]`` starting scales, as :func:`ulbq.solvers.rtn.round_to_nearest` gives them; negative where a
            symmetric grid is mirrored.
        zeros: ``[out, G]`` starting zero points; not looked at where the scheme is symmetric.
        scheme: the format's parameters.
        train_weights: let the weights move too; otherwise only the clip ends train (LWC as published).

    Attributes:
        latents: the weight in grid steps, ``[out, G, g]`` float32; a parameter, or a buffer where frozen.
        ends: ``[2, out, G]`` lower and upper end in grid steps, where asymmetric; starts at ``(−z, 2^b − 1 − z)``.
        scales: ``[out, G]`` scale in grid steps, where symmetric; starts at 1.
        step: signed starting scale of each group, ``[out, G, 1]``.
    """

    latents: torch.Tensor
    step: torch.Tensor
    scheme: AffineScheme

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        scheme: AffineScheme,
        *,
        train_weights: bool = True,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self._top = 2**scheme.bits - 1
        step = torch.where(scales < 0, -1.0, 1.0) * scales.float().abs().clamp_min(SCALE_FLOOR)
        self.register_buffer("step", step.unsqueeze(-1))
        latents = weight.float().unflatten(1, (scales.shape[1], -1)) / self.step
        if train_weights:
            self.latents = nn.Parameter(latents)
        else:
            self.register_buffer("latents", latents)
        if scheme.symmetric:
            self.scales = nn.Parameter(torch.ones_like(step))
        else:
            self.ends = nn.Parameter(torch.stack([-zeros, self._top - zeros]).float())

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` in ``dtype``, differentiable in latents and clip ends."""
        scales, zeros = self._grid()
        weight: torch.Tensor = _FakeQuantize.apply(self.latents, scales, zeros, self.step, self._top, dtype)  # type: ignore[no-untyped-call]
        return weight

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``weights`` (none where frozen) and ``scales``."""
        latents = [self.latents] if isinstance(self.latents, nn.Parameter) else []
        return {"weights": latents, "scales": [self.scales if self.scheme.symmetric else self.ends]}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; scales are rounded to float16 only here."""
        scales, zeros = self._grid()
        position = torch.addcmul(zeros.unsqueeze(-1), self.latents, scales.unsqueeze(-1).reciprocal())
        codes = position.round_().clamp_(0, self._top).flatten(1).to(torch.uint8)
        stored = None if self.scheme.symmetric else zeros
        return affine.pack(self.scheme, codes, scales * self.step.squeeze(-1), stored)

    @classmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says."""
        if not isinstance(scheme, AffineScheme):
            raise TypeError(f"{scheme.format} is not affine")
        codes, scales, zeros = affine.unpack(scheme, tensors, weight.shape[1])
        made = cls(weight, scales, zeros, scheme, train_weights=train_weights)
        grouped = codes.view(made.latents.shape).float()
        steps = grouped - zeros.unsqueeze(-1)
        reach = 0.5 - CELL_MARGIN
        low = torch.where(grouped == 0, -torch.inf, steps - reach)
        high = torch.where(grouped == made._top, torch.inf, steps + reach)
        with torch.no_grad():
            made.latents.copy_(made.latents.clamp(low, high))
        return made

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points ``[out, G]`` in grid steps."""
        if self.scheme.symmetric:
            scales = self.scales.clamp_min(_LEAST_SPAN)
            return scales, torch.full_like(scales, self.scheme.centre)
        low, high = self.ends
        scales = ((high - low) / self._top).clamp_min(_LEAST_SPAN)
        exact = -low / scales
        rounded = exact + (exact.round() - exact).detach()
        return scales, rounded.clamp(0, self._top)
