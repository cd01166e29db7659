"""Tensors as artifacts store them, on every device."""

import torch

from ulbq.formats import AnyScheme
from ulbq.kernels.layouts.base import Layout, Tensors


class Stored(Layout):
    """Products of dense weights that are made for each, some outputs at a time where the format can."""

    name = "dense"
    summary = "slabs of dense weights, then torch's product: everything, on every device"

    def unsupported_reason(self, scheme: AnyScheme, out_features: int, in_features: int) -> str | None:
        return None

    def pack(self, scheme: AnyScheme, stored: Tensors, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
        return dict(stored)

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return True
