"""Uniform affine codes with learnable clipping (ApiQ, ULB-SAPR, OmniQuant's LWC), trainable.

A group's grid spans from a lower to an upper *clip end*: ``s = (hi − lo) / (2^b − 1)``, ``z = round(−lo / s)``,
``q = clamp(round(W / s) + z, 0, 2^b − 1)``, ``Ŵ = s (q − z)``. Asymmetric grids train both ends, symmetric ones their
scale; a symmetric grid that reaches further to the positive side has a negative step.

The published parametrization keeps the ends as ``σ(u) · max`` and ``σ(l) · min`` of the group with u = l = 4 at the
start. Here the ends are kept in *grid steps* of a searched start, which leaves them free on both sides and makes one
rate mean the same for all groups, and the gradient passes straight through the rounding of ``z``: a weight that is
clipped pulls at the end that clips it, and at nothing else.

:class:`AffineForm` has the other ways: scales and zero points themselves (EfficientQAT), weights that move no further
than a step (trained rounding), rates in the weight's own unit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn

from ulbq.formats import AffineScheme, AnyScheme, UniformScheme, affine
from ulbq.kernels import fake_quantize
from ulbq.quantizers.base import CELL_MARGIN, SCALE_FLOOR, Quantizer

_LEAST_SPAN = 1e-3
"""Smallest scale relative to the start; training that drives a scale to 0 stops there."""


class _FakeQuantize(torch.autograd.Function):
    """Dequantized weight from latents, scales and zero points in grid steps, straight-through on the rounding.

    Gradients: to the latent the incoming one inside the range, 0 outside; to the scale ``q − u`` inside, where
    ``u = w / s + z``, and ``q − z`` outside; to the zero point ``−s`` outside, 0 inside.

    Nothing but its inputs is kept for the way back: to round again costs less than to write and read what came of it.
    On a CPU comparisons and whatever takes their truth values are several times slower than arithmetic, hence no masks.
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
        ctx.save_for_backward(latent, scales, zeros, step)
        ctx.top = top
        if fake_quantize.takes(latent, dtype):
            return fake_quantize.affine(latent, scales, zeros, step, top, dtype)
        zero = zeros.unsqueeze(-1)
        levels = _rounded(latent, scales, zeros).clamp_(0, top).sub_(zero)
        return levels.mul_(scales.unsqueeze(-1) * step).flatten(1).to(dtype)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None, None, None]:
        latent, scales, zeros, step = ctx.saved_tensors
        wanted, zeros_wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if fake_quantize.takes(latent, gradients[0].dtype):
            found = fake_quantize.affine_back(
                latent, scales, zeros, step, ctx.top, gradients[0], to_latents=wanted, to_zeros=zeros_wanted
            )
            return *found, None, None, None
        codes = _rounded(latent, scales, zeros)
        levels = codes.clamp(0, ctx.top)
        outside = codes.sub_(levels).abs_().clamp_max_(1)
        levels.sub_(zeros.unsqueeze(-1))
        gradient = torch.empty_like(latent).copy_(gradients[0].view(latent.shape)).mul_(step)
        to_scales = levels.mul_(gradient).sum(-1)
        to_latent = gradient.sub_(outside.mul_(gradient))
        # Inside, q − u is q − z less w / s, and outside nothing is left of the gradient to the latent.
        to_scales -= torch.mul(to_latent, latent, out=levels).sum(-1) / scales
        to_zeros = -outside.sum(-1) * scales if zeros_wanted else None
        return to_latent if wanted else None, to_scales, to_zeros, None, None, None


