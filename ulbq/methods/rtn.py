"""Round to nearest: no calibration, no training, seconds for a whole model."""

import torch

from ulbq.formats import affine
from ulbq.formats.affine import AffineScheme
from ulbq.methods.base import BlockResult, BlockTask, Packed, check_packed
from ulbq.solvers.rtn import round_to_nearest


class Rtn:
    """Rounds every weight to an affine grid whose range is searched by squared error.

    Args:
        scheme: any affine scheme.
        search: shrink each group's range where that lowers its error; without it, plain min-max rounding.
    """

    name = "rtn"
    epochs = 0
    calibrated = False
    augmented = False

    def __init__(self, scheme: AffineScheme, *, search: bool = True) -> None:
        self.scheme = scheme
        self._search = search

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block; only its weights are looked at."""
        return BlockResult({linear: self._pack(linear, task.weight(linear)) for linear in task.linears})

    def _pack(self, linear: str, weight: torch.Tensor) -> Packed:
        codes, scales, zeros = round_to_nearest(weight, self.scheme, search=self._search)
        packed = affine.pack(self.scheme, codes, scales, None if self.scheme.symmetric else zeros)
        steps = codes.view(*scales.shape, -1) - zeros.unsqueeze(-1)
        check_packed(linear, self.scheme, packed, (steps * scales.unsqueeze(-1)).flatten(1))
        return packed
