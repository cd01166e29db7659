"""Products with affine codes, in ``planes``, ``tiles``, ``words`` or ``bytes``."""

import torch

from ulbq.formats import AffineScheme, affine
from ulbq.kernels import byte_codes
from ulbq.kernels.ops.dense import Dense, dense, named
from ulbq.kernels.ops.operands import Operands


def _matrix(numbers: list[int], form: str, tensors: list[torch.Tensor], out_features: int, in_features: int) -> Dense:
    codes, scales, *more = tensors
    zeros, (bits, group_size, mid_rise) = more[0] if more else None, numbers
    scheme = AffineScheme.model_construct(
        bits=bits, group_size=group_size, symmetric=zeros is None, mid_rise=bool(mid_rise)
    )
    offsets = scheme.centre if zeros is None or form != "planes" else affine.real_zeros(zeros, scales)

    def slab(part: slice, dtype: torch.dtype) -> torch.Tensor:
        if form == "bytes":
            return byte_codes.weight(codes[part], scales[part], scheme.centre if zeros is None else zeros[part], dtype)
        some = offsets if isinstance(offsets, float) else offsets[part]
        return affine.weight(codes[:, part], scales[part], some, in_features, dtype)

    return dense(scheme, form, (codes, scales, zeros), out_features, in_features, slab)


OPERANDS = Operands(
    lambda form: named(form, "codes", "scales", "zeros"),
    lambda scheme, _: [scheme.bits, scheme.group_size, int(scheme.mid_rise)],
    _matrix,
)
