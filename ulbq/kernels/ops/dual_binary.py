"""Products with two bit planes, ``Ŵ = α₁b₁ + α₂b₂``, in ``planes``, ``tiles`` or ``words``."""

import torch

from ulbq.formats import DualBinaryScheme, dual_binary
from ulbq.kernels.ops.dense import Dense, dense, named
from ulbq.kernels.ops.operands import Operands


def _matrix(numbers: list[int], form: str, tensors: list[torch.Tensor], out_features: int, in_features: int) -> Dense:
    codes, scales = tensors

    def slab(part: slice, dtype: torch.dtype) -> torch.Tensor:
        return dual_binary.weight(codes[:, part], scales[:, part], in_features, dtype)

    scheme = DualBinaryScheme.model_construct(group_size=numbers[0])
    return dense(scheme, form, (codes, scales, None), out_features, in_features, slab)


OPERANDS = Operands(lambda form: named(form, "codes", "scales"), lambda scheme, _: [scheme.group_size], _matrix)
