"""Scales in two levels as stored (:mod:`ulbq.kernels.super_blocks`)."""

import torch

from ulbq.formats import AnyScheme, KQuantScheme
from ulbq.kernels import build, super_blocks
from ulbq.kernels.layouts.base import Case, Layout, Tensors, one_of
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS


class SuperBlocksLayout(Layout):
    """The stored tensors."""

    name = "super_blocks"
    summary = "K types: compiled C++ for a few vectors, else dense slabs"
    device = "cpu"
    formats = ("k_quant",)
    form = "compiled"

    def unavailable_reason(self) -> str | None:
        return build.unavailable_reason()

    def call_reason(self, case: Case) -> str | None:
        if (why := one_of(case.dtype, *FLOATS)) is not None or case.rows <= super_blocks.FEW_ROWS:
            return why
        return f"{case.rows} rows: beyond {super_blocks.FEW_ROWS} a dense weight is faster"

    def product(
        self, scheme: AnyScheme, tensors: Tensors, shape: tuple[int, int], bias: torch.Tensor | None, *, exact: bool
    ) -> Product | None:
        return super_blocks.product(scheme, tensors, shape, bias) if isinstance(scheme, KQuantScheme) else None

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return x.numel() > x.shape[-1] or not super_blocks.takes(x.reshape(-1, x.shape[-1]))
