"""Products with scales in two levels: ``planes``, or ``compiled`` for vectors; the rest are slabs of dense weights."""

from typing import NamedTuple

import torch

from ulbq.formats import KQuantScheme, k_quant
from ulbq.kernels import super_blocks
from ulbq.kernels.ops.dense import Dense, dense
from ulbq.kernels.ops.operands import Matrix, Operands

_NAMES = ("codes", "scales", "sub_scales", "minima", "sub_minima")


class _SuperBlocks(NamedTuple):
    """A matrix whose products with vectors are compiled."""

    scheme: KQuantScheme
    stored: dict[str, torch.Tensor]
    slabs: Dense

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if super_blocks.takes(rows):
            return super_blocks.multiply(self.scheme, self.stored, rows)
        return self.slabs.multiply(rows)

    def input_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        return self.slabs.input_gradient(rows)


def _matrix(numbers: list[int], form: str, tensors: list[torch.Tensor], out_features: int, in_features: int) -> Matrix:
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

    slabs = dense(scheme, "planes", (stored["codes"], stored["scales"], None), out_features, in_features, slab)
    return _SuperBlocks(scheme, stored, slabs) if form == "compiled" else slabs


OPERANDS = Operands(lambda _: _NAMES, lambda scheme, _: [scheme.bits], _matrix)
"""How a format takes part in :mod:`ulbq.kernels.ops.linear`."""
