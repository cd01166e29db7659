"""Products with scales in two levels, in ``planes``: slabs of dense weights, then torch's product."""

import torch

from ulbq.formats import KQuantScheme, k_quant
from ulbq.kernels.ops.dense import Dense, dense, named
from ulbq.kernels.ops.operands import Operands

_NAMES = ("codes", "scales", "sub_scales", "minima", "sub_minima")


def _matrix(numbers: list[int], form: str, tensors: list[torch.Tensor], out_features: int, in_features: int) -> Dense:
    scheme = KQuantScheme.model_construct(bits=numbers[0])
    stored = dict(zip(_NAMES, tensors, strict=False))
    row = in_features // scheme.group_size // 8  # bytes of a row in a plane of groups

    def slab(part: slice, dtype: torch.dtype) -> torch.Tensor:
        groups = slice(part.start * row, part.stop * row)
        some = {
            name: tensor[:, part] if name == "codes" else tensor[:, groups] if name.startswith("sub") else tensor[part]
            for name, tensor in stored.items()
        }
        return k_quant.dequantize(scheme, some, in_features, dtype)

    return dense(scheme, form, (stored["codes"], stored["scales"], None), out_features, in_features, slab)


OPERANDS = Operands(lambda form: named(form, *_NAMES), lambda scheme, _: [scheme.bits], _matrix)
"""How a format takes part in :mod:`ulbq.kernels.ops.linear`."""
