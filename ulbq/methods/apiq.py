"""ApiQ (Liao et al., 2024, https://arxiv.org/abs/2402.05147): clipping and a LoRA adapter learn each block's output.

``y = Ŵx + (α/r)·B(Ax)``: the quantized weight's clip ends and the adapter train together, block by block
(``--granularity block``, ApiQ-bw) or layer by layer (``layer``, ApiQ-lw, of which no code was published). Beyond the
paper the start is searched by activation-weighted error, tokens count by their relative error, rates are relative to
the grid, and the weights may move; ``--freeze-weights --token-weighting uniform`` is what the paper does.
"""

import dataclasses
from functools import partial
from typing import ClassVar, Self

import torch

from ulbq.config.groups import MethodOptions
from ulbq.config.methods import ApiQOptions
from ulbq.formats.affine import AffineScheme
from ulbq.methods.base import BlockResult, BlockTask
from ulbq.methods.budget import WidthsOfBudget, budgeted
from ulbq.methods.rtn import affine_scheme
from ulbq.methods.training import BlockTraining
from ulbq.quantizers.affine import AffineQuantizer
from ulbq.solvers.rtn import round_to_nearest


class ApiQ(WidthsOfBudget):
    """Affine codes with learnable clipping and an adapter.

    Args:
        scheme: any affine scheme.
        options: of the training.
    """

    name: ClassVar[str] = "apiq"
    Options: ClassVar[type[MethodOptions]] = ApiQOptions
    options: ApiQOptions

    def __init__(self, scheme: AffineScheme, options: ApiQOptions) -> None:
        self.scheme = scheme
        self.options = options
        self._training = BlockTraining(
            options, scheme, partial(AffineQuantizer.from_packed, train_weights=options.train_weights)
        )
        needs = dataclasses.replace(self._training.needs, searches=True)
        self.needs = budgeted(needs, options.target_bits, options.saliency)

    @classmethod
    def from_options(cls, options: ApiQOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(affine_scheme(options, group_size), options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Search the start, train, pack."""
        return self._training.quantize(task, self._start)

    def _start(self, weight: torch.Tensor, importance: torch.Tensor, scheme: AffineScheme) -> AffineQuantizer:
        start = round_to_nearest(weight, scheme, importance=importance)
        return AffineQuantizer(weight, start.scales, start.zeros, scheme, train_weights=self.options.train_weights)
