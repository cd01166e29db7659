"""Tiles (:mod:`ulbq.kernels.tiles`): codes in the order in which the processor's dot products take them."""

from typing import Any

import torch

from ulbq.formats import AnyScheme, BinaryMosScheme
from ulbq.kernels import build, tiles
from ulbq.kernels.banks import Bank, TilesBank
from ulbq.kernels.layouts.base import Case, Layout, Tensors, one_of
from ulbq.kernels.product import Product

# What a mixture has beside its signs, and keeps as it is.
_BESIDE = ("in_scales", "out_scales", "router", "zeros")


class TilesLayout(Layout):
    """Tiles in place of the stored codes, scales and zero points."""

    name = "tiles"
    summary = "our compiled C++: integer dot products with codes in tiles; 1 to 4 bits, affine, dual binary, signs"
    device = "cpu"
    formats = ("affine", "dual_binary", "binary_mos")
    form = "tiles"

    def unavailable_reason(self) -> str | None:
        return build.unavailable_reason()

    def unsupported_reason(self, scheme: AnyScheme, out_features: int, in_features: int) -> str | None:
        return tiles.unsupported_reason(scheme, in_features)

    def call_reason(self, case: Case) -> str | None:
        most = tiles.most_rows(case.dtype)
        many = f"{case.rows} rows: beyond {most} dense slabs are faster" if case.rows > most else None
        return one_of(case.dtype, *tiles.FLOATS) or many

    def pack(self, scheme: AnyScheme, stored: Tensors, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
        beside = {name: stored[name] for name in _BESIDE if name in stored and isinstance(scheme, BinaryMosScheme)}
        return beside | tiles.pack(scheme, stored, out_features, in_features)

    def unpack(self, scheme: AnyScheme, tensors: Tensors, out_features: int, in_features: int) -> Tensors:
        found = {**tensors, **tiles.unpack(scheme, tensors, out_features, in_features)}
        return super().unpack(scheme, found, out_features, in_features)

    def rows(
        self, scheme: Any, tensors: Tensors, chosen: torch.Tensor, in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return tiles.rows(tensors, tiles.shape_of(scheme, 0, in_features), chosen, dtype)

    def bank(self, scheme: AnyScheme) -> type[Bank] | None:
        # What goes around the signs of BinaryMoS, a router and two scales a matrix, takes more calls than they do.
        return None if isinstance(scheme, BinaryMosScheme) else TilesBank

    def product(
        self, scheme: AnyScheme, tensors: Tensors, shape: tuple[int, int], bias: torch.Tensor | None, *, exact: bool
    ) -> Product:
        return tiles.product(scheme, tensors, shape, bias, exact=exact)

    def prefers_dense(self, x: torch.Tensor) -> bool:
        return not (x.dtype in tiles.FLOATS and x.numel() < tiles.MANY_ROWS * x.shape[-1])
