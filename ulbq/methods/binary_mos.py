"""BinaryMoS (Jo et al., 2024, https://arxiv.org/abs/2406.12311): signs, and scales that a router mixes per token.

The paper distils the whole model over three epochs of C4 and WikiText-2. Here the blocks learn first, one after the
other as with the other methods, from an activation-weighted rank-one start; the distillation of the whole model may
follow (``--end-to-end kl-hidden`` is the paper's loss). Zero points and frozen weights are ULB-SAPR's options.
"""

from functools import partial
from typing import ClassVar, Self

import torch

from ulbq.config.groups import MethodOptions
from ulbq.config.methods import BinaryMosOptions
from ulbq.formats.binary_mos import BinaryMosScheme
from ulbq.methods.base import BlockResult, BlockTask
from ulbq.methods.training import BlockTraining
from ulbq.quantizers.binary_mos import BinaryMosQuantizer, closed_form_start


class BinaryMos:
    """Binary weights with a mixture of scales, trained block by block.

    Args:
        scheme: experts and zeros.
        options: of the training.
    """

    name: ClassVar[str] = "binary-mos"
    Options: ClassVar[type[MethodOptions]] = BinaryMosOptions

    def __init__(self, scheme: BinaryMosScheme, options: BinaryMosOptions) -> None:
        self.scheme = scheme
        self.options = options
        self._training = BlockTraining(
            options, scheme, partial(BinaryMosQuantizer.from_packed, train_weights=options.train_weights)
        )
        self.needs = self._training.needs

    @classmethod
    def from_options(cls, options: BinaryMosOptions, group_size: int) -> Self:
        """The method that a request asks for; the format has no groups."""
        return cls(BinaryMosScheme(experts=options.experts, zeros=options.zeros), options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Find the start, train, pack."""
        generator = torch.Generator().manual_seed(task.seed)

        def start(weight: torch.Tensor, importance: torch.Tensor, scheme: BinaryMosScheme) -> BinaryMosQuantizer:
            found = closed_form_start(weight, scheme, importance=importance, generator=generator)
            return BinaryMosQuantizer(weight, found, scheme, train_weights=self.options.train_weights)

        return self._training.quantize(task, start)
