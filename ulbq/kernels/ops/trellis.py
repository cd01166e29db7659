"""Products with trellis codes, ``y = sv ⊙ H(T · H(su ⊙ x))``: the weight itself is never made.

A matrix comes in one of three forms: ``planes`` are the tensors as artifacts store them, for torch, which makes the
dense weight after all; ``compiled`` the same tensors for the kernels of :mod:`ulbq.kernels.trellis`, on the CPU;
``words`` those of :mod:`ulbq.kernels.words`, for GPUs.
"""

from typing import NamedTuple

import torch

from ulbq.formats import TrellisScheme
from ulbq.formats import trellis as form_of
from ulbq.kernels import tiles, trellis_launch, triton_launch
from ulbq.kernels import trellis as compiled
from ulbq.kernels.ops.operands import Operands


class _Trellis(NamedTuple):
    scheme: TrellisScheme
    form: str
    codes: torch.Tensor
    su: torch.Tensor
    sv: torch.Tensor

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if self.form == "compiled" and rows.dtype in tiles.FLOATS:
            return compiled.multiply(rows, self.scheme, self.codes, self.su, self.sv)
        if self.form == "words" and rows.dtype in triton_launch.FLOATS:
            return trellis_launch.multiply(rows, self.scheme, self.codes, self.su, self.sv)
        return torch.nn.functional.linear(rows, self._dense(rows.dtype))

    def input_gradient(self, rows: torch.Tensor) -> torch.Tensor:
        if self.form == "compiled" and rows.dtype in tiles.FLOATS:
            return compiled.input_gradient(rows, self.scheme, self.codes, self.su, self.sv)
        if self.form == "words" and rows.dtype in triton_launch.FLOATS:
            return trellis_launch.input_gradient(rows, self.scheme, self.codes, self.su, self.sv)
        return rows @ self._dense(rows.dtype)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        stored = {"codes": self.codes.view(torch.uint8), "su": self.su, "sv": self.sv}
        return form_of.dequantize(self.scheme, stored, len(self.su), dtype)


def _matrix(numbers: list[int], form: str, tensors: list[torch.Tensor], *_: int) -> _Trellis:
    bits, state_bits = numbers
    return _Trellis(TrellisScheme.model_construct(bits=bits, state_bits=state_bits), form, *tensors)


OPERANDS = Operands(
    lambda form: ("word_codes" if form == "words" else "codes", "su", "sv"),
    lambda scheme, _: [scheme.bits, scheme.state_bits],
    _matrix,
)
