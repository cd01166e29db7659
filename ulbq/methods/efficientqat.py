"""EfficientQAT (Chen et al., 2024, https://arxiv.org/abs/2407.11062): all of a block trains, then all scales together.

*Block-AP*: weights, scales, zero points and norms of a block learn the output of its full-precision self. *E2E-QP*:
codes and zero points are fixed, and the scales of all blocks learn the text (``--end-to-end ce``) or the model's own
predictions. Beyond the paper the start is searched or solved instead of min-max, tokens count by their relative error,
and rates are relative to the grid; ``--start min-max --train all --lr-unit weight --token-weighting uniform`` is what
the paper does, and the recipes ``efficientqat-w2`` … ``-w4`` have the rest of it.
"""

import dataclasses
from functools import partial
from typing import ClassVar, Self

import torch

from ulbq.config.groups import MethodOptions
from ulbq.config.methods import BlockTrained, EfficientQatOptions, GptqOptions
from ulbq.formats import KQuantScheme, UniformScheme
from ulbq.formats.k_quant import KQuant
from ulbq.methods.base import BlockResult, BlockStart, BlockTask, Needs
from ulbq.methods.budget import WidthsOfBudget, budgeted
from ulbq.methods.gptq import Gptq
from ulbq.methods.rtn import uniform_scheme
from ulbq.methods.training import BlockTraining
from ulbq.quantizers.affine import AffineForm, AffineQuantizer
from ulbq.quantizers.base import Quantizer
from ulbq.quantizers.k_quant import KQuantizer
from ulbq.solvers.k_quant import find_grids

_FORMS: dict[BlockTrained, AffineForm] = {
    "clipping": AffineForm(grid="ends"),
    "grid": AffineForm(grid="scales"),
    "rounding": AffineForm(grid="scales", reach=0.5),
    "weights": AffineForm(grid="fixed"),
    "all": AffineForm(grid="ends"),
}


class EfficientQat(WidthsOfBudget):
    """Affine codes trained block by block from a start of choice.

    Args:
        scheme: any affine scheme, or one with scales in two levels.
        options: of start and training.
    """

    name: ClassVar[str] = "efficientqat"
    Options: ClassVar[type[MethodOptions]] = EfficientQatOptions
    options: EfficientQatOptions

    def __init__(self, scheme: UniformScheme, options: EfficientQatOptions) -> None:
        self.scheme = scheme
        self.options = options
        self._form = dataclasses.replace(_FORMS[options.train], unit=options.lr_unit)
        affine = partial(AffineQuantizer.from_packed, train_weights=options.train_weights, form=self._form)
        two_levels = isinstance(scheme, KQuantScheme)
        self._training = BlockTraining(options, scheme, KQuantizer.from_packed if two_levels else affine)
        self._solver = None
        if options.start == "gptq":
            names = ("bits", "symmetric", "k_quant", "token_weighting")
            given = {name: value for name, value in options.in_effect().items() if name in names}
            self._solver = Gptq(scheme, GptqOptions.model_validate(given))
        needs, solving = self._training.needs, Needs() if self._solver is None else self._solver.needs
        needs = dataclasses.replace(
            needs,
            hessians=solving.hessians,
            searches=options.start in {"search", "gptq"},
            layer_bytes=solving.layer_bytes,
            stacked=solving.stacked,
            at_once=solving.at_once,
            rounds_few=solving.rounds_few,
            copies=needs.copies + 2 * (self._form.reach is not None),  # how far the latents may go
        )
        self.needs = budgeted(needs, options.target_bits, options.saliency)

    @classmethod
    def from_options(cls, options: EfficientQatOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(uniform_scheme(options, group_size), options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Find the start, train, pack."""
        if task.start is not None or self._solver is None:
            return self._training.quantize(task, self._round)
        solved = self._solver.quantize_block(task)
        task.restore()
        result = self._training.quantize(
            dataclasses.replace(task, start=BlockStart(solved.packed, {}, schemes=solved.schemes))
        )
        return dataclasses.replace(result, notes=solved.notes)

    def _round(self, weight: torch.Tensor, importance: torch.Tensor, scheme: UniformScheme) -> Quantizer:
        start = find_grids(weight, scheme, importance=importance, search=self.options.start == "search")
        if isinstance(scheme, KQuantScheme) and isinstance(start, KQuant):
            return KQuantizer(weight, start, scheme)
        train = self.options.train_weights
        return AffineQuantizer(weight, start.scales, start.zeros, scheme, train_weights=train, form=self._form)
