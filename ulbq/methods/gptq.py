"""GPTQ (Frantar et al., 2023, https://arxiv.org/abs/2210.17323): affine codes column by column, no training.

The error of each column is made good in the columns after it, by the second moments of the layer's inputs in the
quantized model. Beyond the paper, every token counts by its relative error (``--token-weighting uniform`` for plain
squares, in which an attention sink is all that counts), the range of every group is searched (``--no-search`` for
min-max as published), and with ``--act-order`` groups stay columns side by side, so that the format needs no index of
groups.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch

from ulbq import formats
from ulbq.config.groups import MethodOptions
from ulbq.config.methods import GptqOptions
from ulbq.formats import UniformScheme
from ulbq.methods.base import BlockResult, BlockTask, Needs, Packed
from ulbq.methods.budget import WidthsOfBudget
from ulbq.methods.in_sequence import solve_in_sequence
from ulbq.methods.rtn import pack_codes, uniform_of, uniform_scheme
from ulbq.solvers.gptq import AT_ONCE, GptqSettings, factored, gptq, joined, parts
from ulbq.solvers.hessian import HessianFactor, HessianSum
from ulbq.solvers.k_quant import UniformCodes, find_grids

_LAYER_BYTES = 18.5
"""Of each weight: columns in processing order, what they were at their turns in both passes, in both orders, codes."""

GROUPS = 4
"""Of a layer's rows with a Hessian of their own, as GuidedQuant has it for small models."""


class Gptq(WidthsOfBudget):
    """Affine codes with errors made good in later columns.

    Args:
        scheme: any affine scheme, or one with scales in two levels.
        options: order, damping and the rest.
    """

    name: ClassVar[str] = "gptq"
    Options: ClassVar[type[MethodOptions]] = GptqOptions
    options: GptqOptions

    def __init__(self, scheme: UniformScheme, options: GptqOptions) -> None:
        self.scheme = scheme
        self.options = options
        budget = options.target_bits is not None
        hessians: Literal["sequence", "block"] = "sequence" if options.true_sequential and not budget else "block"
        full = options.target_inputs == "full"
        self.needs = Needs(
            full_precision=full,
            drifts=full,
            searches=True,
            hessians=hessians,
            output_groups={"plain": 0, "guided": GROUPS, "two-sided": 1}[options.hessian],
            between_outputs=options.hessian == "two-sided",
            layer_bytes=_LAYER_BYTES,
            stacked=options.hessian == "plain",
            at_once=0 if options.hessian == "two-sided" else AT_ONCE,
            rounds_few=True,
            survey=budget,
            target_bits=options.target_bits,
            saliency=options.saliency if budget and options.saliency != "none" else None,
        )
        self._settings = GptqSettings(
            damping=options.damping,
            act_order=options.act_order,
            search=options.search,
            block_size=options.column_block,
        )

    @classmethod
    def from_options(cls, options: GptqOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(uniform_scheme(options, group_size), options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block from the inputs of its layers."""
        packed: dict[str, Packed] = {}
        notes: list[tuple[str, str]] = []

        def solve(linears: Sequence[str], inputs: HessianSum) -> Mapping[str, torch.Tensor]:
            alike: dict[UniformScheme, list[str]] = {}
            for linear in linears:
                alike.setdefault(uniform_of(task, linear, self.scheme), []).append(linear)
            made: dict[str, torch.Tensor] = {}
            # Second moments are wanted no more.
            factors = [] if inputs.few else [factored(one, self._settings, overwrite=True) for one in inputs.matrices]
            if note := self._note(inputs, factors):
                notes.append((", ".join(linears), f"{note}."))
            for scheme, names in alike.items():
                weights = [task.weight(linear) for linear in names]
                # Rows know nothing of each other: layers that read the same input are one matrix.
                codes = self._solve(weights, scheme, inputs, factors, task.between(names[0]))
                rows = [tensor.split([len(weight) for weight in weights]) for tensor in codes]
                for linear, *own in zip(names, *rows, strict=True):
                    packed[linear] = pack_codes(linear, scheme, type(codes)(*own))
                    made[linear] = formats.dequantize(scheme, packed[linear], weights[0].shape[1])
            return made

        one_by_one = self.options.true_sequential
        solve_in_sequence(task, solve, one_by_one=one_by_one, rounds_few=True, **self.options.gathering)
        ordered = {linear: packed[linear] for linear in task.linears}
        return BlockResult(ordered, schemes=task.schemes, notes=tuple(notes))

    def _solve(
        self,
        weights: Sequence[torch.Tensor],
        scheme: UniformScheme,
        inputs: HessianSum,
        factors: Sequence[HessianFactor],
        outputs: torch.Tensor | None,
    ) -> UniformCodes:
        """Codes of matrices below each other."""
        if not factors:
            known, search = inputs.diagonal if inputs.diagonal.any() else None, self.options.search
            return joined([find_grids(rows, scheme, importance=known, search=search) for rows in parts(weights)])
        # Of several factors each is of some rows of one matrix.
        groups = [weights] if len(factors) == 1 else [[rows] for rows in weights[0].tensor_split(len(factors))]
        found = zip(groups, factors, strict=True)
        return joined([gptq(rows, one, scheme, self._settings, outputs).codes for rows, one in found])

    def _note(self, inputs: HessianSum, factors: Sequence[HessianFactor]) -> str:
        """What has to be said of layers that read an input; empty for nothing."""
        if not factors:
            return f"rounded to nearest, {inputs.known_by} tokens are too few for {inputs.columns} columns"
        damping = max(factor.damping for factor in factors)
        return f"damping raised to {damping:g}, its inputs are singular" if damping > self.options.damping else ""
