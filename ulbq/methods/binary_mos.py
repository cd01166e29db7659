"""BinaryMoS (Jo et al., 2024, https://arxiv.org/abs/2406.12311): signs, and scales that a router mixes per token.

The paper distils the whole model over three epochs of C4 and WikiText-2. Here the blocks learn first, one after the
other as with the other methods, from an activation-weighted rank-one start; the distillation of the whole model may
follow (``--end-to-end kl-hidden`` is the paper's loss). Zero points and frozen weights are ULB-SAPR's options.
"""

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel

from ulbq import formats
from ulbq.errors import NumericsError
from ulbq.formats.binary_mos import BinaryMosScheme
from ulbq.methods.base import BlockResult, BlockTask, Packed
from ulbq.methods.options import ExpertOptions, TrainedOptions
from ulbq.methods.training import BlockTraining
from ulbq.quantizers.binary_mos import BinaryMosQuantizer, closed_form_start
from ulbq.training.linear import TrainedLinear

# Scales lose 2^-11 of themselves in storage and the logits of the gates as much, of which the largest are near 10.
_ROUNDING = 2.0**-6


class BinaryMosOptions(ExpertOptions, TrainedOptions):
    """Options of ``binary-mos``; neither an adapter nor a penalty unless asked for."""

    bits: Literal[1] = 1
    adapter: bool = False
    penalty: float = 0.0


class BinaryMos:
    """Binary weights with a mixture of scales, trained block by block.

    Args:
        scheme: experts and zeros.
        options: of the training.
    """

    name: ClassVar[str] = "binary-mos"
    Options: ClassVar[type[BaseModel]] = BinaryMosOptions
    calibrated: ClassVar[bool] = True

    def __init__(self, scheme: BinaryMosScheme, options: BinaryMosOptions) -> None:
        self.scheme = scheme
        self.options = options
        self._training = BlockTraining(options, scheme, BinaryMosQuantizer)
        self.needs = self._training.needs

    @classmethod
    def from_options(cls, options: BinaryMosOptions, group_size: int) -> Self:
        """The method that a request asks for; the format has no groups."""
        return cls(BinaryMosScheme(experts=options.experts, zeros=options.zeros), options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Find the start, train, pack, and compare products as well as weights: the router is in no weight."""
        generator = torch.Generator().manual_seed(task.seed)

        def start(weight: torch.Tensor, importance: torch.Tensor) -> BinaryMosQuantizer:
            found = closed_form_start(weight, self.scheme, importance=importance, generator=generator)
            return BinaryMosQuantizer(weight, found, self.scheme, train_weights=self.options.train_weights)

        result = self._training.quantize(task, start)
        for linear, packed in result.packed.items():
            layer = task.block.get_submodule(linear)
            if isinstance(layer, TrainedLinear) and isinstance(layer.quantizer, BinaryMosQuantizer):
                size = task.importance[linear].mean().sqrt().item()
                check_product(linear, packed, layer.quantizer, size=size or 1.0)
        return result


@torch.no_grad()
def check_product(linear: str, packed: Packed, quantizer: BinaryMosQuantizer, *, size: float = 1.0) -> None:
    """Compare what the packed layer answers to random inputs of a given size with what the trained one does.

    Raises:
        NumericsError: the answers differ by more than rounding, or are not finite.
    """
    columns = quantizer.latents.shape[1]
    x = (size * torch.randn(64, columns, generator=torch.Generator().manual_seed(0))).to(quantizer.latents.device)
    trained = quantizer.multiply(x, quantizer())
    matrix = formats.matrix(quantizer.scheme, packed, columns)
    stored = formats.multiply(quantizer.scheme, packed, x, matrix)
    difference = ((stored - trained).norm() / trained.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    if not math.isfinite(difference) or difference > _ROUNDING:
        raise NumericsError(
            f"The packed layer '{linear}' answers otherwise than the trained one, by {difference:.3g} of its size.",
            hint="Lower --router-rate and --scale-rate: float16 does not hold what they led to.",
        )
