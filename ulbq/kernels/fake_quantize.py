"""Fake quantization on the CPU, compiled: latents to weights and gradients back, one pass each.

``cpu/fake_quantize.cpp`` has the loops, ``cpu/fixed_codes.cpp`` those of codes that stay. Weights and the gradients of
latents equal those of torch's operations to the bit, so that what training saw is what is packed; gradients of scales
and zero points are sums in another order.
"""

from typing import Any

import torch

from ulbq.kernels import build
from ulbq.kernels.tiles import FLOATS

_LANES = 16
"""Codes that the loops take at once; a group has whole ones."""


def takes(latents: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled code serves such latents and such weights or gradients."""
    kinds = latents.device.type == "cpu" and latents.dtype == torch.float32 and dtype in FLOATS
    return kinds and build.unavailable_reason() is None


def dual_binary(latents: torch.Tensor, scales: torch.Tensor, step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[out, in]`` of dual-binary latents.

    Args:
        latents: ``[out, G, g]`` float32, in grid steps.
        scales: ``[2, out, G]`` float32, in grid steps.
        step: ``[out, G, 1]`` float32.
        dtype: of the weight.
    """
    weight = torch.empty(latents.shape, dtype=dtype)
    given = [tensor.contiguous() for tensor in (latents, scales, step)]
    build.library().ulbq_fake_dual_binary(*_places(given), *_size(latents), *_typed(weight), torch.get_num_threads())
    return weight.flatten(1)


def dual_binary_back(
    latents: torch.Tensor, scales: torch.Tensor, step: torch.Tensor, gradient: torch.Tensor, *, to_latents: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gradients of latents (None where not wanted) and of scales, float32.

    Args:
        latents, scales, step: as :func:`dual_binary` takes them.
        gradient: of the weight, ``[out, in]`` in its dtype.
    """
    found = torch.empty(latents.shape, dtype=torch.float32) if to_latents else None
    to_scales = torch.empty(scales.shape, dtype=torch.float32)
    given = [tensor.contiguous() for tensor in (latents, scales, step)]
    incoming = gradient.contiguous()
    build.library().ulbq_fake_dual_binary_back(
        *_places(given), *_size(latents), *_typed(incoming), *_places([found, to_scales]), torch.get_num_threads()
    )
    return found, to_scales


def affine(
    latents: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, step: torch.Tensor, top: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight ``[out, in]`` of affine latents.

    Args:
        latents: ``[out, G, g]`` float32, in units.
        scales: ``[out, G]`` float32, in units.
        zeros: ``[out, G]`` float32, in codes.
        step: the unit, ``[out, G, 1]`` float32.
        top: the largest code.
        dtype: of the weight.
    """
    weight = torch.empty(latents.shape, dtype=dtype)
    given = [tensor.contiguous() for tensor in (latents, scales, zeros, step)]
    build.library().ulbq_fake_affine(*_places(given), top, *_size(latents), *_typed(weight), torch.get_num_threads())
    return weight.flatten(1)


def affine_back(
    latents: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    step: torch.Tensor,
    top: int,
    gradient: torch.Tensor,
    *,
    to_latents: bool,
    to_zeros: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Gradients of latents, of scales and of zero points, float32; None for what is not wanted.

    Args:
        latents, scales, zeros, step, top: as :func:`affine` takes them.
        gradient: of the weight, ``[out, in]`` in its dtype.
    """
    found = torch.empty(latents.shape, dtype=torch.float32) if to_latents else None
    of_scales = torch.empty(scales.shape, dtype=torch.float32)
    of_zeros = torch.empty_like(of_scales) if to_zeros else None
    given = [tensor.contiguous() for tensor in (latents, scales, zeros, step)]
    incoming = gradient.contiguous()
    build.library().ulbq_fake_affine_back(
        *_places(given),
        top,
        *_size(latents),
        *_typed(incoming),
        *_places([found, of_scales, of_zeros]),
        torch.get_num_threads(),
    )
    return found, of_scales, of_zeros


def takes_planes(planes: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> bool:
    """Whether the compiled code serves such codes that stay, and such weights or gradients."""
    kinds = scales.device.type == "cpu" and scales.dtype == torch.float32 and dtype in FLOATS
    groups = scales.shape[-1]
    return (
        kinds
        and planes.shape[-1] * 8 == columns
        and columns % (groups * _LANES) == 0
        and build.unavailable_reason() is None
    )


def fixed(planes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[out, in]`` of codes that stay.

    Args:
        planes: ``[bits, out, in / 8]`` uint8, as :func:`ulbq.formats.bits.pack_planes` lays them out.
        scales: ``[out, G]`` float32, or ``[bits, out, G]`` where each plane has its own and the weight is their sum.
        zeros: ``[out, G]`` float32, in codes; None where each plane has scales of its own.
        dtype: of the weight.
    """
    weight = torch.empty(planes.shape[1], planes.shape[2] * 8, dtype=dtype)
    given = [tensor.contiguous() for tensor in (planes, scales)]
    offsets = None if zeros is None else zeros.contiguous()
    build.library().ulbq_fixed(
        *_shape(given[0], scales), *_places([given[1], offsets]), *_typed(weight), torch.get_num_threads()
    )
    return weight


def fixed_back(
    planes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, gradient: torch.Tensor, *, to_zeros: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of scales and of zero points, float32; None for what is not wanted.

    Args:
        planes, scales, zeros: as :func:`fixed` takes them.
        gradient: of the weight, ``[out, in]`` in its dtype.
    """
    of_scales = torch.empty(scales.shape, dtype=torch.float32)
    of_zeros = torch.empty_like(of_scales) if to_zeros else None
    given = [tensor.contiguous() for tensor in (planes, scales, gradient)]
    offsets = None if zeros is None else zeros.contiguous()
    build.library().ulbq_fixed_back(
        *_shape(given[0], scales),
        *_places([given[1], offsets]),
        *_typed(given[2]),
        *_places([of_scales, of_zeros]),
        torch.get_num_threads(),
    )
    return of_scales, of_zeros


def affine_grid(ends: torch.Tensor, least: float, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points ``[out, G]`` of clip ends ``[2, out, G]`` float32, contiguous; differentiable.

    Args:
        ends: lower and upper ends.
        least: no scale is smaller.
        top: the largest code.
    """
    scales, zeros = _Grid.apply(ends, least, top)  # type: ignore[no-untyped-call]
    return scales, zeros


class _Grid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ends: torch.Tensor, least: float, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(ends)
        ctx.limits = least, top
        scales, zeros = torch.empty_like(ends[0]), torch.empty_like(ends[0])
        build.library().ulbq_affine_grid(ends.data_ptr(), least, top, scales.numel(), *_places([scales, zeros]))
        return scales, zeros

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (ends,) = ctx.saved_tensors
        found, given = torch.empty_like(ends), [gradient.contiguous() for gradient in gradients]
        build.library().ulbq_affine_grid_back(ends.data_ptr(), *ctx.limits, given[0].numel(), *_places([*given, found]))
        return found, None, None


def _places(tensors: list[torch.Tensor | None] | list[torch.Tensor]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _size(latents: torch.Tensor) -> tuple[int, int]:
    """Groups, and latents in each."""
    return latents.shape[0] * latents.shape[1], latents.shape[2]


def _shape(planes: torch.Tensor, scales: torch.Tensor) -> tuple[int, int, int, int, int]:
    """The planes' place, how many there are, rows, groups of a row and codes of a group."""
    count, rows, width = planes.shape
    return planes.data_ptr(), count, rows, scales.shape[-1], width * 8 // scales.shape[-1]


def _typed(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), FLOATS[tensor.dtype]
