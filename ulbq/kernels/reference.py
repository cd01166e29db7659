"""What every kernel computes, in plain torch: the whole weight, then one product. Differentiable in all floats.

Other code is measured against this, so it is written to be read, and is slow: it makes the dense weight at every call.
With float64 activations all arithmetic is float64.
"""

import torch

from ulbq.formats import AffineScheme, binary_mos
from ulbq.formats.bits import unpack_planes


def affine_weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """``s · (q − z)``, ``[out, columns]`` in ``dtype``, rounded once from float32 (float64 where that is asked for).

    Args:
        codes: uint8 planes ``[bits, out, ceil(columns/8)]``.
        scales: ``[out, G]``, any floating dtype.
        zeros: floating ``[out, G]``, or planes as stored, uint8 ``[bits, ceil(out·G/8)]``; None for the grid's centre.
        columns: of the matrix.
        dtype: of the weight.
    """
    exact = torch.promote_types(torch.float32, dtype)
    grouped = unpack_planes(codes, columns).to(exact).unflatten(1, (scales.shape[1], -1))
    if zeros is None:
        centred = grouped - AffineScheme.model_construct(bits=len(codes)).centre
    elif zeros.is_floating_point():
        centred = grouped - zeros.to(exact).unsqueeze(-1)
    else:
        centred = grouped - unpack_planes(zeros, scales.numel()).view_as(scales).to(exact).unsqueeze(-1)
    weight: torch.Tensor = (centred * scales.to(exact).unsqueeze(-1)).flatten(1).to(dtype)
    return weight


def dual_binary_weight(codes: torch.Tensor, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """``α₁b₁ + α₂b₂``, ``[out, columns]``: planes uint8 ``[2, out, ceil(columns/8)]``, scales ``[2, out, G]``."""
    exact = torch.promote_types(torch.float32, dtype)
    planes = torch.stack([unpack_planes(plane.unsqueeze(0), columns) for plane in codes]).to(exact)
    grouped = planes.unflatten(2, (scales.shape[2], -1))
    weight: torch.Tensor = (grouped * scales.to(exact).unsqueeze(-1)).sum(0).flatten(1).to(dtype)
    return weight


def affine_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """``x`` ``[..., in]`` times :func:`affine_weight`, ``[..., out]`` in the dtype of ``x``."""
    return torch.nn.functional.linear(x, affine_weight(codes, scales, zeros, x.shape[-1], x.dtype))


def dual_binary_linear(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., in]`` times :func:`dual_binary_weight`, ``[..., out]`` in the dtype of ``x``."""
    return torch.nn.functional.linear(x, dual_binary_weight(codes, scales, x.shape[-1], x.dtype))


def binary_mos_linear(
    scheme: binary_mos.BinaryMosScheme, tensors: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """``((x ⊙ s_in(x)) · (B + z)ᵀ) ⊙ s_out(x)``, ``[..., out]`` in the dtype of ``x``, of the stored tensors."""
    return binary_mos.multiply(scheme, tensors, x, binary_mos.matrix(scheme, tensors, x.shape[-1], x.dtype))
