"""CLAQ (Wang et al., 2024, https://arxiv.org/abs/2405.17233): a codebook for every column, precision where it pays.

GPTQ's loop with one-dimensional k-means in every column. Columns that matter get wider codes, and single values are
stored as they are (*outliers*). Beyond the paper, the budget counts true bits, and is given out by the loss that a bit
saves, in each layer or across the whole model (``--allocation global``); codebooks are fitted together after the pass
(``--refit``); and they may train afterwards, block by block (``--epochs``). ``--as-published`` is what the authors'
code does, slips included.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

import torch

from ulbq import distributed, formats
from ulbq.config.groups import MethodOptions
from ulbq.config.methods import ClaqOptions
from ulbq.formats import AnyScheme, codebook
from ulbq.formats.codebook import CodebookScheme
from ulbq.methods.base import BlockResult, BlockStart, BlockTask, Packed
from ulbq.methods.in_sequence import solve_in_sequence
from ulbq.methods.training import BlockTraining
from ulbq.quantizers.codebook import CodebookQuantizer
from ulbq.solvers import allocation
from ulbq.solvers.allocation import Survey
from ulbq.solvers.claq import ClaqSettings, ColumnPlan, claq
from ulbq.solvers.hessian import HessianFactor, HessianSum, activation_order, factorize, output_cost

_LAYER_BYTES, _REFIT_BYTES = 19.5, 33.0
"""Of each weight: columns in processing order, what they became, in both orders, and codes; to refit, indices of 64
bits, and matrices of errors, of what the codebooks make, and of their products with the second moments."""


class Claq:
    """Column codebooks, adaptive precision and outliers.

    Args:
        options: of budget, passes and training.
        plans: of the columns of each layer, by its full name, where the whole model shares one budget.
    """

    name: ClassVar[str] = "claq"
    Options: ClassVar[type[MethodOptions]] = ClaqOptions

    def __init__(self, options: ClaqOptions, plans: Mapping[str, ColumnPlan] | None = None) -> None:
        self.options = options
        self.scheme = CodebookScheme(bits=options.bits)
        self._plans = plans
        self._training = BlockTraining(
            options, self.scheme, partial(CodebookQuantizer.from_packed, train_weights=options.train_weights)
        )
        self._settings = ClaqSettings(options.column_block, options.refit, options.sweeps, options.as_published)
        trained, full = self._training.needs, options.target_inputs == "full"
        self.needs = dataclasses.replace(
            trained,
            full_precision=full or trained.epochs > 0 or trained.adapter is not None,
            drifts=full,
            hessians="sequence" if options.true_sequential and not options.surveyed else "block",
            saliency=options.saliency if options.surveyed and options.saliency != "none" else trained.saliency,
            survey=options.surveyed,
            heldout_moments=options.sweeps > 0,
            target_bits=None if options.as_published else options.target_bits,
            extra_bits=_extra_bits(options),
            layer_bytes=_REFIT_BYTES if options.refit else _LAYER_BYTES,
            # A column's codebook serves all rows.
            output_groups=int(options.hessian != "plain"),
        )

    @classmethod
    def from_options(cls, options: ClaqOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(options)

    def survey_block(self, task: BlockTask) -> dict[str, Survey]:
        """What bits would do for each layer of a block, by the layer's full name."""
        found: dict[str, Survey] = {}

        def look(linears: Sequence[str], inputs: HessianSum) -> Mapping[str, torch.Tensor]:
            hessian, factor = self._factored(inputs)
            for linear in linears:
                weight = task.weight(linear)
                scores = None if task.saliency is None else task.saliency(linear)
                importance = factor.importance * output_cost(weight, hessian, inputs.tokens, scores)
                found[task.prefix + linear] = allocation.survey(weight, importance, self.options.bits)
            return {}

        solve_in_sequence(task, look, one_by_one=False, **self.options.gathering)
        return found

    def decide(self, surveys: Mapping[str, Survey]) -> dict[str, torch.Tensor]:
        """Widths and outliers of the columns of all layers, the bits of one budget given out among them."""
        base, found = self.options.bits, list(surveys.values())
        sizes = [(one.out_features, one.losses.shape[1]) for one in found]
        surplus, for_outliers = self._surplus(sizes)
        plain = sum(_base_bits(base, *size) for size in sizes)
        plans = allocation.allocate(found, base, plain + surplus, for_outliers)
        widths = {f"{name}.widths": plan.widths for name, plan in zip(surveys, plans, strict=True)}
        return widths | {f"{name}.outliers": plan.outliers for name, plan in zip(surveys, plans, strict=True)}

    def decided(self, decisions: Mapping[str, torch.Tensor]) -> Self:
        """The method with these widths and outliers."""
        names = [name.removesuffix(".widths") for name in decisions if name.endswith(".widths")]
        plans = {name: ColumnPlan(decisions[f"{name}.widths"], decisions[f"{name}.outliers"]) for name in names}
        return type(self)(self.options, plans)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block from the inputs of its layers, or take it from an artifact; train where asked to."""
        if task.start is not None:
            return self._training.quantize(task)
        solved = self._solve_block(task)
        if not self.needs.epochs and self.needs.adapter is None:
            return solved
        start = BlockStart(solved.packed, {}, schemes=solved.schemes)
        return dataclasses.replace(self._training.quantize(dataclasses.replace(task, start=start)), notes=solved.notes)

    def _solve_block(self, task: BlockTask) -> BlockResult:
        packed: dict[str, Packed] = {}
        schemes: dict[str, AnyScheme] = {}
        notes: list[tuple[str, str]] = []
        budgets = self._budgets({linear: task.weight(linear) for linear in task.linears})

        def solve(linears: Sequence[str], inputs: HessianSum) -> Mapping[str, torch.Tensor]:
            hessian, factor = self._factored(inputs)
            note = self._note(inputs, factor)
            if note:
                notes.append((", ".join(linears), f"{note}."))

            def clustered(linear: str) -> tuple[AnyScheme, Packed]:
                weight = task.weight(linear)
                plan = self._plan(task.prefix + linear, weight, factor, budgets[linear])
                plan = ColumnPlan(plan.widths.to(weight.device), plan.outliers.to(weight.device))
                heldout = None if inputs.heldout is None else inputs.heldout.matrix
                columns = claq(weight, hessian, factor, plan, self._settings, heldout).columns
                scheme = allocation.scheme_of(plan, self.options.bits)
                return scheme, codebook.pack(scheme, columns)

            found = distributed.shared(linears, clustered, hessian.device)
            made = {}
            for linear, (schemes[linear], packed[linear]) in zip(linears, found, strict=True):
                made[linear] = formats.dequantize(schemes[linear], packed[linear], len(hessian))
            return made

        one_by_one, heldout = self.options.true_sequential, self.needs.heldout_moments
        solve_in_sequence(task, solve, one_by_one=one_by_one, heldout=heldout, **self.options.gathering)
        task.restore()
        return BlockResult({linear: packed[linear] for linear in task.linears}, schemes=schemes, notes=tuple(notes))

    def _factored(self, inputs: HessianSum) -> tuple[torch.Tensor, HessianFactor]:
        """Second moments and their factor; where there are too few tokens, of columns that know nothing of others."""
        hessian = inputs.matrix
        if inputs.few:
            hessian = hessian.diagonal().diag()
        order = activation_order(hessian) if self.options.act_order else None
        return hessian, factorize(hessian, damping=self.options.damping, order=order)

    def _note(self, inputs: HessianSum, factor: HessianFactor) -> str:
        """What has to be said of layers that read an input; empty for nothing."""
        if inputs.few:
            few = f"{inputs.known_by} tokens are too few for {inputs.columns}"
            return f"errors are not made good in other columns, {few}"
        if factor.damping > self.options.damping:
            return f"damping raised to {factor.damping:g}, its inputs are singular"
        return ""

    def _surplus(self, sizes: Sequence[tuple[int, int]]) -> tuple[float, float | None]:
        """Bits that matrices ``(out, in)`` have beyond those of base widths, and how many of them are outliers'.

        None for as many as pay.
        """
        options, weights = self.options, sum(rows * columns for rows, columns in sizes)
        reserved = None if options.outlier_bits is None else options.outlier_bits * weights
        if options.target_bits is None:
            return reserved or 0.0, reserved or 0.0
        plain = sum(_base_bits(options.bits, *size) for size in sizes)
        surplus = max(0.0, options.target_bits * weights - plain)
        return surplus, None if reserved is None else min(reserved, surplus)

    def _budgets(self, weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float | None]]:
        """Surplus of each layer of a block, and what of it outliers get; as much for a weight in all of them."""
        sizes = {linear: (weight.shape[0], weight.shape[1]) for linear, weight in weights.items()}
        surplus, for_outliers = self._surplus(list(sizes.values()))
        total = sum(rows * columns for rows, columns in sizes.values())
        shares = {linear: rows * columns / total for linear, (rows, columns) in sizes.items()}
        return {
            linear: (surplus * share, None if for_outliers is None else for_outliers * share)
            for linear, share in shares.items()
        }

    def _plan(
        self, name: str, weight: torch.Tensor, factor: HessianFactor, budget: tuple[float, float | None]
    ) -> ColumnPlan:
        """Widths and outliers of a layer's columns."""
        options, (surplus, for_outliers) = self.options, budget
        base, (rows, columns) = options.bits, weight.shape
        if self._plans is not None:
            return self._plans[name]
        if not options.allocated:
            return allocation.base_plan(columns, base)
        plain = _base_bits(base, rows, columns)
        if options.allocation == "layer":
            found = allocation.survey(weight, factor.importance, base)
            return allocation.allocate([found], base, plain + surplus, for_outliers)[0]
        by_outliers = options.allocation == "outlier"
        order = allocation.outlier_order(weight) if by_outliers else allocation.hessian_order(weight, factor.importance)
        if options.as_published:
            nominal = options.outlier_bits or 0.0
            target = options.bits if options.target_bits is None else options.target_bits - nominal
            return allocation.published_plan(order, factor.order, rows, base, target, nominal)
        return allocation.allocate_by_order(order, rows, base, plain + surplus, for_outliers or 0.0)


def _base_bits(base: allocation.Base, rows: int, columns: int) -> int:
    return allocation.bits_of(allocation.base_plan(columns, base), base, rows)


def _extra_bits(options: ClaqOptions) -> float:
    """About how many bits a weight come on top of columns of ``bits``, where no true target tells."""
    outlier_bits = options.outlier_bits or 0.0
    if options.as_published:
        wider = 0.0 if options.target_bits is None else options.target_bits - outlier_bits - options.bits
        # Taken at both tails, twice as many as are counted.
        return wider + 2 * outlier_bits / allocation.NOMINAL_OUTLIER_BITS * allocation.OUTLIER_BITS
    return outlier_bits if options.target_bits is None else 0.0
