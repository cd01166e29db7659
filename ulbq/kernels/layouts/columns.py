"""Column codebooks as stored, and what lookups need beside them (:mod:`ulbq.kernels.columns`)."""

import torch

from ulbq.formats import AnyScheme, CodebookScheme
from ulbq.kernels import build, columns
from ulbq.kernels.banks import Bank, ColumnsBank
from ulbq.kernels.layouts.base import Case, Layout, Tensors, one_of
from ulbq.kernels.product import Product
from ulbq.kernels.tiles import FLOATS


class ColumnsLayout(Layout):
    """The stored tensors, the order of the columns, and the outliers by output."""

    name = "columns"
    summary = "our compiled C++: lookups in tables of each column's levels"
    device = "cpu"
    formats = ("codebook",)

    def unavailable_reason(self) -> str | None:
        return build.unavailable_reason()

    def unsupported_reason(self, scheme: AnyScheme, out_features: int, in_features: int) -> str | None:
        return f"{out_features} outputs: a multiple of 8" if out_features % 8 else None

    def call_reason(self, case: Case) -> str | None:
        if (why := one_of(case.dtype, *FLOATS)) is not None or columns.takes(case.dtype, case.rows):
            return why
        return f"{case.rows} rows: beyond {columns.FEW_ROWS} a dense weight is faster"

    def pack(
        self, scheme: CodebookScheme, stored: Tensors, out_features: int, in_features: int
    ) -> dict[str, torch.Tensor]:
        return {**stored, **columns.derive(scheme, stored, out_features, in_features)}

    def bank(self, scheme: AnyScheme) -> type[Bank] | None:
        return ColumnsBank

    def product(
        self, scheme: AnyScheme, tensors: Tensors, shape: tuple[int, int], bias: torch.Tensor | None, *, exact: bool
    ) -> Product | None:
        if not isinstance(scheme, CodebookScheme):
            return None
        return columns.product(scheme, tensors, shape, bias, exact=exact)

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return not (x.dtype in FLOATS and x.numel() <= columns.FEW_ROWS * x.shape[-1])
