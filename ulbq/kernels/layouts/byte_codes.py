"""Codes of a byte each (:mod:`ulbq.kernels.byte_codes`), for widths that no other layout takes."""

from typing import Any

import torch

from ulbq.formats import AnyScheme
from ulbq.kernels import byte_codes
from ulbq.kernels.layouts.base import Layout, Tensors


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

    def picked(self, scheme: AnyScheme, tensors: Tensors, chosen: torch.Tensor, in_features: int) -> Tensors:
        return self.unpack(scheme, {name: tensor[chosen] for name, tensor in tensors.items()}, 0, in_features)

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return not byte_codes.takes(x.reshape(-1, x.shape[-1]))
