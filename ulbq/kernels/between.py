"""Norms, rotary positions and gates of decoder blocks on the CPU, compiled (``cpu/between.cpp``), differentiable."""

from typing import Any

import torch

from ulbq.kernels import build
from ulbq.kernels.tiles import FLOATS


def takes(x: torch.Tensor) -> bool:
    """Whether the compiled code serves such a tensor."""
    return x.device.type == "cpu" and x.dtype in FLOATS and build.unavailable_reason() is None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight · x / √(mean(x²) + ε)`` over the last dimension.

    Args:
        x: ``[..., width]`` float32, contiguous.
        weight: ``[width]`` float32.
        epsilon: ε.
        half: give the result in bfloat16 too.

    Returns:
        The result in float32, and the same rounded to bfloat16, or itself.
    """
    whole, rounded = _Norm.apply(x, weight, epsilon, half)  # type: ignore[no-untyped-call]
    return whole, rounded if half else whole


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, half: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        rows = x.numel() // x.shape[-1]
        whole, factors = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
        rounded = torch.empty_like(x, dtype=torch.bfloat16) if half else None
        build.library().ulbq_norm(
            *_at(x, weight), epsilon, rows, x.shape[-1], *_at(whole, rounded, factors), torch.get_num_threads()
        )
        ctx.save_for_backward(x, weight, factors)
        return whole, rounded

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight, factors = ctx.saved_tensors
        whole, half = (None if gradient is None else gradient.contiguous() for gradient in gradients)
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        build.library().ulbq_norm_back(
            *_at(x, weight, factors),
            len(factors),
            x.shape[-1],
            *_at(whole, half, to_x, to_weight),
            torch.get_num_threads(),
        )
        return to_x, to_weight, None, None


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rotary positions: ``x cos + (−x₂, x₁) sin`` of the halves x₁ and x₂ of each head.

    Args:
        x: ``[batch, heads, length, width]``, the last dimension contiguous and even.
        cosines, sines: ``[batch or 1, length, width]`` float32, contiguous.
        dtype: of the result.
    """
    rotated: torch.Tensor = _Rotate.apply(x, cosines, sines, dtype)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.dtype = x.dtype
        rotated = torch.empty(x.shape, dtype=dtype)
        _rotate(x, cosines, sines, rotated, back=False)
        return rotated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
        batch, heads, length, width = gradient.shape
        # As a product gave it: heads side by side.
        rotated = torch.empty(batch, length, heads, width, dtype=ctx.dtype).transpose(1, 2)
        cosines, sines = ctx.saved_tensors
        _rotate(gradient, cosines, sines, rotated, back=True)
        return rotated, None, None, None


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, to: torch.Tensor, *, back: bool) -> None:
    batch, heads, length, width = x.shape
    stride = cosines.stride(0) if len(cosines) > 1 else 0
    build.library().ulbq_rotary(
        *_placed(x),
        *_at(cosines, sines),
        stride,
        batch,
        heads,
        length,
        width,
        back,
        *_placed(to),
        torch.get_num_threads(),
    )


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up``, rounded once; both of one shape and type."""
    product: torch.Tensor = _Gated.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-untyped-call]
    return product


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        product = torch.empty_like(gate)
        kind = FLOATS[gate.dtype]
        build.library().ulbq_gate(*_at(gate, up), gate.numel(), *_at(product), kind, torch.get_num_threads())
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        to_gate, to_up, incoming = torch.empty_like(gate), torch.empty_like(up), gradients[0].contiguous()
        build.library().ulbq_gate_back(
            *_at(gate, up, incoming), gate.numel(), *_at(to_gate, to_up), FLOATS[gate.dtype], torch.get_num_threads()
        )
        return to_gate, to_up


def _at(*tensors: torch.Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _placed(x: torch.Tensor) -> tuple[int, ...]:
    """Where ``[batch, heads, length, width]`` lies, its type, and its strides."""
    return x.data_ptr(), FLOATS[x.dtype], *x.stride()[:3]
