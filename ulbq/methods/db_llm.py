"""DB-LLM (Chen et al., 2024, https://arxiv.org/abs/2402.11960): dual-binary weights, trained block by block.

The authors published no code. Against the paper's description this differs in three ways, meant for
few samples: the starting scales are searched by activation-weighted error instead of taken from the largest weight,
rates are relative to each group's step, and training is block-wise instead of end to end. The paper's
deviation-aware distillation is a loss of the whole model (``--end-to-end dad``).

With tied scales α₁ stays at −2α₂, where the paper starts: that is a symmetric affine grid in one of its orientations,
and stored as such.
"""

import dataclasses
from functools import partial
from typing import ClassVar, Self

import torch

from ulbq.config.groups import MethodOptions
from ulbq.config.methods import DbLlmOptions
from ulbq.formats import AffineScheme, DualBinaryScheme
from ulbq.methods.base import BlockResult, BlockTask
from ulbq.methods.training import BlockTraining
from ulbq.quantizers.affine import AffineQuantizer
from ulbq.quantizers.base import Quantizer
from ulbq.quantizers.dual_binary import DualBinaryQuantizer, search_scales
from ulbq.quantizers.trainable import TRAINABLE
from ulbq.solvers.rtn import round_to_nearest


class DbLlm:
    """Flexible dual binarization with block-wise training.

    Args:
        scheme: the group size; affine where scales are tied.
        options: of the training.
    """

    name: ClassVar[str] = "db-llm"
    Options: ClassVar[type[MethodOptions]] = DbLlmOptions

    def __init__(self, scheme: DualBinaryScheme | AffineScheme, options: DbLlmOptions) -> None:
        self.scheme = scheme
        self.options = options
        go_on = partial(TRAINABLE[scheme.format].free.from_packed, train_weights=options.train_weights)
        self._training = BlockTraining(options, scheme, go_on)
        self.needs = dataclasses.replace(self._training.needs, searches=True)

    @classmethod
    def from_options(cls, options: DbLlmOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        if options.tied_scales:
            return cls(AffineScheme(bits=2, group_size=group_size, symmetric=True), options)
        return cls(DualBinaryScheme(group_size=group_size), options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Search the start, train, pack."""
        return self._training.quantize(task, self._start)

    def _start(
        self, weight: torch.Tensor, importance: torch.Tensor, scheme: DualBinaryScheme | AffineScheme
    ) -> Quantizer:
        train = self.options.train_weights
        if isinstance(scheme, AffineScheme):
            grid = round_to_nearest(weight, scheme, importance=importance)
            return AffineQuantizer(weight, grid.scales, grid.zeros, scheme, train_weights=train)
        group_size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        scales = search_scales(weight, importance, group_size)
        return DualBinaryQuantizer(weight, scales, scheme, train_weights=train)
