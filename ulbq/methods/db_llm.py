"""DB-LLM (Chen et al., 2024, https://arxiv.org/abs/2402.11960): dual-binary weights, trained block by block.

The authors published no code. Against the paper's description this differs in three ways, meant for
few samples: the starting scales are searched by activation-weighted error instead of taken from the largest weight,
rates are relative to each group's step, and training is block-wise instead of end to end. The paper's
deviation-aware distillation is a loss of the whole model (``--end-to-end dad``).
"""

import dataclasses
from functools import partial
from typing import ClassVar, Self

import torch

from ulbq.config.groups import MethodOptions
from ulbq.config.methods import DbLlmOptions
from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.methods.base import BlockResult, BlockTask
from ulbq.methods.training import BlockTraining
from ulbq.quantizers.dual_binary import DualBinaryQuantizer, search_scales


class DbLlm:
    """Flexible dual binarization with block-wise training.

    Args:
        scheme: the group size.
        options: of the training.
    """

    name: ClassVar[str] = "db-llm"
    Options: ClassVar[type[MethodOptions]] = DbLlmOptions

    def __init__(self, scheme: DualBinaryScheme, options: DbLlmOptions) -> None:
        self.scheme = scheme
        self.options = options
        self._training = BlockTraining(
            options, scheme, partial(DualBinaryQuantizer.from_packed, train_weights=options.train_weights)
        )
        self.needs = dataclasses.replace(self._training.needs, searches=True)

    @classmethod
    def from_options(cls, options: DbLlmOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(DualBinaryScheme(group_size=group_size), options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Search the start, train, pack."""
        return self._training.quantize(task, self._start)

    def _start(self, weight: torch.Tensor, importance: torch.Tensor, scheme: DualBinaryScheme) -> DualBinaryQuantizer:
        group_size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
        scales = search_scales(weight, importance, group_size)
        return DualBinaryQuantizer(weight, scales, scheme, train_weights=self.options.train_weights)
