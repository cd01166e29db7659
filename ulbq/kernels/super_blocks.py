"""Products with scales in two levels on the CPU, of tensors as they are stored, compiled (``cpu/k_quant.cpp``)."""

from collections.abc import Mapping

import torch

from ulbq.formats import KQuantScheme
from ulbq.kernels import build
from ulbq.kernels.build import library
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS

FEW_ROWS = 64
"""Up to so many vectors are multiplied by the codes; beyond, slabs of dense weights are faster."""

_NAMES = ("codes", "scales", "sub_scales", "minima", "sub_minima")


def takes(rows: torch.Tensor) -> bool:
    """Whether :func:`multiply` has the products of ``[n, in]``."""
    return len(rows) <= FEW_ROWS and rows.dtype in FLOATS and build.unavailable_reason() is None


def multiply(scheme: KQuantScheme, stored: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Products ``[n, out]`` of ``rows`` ``[n, in]``, in their dtype; the arithmetic is float32."""
    x, outs = rows.float().contiguous(), len(stored["scales"])
    y = torch.empty(len(x), outs, dtype=torch.float32)
    tensors = [stored.get(name) for name in _NAMES]
    places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    threads = torch.get_num_threads()
    library().ulbq_multiply_k_quant(scheme.bits, outs, x.shape[1], *places, x.data_ptr(), len(x), y.data_ptr(), threads)
    return y.to(rows.dtype)


def product(
    scheme: KQuantScheme, stored: Mapping[str, torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
) -> Product:
    """What tokens are multiplied with. Nothing is rounded but in float32."""
    return Product("ulbq_k_quant_linear", scheme.bits, *shape, *(stored.get(name) for name in _NAMES), bias)
