"""Codes of a byte each (:mod:`ulbq.kernels.byte_codes`), for widths that no other layout takes."""

from typing import Any

import torch

from ulbq.kernels import byte_codes
from ulbq.kernels.layouts.base import Layout, Tensors
from ulbq.kernels.product import Product


class BytesLayout(Layout):
    """Bytes in place of the stored codes."""

    name = "bytes"
    summary = "affine codes of 6 and 8 bits, a byte each: compiled C++ for vectors, else dense slabs"
    device = "cpu"
    formats = ("affine",)
    form = "bytes"

    def unsupported_reason(self, scheme: Any, out_features: int, in_features: int) -> str | None:
        return f"{scheme.bits} bits: 6 or 8" if scheme.bits <= 4 else None

    def pack(self, scheme: Any, stored: Tensors, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
        return byte_codes.pack(scheme, stored, in_features)

    def unpack(self, scheme: Any, tensors: Tensors, out_features: int, in_features: int) -> Tensors:
        return byte_codes.unpack(scheme, tensors)

    def rows(
        self, scheme: Any, tensors: Tensors, chosen: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return byte_codes.weight(tensors["byte_codes"][chosen], tensors["byte_scales"][chosen], scheme.centre, dtype)

    def product(
        self, scheme: Any, tensors: Tensors, shape: tuple[int, int], bias: torch.Tensor | None, *, exact: bool
    ) -> Product | None:
        return byte_codes.product(scheme, tensors, bias, exact=exact)

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return not byte_codes.takes(x.reshape(-1, x.shape[-1]))
