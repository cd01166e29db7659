"""Affine codes of 1 to 4 bits through torch's own int4 product on the CPU, for machines without our compiled kernels.

Codes are centred, ``q + 8 − 2^(bits−1)``, which is exact; scales and shifts are rounded to bfloat16 as torch wants
them, so results differ from the stored weights' by about as much as with a weight rounded to bfloat16. The packed codes
lie beside the stored ones: half a byte a weight more.
"""

import torch

from ulbq.formats import AffineScheme, AnyScheme, affine
from ulbq.kernels.layouts.base import Case, Layout, Tensors, one_of

GROUPS = (32, 64, 128, 256)
"""Group sizes that torch's kernel knows."""
FEW_ROWS = 32
"""Up to so many rows it is faster than a dense product."""


@torch.library.custom_op("ulbq::int4_linear", mutates_args=())
def int4_linear(x: torch.Tensor, codes: torch.Tensor, shifted_scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """``x`` ``[..., in]`` bfloat16 times what :func:`to_int4` made, ``[..., out]`` bfloat16. It has no gradient."""
    rows = x.reshape(-1, x.shape[-1])
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group_size, shifted_scales)
    return product.view(*x.shape[:-1], shifted_scales.shape[1])


@int4_linear.register_fake
def _(x, codes, shifted_scales, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], shifted_scales.shape[1]))


def to_int4(scheme: AffineScheme, stored: Tensors, in_features: int) -> dict[str, torch.Tensor]:
    """``int4_codes`` as torch packs them and ``int4_scales`` bfloat16 ``[G, out, 2]``: scale, and value of code 8."""
    codes, scales, zeros = affine.unpack(scheme, stored, in_features)
    middle = 2 ** (scheme.bits - 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + (8 - middle)).int(), 1)
    both = torch.stack([scales, scales * (middle - zeros)], -1).transpose(0, 1)
    return {"int4_codes": packed, "int4_scales": both.to(torch.bfloat16).contiguous()}


class Int4Layout(Layout):
    """The stored tensors, and torch's own beside them."""

    name = "int4"
    summary = "torch's int4 product: affine codes of 1 to 4 bits, bfloat16 activations"
    device = "cpu"
    formats = ("affine",)

    def unsupported_reason(self, scheme: AnyScheme, out_features: int, in_features: int) -> str | None:
        if scheme.bits > 4:
            return f"{scheme.bits} bits: at most 4"
        if scheme.group_size not in GROUPS:
            return f"groups of {scheme.group_size}: one of {', '.join(map(str, GROUPS))}"
        return f"{out_features} outputs: a multiple of 16" if out_features % 16 else None

    def call_reason(self, case: Case) -> str | None:
        if case.differentiable and case.dtype == torch.bfloat16:
            return "has no gradient"
        many = f"{case.rows} rows: beyond {FEW_ROWS} dense slabs are faster" if case.rows > FEW_ROWS else None
        return one_of(case.dtype, torch.bfloat16) or many

    def pack(
        self, scheme: AffineScheme, stored: Tensors, out_features: int, in_features: int
    ) -> dict[str, torch.Tensor]:
        return {**stored, **to_int4(scheme, stored, in_features)}

    def prefers_dense(self, x: torch.Tensor) -> bool:
        differentiable = torch.is_grad_enabled() and x.requires_grad
        return x.dtype != torch.bfloat16 or differentiable or x.numel() > FEW_ROWS * x.shape[-1]

    def multiply(self, scheme: AnyScheme, tensors: Tensors, x: torch.Tensor, out_features: int) -> torch.Tensor:
        if self.prefers_dense(x):
            return super().multiply(scheme, tensors, x, out_features)
        product: torch.Tensor = torch.ops.ulbq.int4_linear(
            x, tensors["int4_codes"], tensors["int4_scales"], scheme.group_size
        )
        return product
