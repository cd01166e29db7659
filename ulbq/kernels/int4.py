"""Affine codes of 1 to 4 bits through torch's own int4 product on the CPU, for machines without our compiled kernels.

Codes are centred, ``q + 8 − 2^(bits−1)``, which is exact; scales and shifts are rounded to bfloat16 as torch wants
them, so results differ from the stored weights' by about as much as with a weight rounded to bfloat16. The packed codes
lie beside the stored ones: half a byte a weight more.
"""

from collections.abc import Mapping

import torch

from ulbq.formats import AffineScheme, AnyScheme, affine

GROUPS = (32, 64, 128, 256)
"""Group sizes that torch's kernel knows."""
FEW_ROWS = 32
"""Up to so many rows it is faster than a dense product."""


@torch.library.custom_op("ulbq::int4_linear", mutates_args=())
def int4_linear(x: torch.Tensor, codes: torch.Tensor, shifted_scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """``x`` ``[..., in]`` bfloat16 times what :func:`pack` made, ``[..., out]`` bfloat16. It has no gradient."""
    rows = x.reshape(-1, x.shape[-1])
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group_size, shifted_scales)
    return product.view(*x.shape[:-1], shifted_scales.shape[1])


@int4_linear.register_fake
def _(x, codes, shifted_scales, group_size):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], shifted_scales.shape[1]))


def refusal(scheme: AnyScheme, outs: int) -> str:
    """Why a matrix cannot be packed; empty where it can."""
    if not isinstance(scheme, AffineScheme):
        return "affine codes only"
    if scheme.bits > 4:
        return f"{scheme.bits} bits: at most 4"
    if scheme.group_size not in GROUPS:
        return f"groups of {scheme.group_size}: one of {', '.join(map(str, GROUPS))}"
    if outs % 16:
        return f"{outs} outputs: a multiple of 16"
    return ""


def pack(scheme: AffineScheme, stored: Mapping[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """``int4_codes`` as torch packs them and ``int4_scales`` bfloat16 ``[G, out, 2]``: scale, and value of code 8."""
    codes, scales, zeros = affine.unpack(scheme, stored, columns)
    middle = 2 ** (scheme.bits - 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + (8 - middle)).int(), 1)
    both = torch.stack([scales, scales * (middle - zeros)], -1).transpose(0, 1)
    return {"int4_codes": packed, "int4_scales": both.to(torch.bfloat16).contiguous()}
