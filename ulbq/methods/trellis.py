"""Trellis-coded weights (QTIP, https://arxiv.org/abs/2406.11235), solved layer by layer.

Each layer's weight is moved between two Hadamard transforms, where its elements look like Gaussian noise, and coded
there in tiles, errors made good in later tiles by the second moments of the layer's inputs in the quantized model.
Beyond the paper, every token counts by its relative error, and rows are scaled so that their common error is least.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

import torch

from ulbq import distributed
from ulbq.config.groups import MethodOptions
from ulbq.config.methods import TrellisOptions
from ulbq.formats import AnyScheme, trellis
from ulbq.formats.trellis import TrellisScheme
from ulbq.methods.base import BlockResult, BlockTask, Needs, Packed, check_packed
from ulbq.methods.in_sequence import solve_in_sequence
from ulbq.methods.refinement import Refinement
from ulbq.methods.training import COPIES_HELD, copies_of_weights
from ulbq.solvers.hessian import HessianSum, output_cost
from ulbq.solvers.trellis import Demand, allocate, demand, solve

_LAYER_BYTES = 31.0
"""Of each weight: between the transforms, in processing order, as found by tiles and as rows, and to fit the scales."""


class TrellisMethod:
    """Trellis codes with errors made good in later tiles.

    Args:
        options: bits, states and the rest.
    """

    name: ClassVar[str] = "trellis"
    Options: ClassVar[type[MethodOptions]] = TrellisOptions

    def __init__(self, options: TrellisOptions) -> None:
        self.options = options
        self.scheme = TrellisScheme(bits=options.bits, state_bits=options.state_bits)
        budget = options.target_bits is not None
        copies = copies_of_weights(options.optimizer, trained=options.weight_lr > 0) if options.epochs else 0
        self.needs = Needs(
            epochs=options.epochs,
            copies=copies,
            parted=max(0, copies - COPIES_HELD),
            full_precision=options.target_inputs == "full" or options.epochs > 0,
            drifts=options.target_inputs == "full",
            searches=True,
            hessians="sequence" if options.true_sequential and not budget else "block",
            saliency=options.saliency if budget and options.saliency != "none" else None,
            survey=budget,
            target_bits=options.target_bits,
            # The transform mixes all rows.
            output_groups=int(options.hessian != "plain"),
            between_outputs=options.hessian == "two-sided",
            end_to_end=options.end_to_end_settings(),
            continues=options.end_to_end != "none" or options.epochs > 0,
            layer_bytes=_LAYER_BYTES,
        )

    @classmethod
    def from_options(cls, options: TrellisOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(options)

    def survey_block(self, task: BlockTask) -> dict[str, Demand]:
        """What bits would do for each layer of a block, by the layer's full name."""
        found: dict[str, Demand] = {}

        def look(linears: Sequence[str], inputs: HessianSum) -> Mapping[str, torch.Tensor]:
            hessian = self._hessian(inputs)
            for linear in linears:
                weight = task.weight(linear)
                scores = None if task.saliency is None else task.saliency(linear)
                cost = output_cost(weight, hessian, inputs.tokens, scores)
                found[task.prefix + linear] = demand(weight, hessian, cost, **self.options.feedback)
            return {}

        solve_in_sequence(task, look, one_by_one=False, **self.options.gathering)
        return found

    def decide(self, surveys: Mapping[str, Demand]) -> dict[str, torch.Tensor]:
        """Bits of all layers, those of one budget given out among them."""
        weights = sum(rows * columns for rows, columns in (one.shape for one in surveys.values()))
        schemes = allocate(list(surveys.values()), self.scheme, (self.options.target_bits or 0.0) * weights)
        return {f"{name}.bits": torch.tensor(scheme.bits) for name, scheme in zip(surveys, schemes, strict=True)}

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block from the inputs of its layers, or take it from an artifact; train where asked to."""
        refinement = Refinement(task, self.options.settings()) if self.options.epochs else None
        if task.start is not None and refinement is not None:
            return refinement.go_on(task.start, self.scheme)
        packed: dict[str, Packed] = {}
        schemes: dict[str, AnyScheme] = {}
        notes: list[tuple[str, str]] = []

        def solve_layers(linears: Sequence[str], inputs: HessianSum) -> Mapping[str, torch.Tensor]:
            hessian = self._hessian(inputs)
            if inputs.few:
                few = f"{inputs.known_by} tokens are too few for {len(hessian)} columns"
                notes.append((", ".join(linears), f"errors are not made good in other tiles, {few}."))
            schemes.update({linear: self._scheme(task, linear) for linear in linears})

            def coded(linear: str) -> tuple[Packed, torch.Tensor, float]:
                weight, scheme = task.weight(linear), self._scheme(task, linear)
                generator = torch.Generator().manual_seed(task.seed ^ zlib.crc32(linear.encode()))
                between = task.between(linear)
                found = solve(weight, hessian, scheme, generator, outputs=between, **self.options.feedback)
                stored = trellis.pack(scheme, found.trellis)
                check_packed(linear, scheme, stored, found.weight)
                return stored, found.weight, found.damping

            made = {}
            shared = distributed.shared(linears, coded, hessian.device)
            for linear, (packed[linear], made[linear], damping) in zip(linears, shared, strict=True):
                if damping > self.options.damping:
                    notes.append((linear, f"damping raised to {damping:g}, its inputs are singular."))
            return made

        settle = None if refinement is None else partial(refinement.train, packed, schemes)
        one_by_one = self.options.true_sequential
        solve_in_sequence(task, solve_layers, one_by_one=one_by_one, settle=settle, **self.options.gathering)
        ordered = {linear: packed[linear] for linear in task.linears}
        found = BlockResult(ordered, schemes=task.schemes, notes=tuple(notes))
        if refinement is None:
            return found
        return dataclasses.replace(found, dense=refinement.moved(), outcome=refinement.outcome)

    def _scheme(self, task: BlockTask, linear: str) -> TrellisScheme:
        """How a layer is stored."""
        own = task.schemes.get(linear, self.scheme)
        if not isinstance(own, TrellisScheme):
            raise TypeError(f"'{linear}' is {own.format}")
        return own

    def _hessian(self, inputs: HessianSum) -> torch.Tensor:
        """Second moments; where there are too few tokens, of columns that know nothing of each other."""
        return inputs.diagonal.diag() if inputs.few else inputs.matrix
