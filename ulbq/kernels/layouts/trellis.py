"""Trellis codes as stored, which our compiled kernels read (:mod:`ulbq.kernels.trellis`)."""

import torch

from ulbq.formats import AnyScheme, TrellisScheme
from ulbq.kernels import build, trellis
from ulbq.kernels.banks import Bank, TrellisBank
from ulbq.kernels.layouts.base import Case, Layout, Tensors, one_of
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS


class TrellisLayout(Layout):
    """The stored tensors."""

    name = "trellis"
    summary = "our compiled C++: trellis codes decoded while they are multiplied, without their dense weight"
    device = "cpu"
    formats = ("trellis",)
    form = "compiled"

    def unavailable_reason(self) -> str | None:
        return build.unavailable_reason()

    def call_reason(self, case: Case) -> str | None:
        return one_of(case.dtype, *FLOATS)

    def bank(self, scheme: AnyScheme) -> type[Bank] | None:
        return TrellisBank

    def matrix(
        self, scheme: AnyScheme, tensors: Tensors, out_features: int, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        if not isinstance(scheme, TrellisScheme) or dtype not in FLOATS:
            return super().matrix(scheme, tensors, out_features, in_features, dtype)
        return trellis.weight(scheme, tensors["codes"], tensors["su"], tensors["sv"], dtype)

    def product(
        self, scheme: AnyScheme, tensors: Tensors, shape: tuple[int, int], bias: torch.Tensor | None, *, exact: bool
    ) -> Product | None:
        return trellis.product(scheme, tensors, bias, exact=exact) if isinstance(scheme, TrellisScheme) else None

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return not (x.dtype in FLOATS and x.numel() < trellis.MANY_ROWS * x.shape[-1])