def _rounded(latent: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Codes ``[out, G, g]`` that may lie beyond the range. One fused call would be slower: it broadcasts badly."""
    return (latent * scales.reciprocal().unsqueeze(-1)).add_(zeros.unsqueeze(-1)).round_()


@dataclass(frozen=True)
class AffineForm:
    """What of a grid trains, and in which terms.

    Attributes:
        grid: ``ends`` trains both clip ends, ``scales`` scales and zero points (float, rounded straight-through),
            ``fixed`` neither.
        reach: grid steps, of the start's, that a weight may move to either side; None for any number. With one half it
            can be rounded up or down and no further. Where it starts beyond its reach, that far it may go.
        unit: what a rate of 1 stands for: the group's starting grid ``step``, or 1 in the unit of the ``weight``, as
            published. Zero points are counted in codes in either.
    """

    grid: Literal["ends", "scales", "fixed"] = "ends"
    reach: float | None = None
    unit: Literal["step", "weight"] = "step"


_CLIP_ENDS = AffineForm()


class AffineQuantizer(Quantizer):
    """One weight matrix under training.

    Args:
        weight: ``[out, in]``, the full-precision weight.
        scales: ``[out, G]`` starting scales, as :func:`ulbq.solvers.rtn.round_to_nearest` gives them; negative where a
            symmetric grid is mirrored.
        zeros: ``[out, G]`` starting zero points; not looked at where the scheme is symmetric.
        scheme: the format's parameters.
        train_weights: let the weights move too; otherwise only the grid trains (LWC as published).
        form: what of the grid trains, and in which terms.

    Attributes:
        latents: the weight in units, ``[out, G, g]`` float32; a parameter, or a buffer where frozen.
        ends: ``[2, out, G]`` lower and upper end in units, where asymmetric ends train; ``(−z, 2^b − 1 − z)`` steps at
            the start.
        scales: ``[out, G]`` scale in units, where ends do not train; one step at the start.
        zeros: ``[out, G]`` zero point in codes, beside the scales of an asymmetric grid.
        step: unit of each group with the sign of its scale, ``[out, G, 1]``: the starting scale, or 1.
    """

    latents: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    step: torch.Tensor
    scheme: UniformScheme

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        scheme: UniformScheme,
        *,
        train_weights: bool = True,
        form: AffineForm = _CLIP_ENDS,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.form = form
        self._top = 2**scheme.bits - 1
        size = scales.float().abs().clamp_min(SCALE_FLOOR)
        unit = size if form.unit == "step" else torch.ones_like(size)
        self._least = _LEAST_SPAN if form.unit == "step" else SCALE_FLOOR
        self.register_buffer("step", (torch.where(scales < 0, -1.0, 1.0) * unit).unsqueeze(-1))
        self._hold("latents", weight.float().unflatten(1, (scales.shape[1], -1)) / self.step, trains=train_weights)
        start = size / unit
        if form.grid == "ends" and not scheme.symmetric:
            self.ends = nn.Parameter(start * torch.stack([-zeros, self._top - zeros]).float())
        else:
            self._hold("scales", start, trains=form.grid != "fixed")
            fixed = zeros.float() if not scheme.symmetric else torch.full_like(start, scheme.centre)
            self._hold("zeros", fixed, trains=form.grid != "fixed" and not scheme.symmetric)
        self._limit(start, train_weights)

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dequantized weight ``[out, in]`` in ``dtype``, differentiable in what trains."""
        if self.low is not None and self.high is not None:
            with torch.no_grad():
                self.latents.clamp_(self.low, self.high)
        scales, zeros = self._grid()
        weight: torch.Tensor = _FakeQuantize.apply(self.latents, scales, zeros, self.step, self._top, dtype)  # type: ignore[no-untyped-call]
        return weight

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``weights`` (none where frozen) and ``scales`` (clip ends and zero points too)."""
        grid = [p for name, p in self.named_parameters() if name != "latents"]
        return {"weights": [self.latents] if isinstance(self.latents, nn.Parameter) else [], "scales": grid}

    @torch.no_grad()
    def finalize(self) -> dict[str, torch.Tensor]:
        """The packed tensors of the format; scales are rounded to float16 only here."""
        if not isinstance(self.scheme, AffineScheme):
            raise TypeError(f"{self.scheme.format} is not affine")
        scales, zeros = self._grid()
        stored = None if self.scheme.symmetric else zeros
        return affine.pack(self.scheme, self._codes(scales, zeros), scales * self.step.squeeze(-1), stored)

    @classmethod
    def from_packed(
        cls,
        weight: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        scheme: AnyScheme,
        *,
        train_weights: bool = True,
        form: AffineForm = _CLIP_ENDS,
    ) -> Self:
        """Go on from packed tensors, as :meth:`Quantizer.from_packed` says; ``form`` as the class takes it."""
        if not isinstance(scheme, AffineScheme):
            raise TypeError(f"{scheme.format} is not affine")
        codes, scales, zeros = affine.unpack(scheme, tensors, weight.shape[1])
        made = cls(weight, scales, zeros, scheme, train_weights=train_weights, form=form)
        made._go_on(codes, scales, zeros)
        return made

    @torch.no_grad()
    def _go_on(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Move latents to where they give these codes."""
        size = scales.abs().clamp_min(SCALE_FLOOR).unsqueeze(-1) / self.step.abs()
        grouped = codes.view(self.latents.shape).float()
        steps = grouped - zeros.unsqueeze(-1)
        reach = 0.5 - CELL_MARGIN
        low = torch.where(grouped == 0, -torch.inf, (steps - reach) * size)
        high = torch.where(grouped == self._top, torch.inf, (steps + reach) * size)
        self.latents.copy_(self.latents.clamp(low, high))
        if self.low is not None and self.high is not None:
            self.low.copy_(torch.minimum(self.low, self.latents))
            self.high.copy_(torch.maximum(self.high, self.latents))

    def _codes(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """``[out, in]`` uint8 on a grid in units."""
        return _rounded(self.latents, scales, zeros).clamp_(0, self._top).flatten(1).to(torch.uint8)

    def _hold(self, name: str, values: torch.Tensor, *, trains: bool) -> None:
        if trains:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)

    def _limit(self, start: torch.Tensor, train_weights: bool) -> None:
        """How far the latents may go."""
        self.low: torch.Tensor | None
        self.high: torch.Tensor | None
        reach = None if self.form.reach is None or not train_weights else self.form.reach * start.unsqueeze(-1)
        self.register_buffer("low", None if reach is None else self.latents.detach() - reach)
        self.register_buffer("high", None if reach is None else self.latents.detach() + reach)

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales in units and zero points in codes, both ``[out, G]``."""
        if self.form.grid == "ends" and not self.scheme.symmetric:
            if fake_quantize.takes(self.ends, torch.float32) and self.ends.is_contiguous():
                return fake_quantize.affine_grid(self.ends, self._least, self._top)
            low, high = self.ends
            scales = ((high - low) / self._top).clamp_min(self._least)
            exact = -low / scales
        else:
            scales, exact = self.scales.clamp_min(self._least), self.zeros
            if self.scheme.symmetric:
                return scales, exact  # at 1 bit the centre lies between two codes
        rounded = exact + (exact.round() - exact).detach()
        return scales, rounded.clamp(0, self._top)
