"""Affine codes of a byte each, in the order of the rows, and the compiled products of a few vectors with them.

It is for widths above four bits, and takes a byte a code at six bits too. A row is read without the others, which a
table of tokens wants. All but the products is plain torch.
"""

from collections.abc import Mapping

import torch

from ulbq.formats import AffineScheme
from ulbq.formats.bits import pack_planes, unpack_planes
from ulbq.kernels import build
from ulbq.kernels.build import library
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS

FEW_ROWS = 8
"""Up to so many vectors are multiplied by the codes; beyond, slabs of dense weights are faster."""


def pack(scheme: AffineScheme, stored: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """``byte_codes`` uint8 ``[out, in]``, ``byte_scales`` ``[out, G]`` and, with zero points, ``byte_zeros`` alike."""
    scales = stored["scales"]
    packed = {"byte_codes": unpack_planes(stored["codes"], columns).contiguous(), "byte_scales": scales}
    if scheme.symmetric:
        return packed
    return packed | {"byte_zeros": unpack_planes(stored["zeros"], scales.numel()).view_as(scales).contiguous()}


def unpack(scheme: AffineScheme, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo :func:`pack`."""
    stored = {"codes": pack_planes(packed["byte_codes"], scheme.bits), "scales": packed["byte_scales"]}
    if scheme.symmetric:
        return stored
    return stored | {"zeros": pack_planes(packed["byte_zeros"].flatten(), scheme.bits)}


def weight(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """``[out, in]`` in ``dtype``, as :func:`ulbq.formats.affine.weight` has it, bit for bit."""
    exact = torch.promote_types(torch.float32, dtype)
    steps = codes.to(exact).unflatten(1, (scales.shape[1], -1))
    steps.sub_(zeros if isinstance(zeros, float) else zeros.to(exact).unsqueeze(-1))
    found: torch.Tensor = steps.mul_(scales.to(exact).unsqueeze(-1)).flatten(1).to(dtype)
    return found


def takes(rows: torch.Tensor) -> bool:
    """Whether :func:`multiply` has the products of ``[n, in]``."""
    return len(rows) <= FEW_ROWS and rows.dtype in FLOATS and build.unavailable_reason() is None


def multiply(
    rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | float
) -> torch.Tensor:
    """Products ``[n, out]`` of ``rows`` ``[n, in]``, in their dtype; the arithmetic is float32."""
    x, (outs, columns) = rows.float().contiguous(), codes.shape
    y = torch.empty(len(x), outs, dtype=torch.float32)
    plain, centre = (None, zeros) if isinstance(zeros, float) else (zeros.data_ptr(), 0.0)
    library().ulbq_multiply_bytes(
        *(codes.data_ptr(), scales.data_ptr(), plain, centre, outs, columns, columns // scales.shape[1]),
        *(x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads()),
    )
    return y.to(rows.dtype)


def product(
    scheme: AffineScheme, packed: Mapping[str, torch.Tensor], bias: torch.Tensor | None, *, exact: bool
) -> Product:
    """What tokens are multiplied with. Groups that 64 does not divide round nothing but in float32."""
    codes, scales = packed["byte_codes"], packed["byte_scales"]
    group = codes.shape[1] // scales.shape[1]
    matrix = (codes, scales, packed.get("byte_zeros"), scheme.centre if scheme.symmetric else 0.0, *codes.shape, group)
    return Product("ulbq_bytes_linear", *matrix, bias, exact)
