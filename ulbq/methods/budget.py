"""One budget of bits for all layers of affine codes, given out by what their errors cost at the layers' outputs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ulbq.config.methods import ApiQOptions, EfficientQatOptions, GptqOptions
from ulbq.formats import AffineScheme, UniformScheme, total_bits
from ulbq.methods.base import BlockTask, Needs
from ulbq.methods.in_sequence import solve_in_sequence
from ulbq.methods.rtn import uniform_of
from ulbq.solvers.allocation import Priced, give_out
from ulbq.solvers.hessian import HessianSum, output_cost
from ulbq.solvers.rtn import round_to_nearest

WIDTHS = (1, 2, 3, 4, 8)
SURVEY_BYTES = 17.0
"""Of each weight of a layer: codes, what they stand for, its error and the square of that."""


class Widths(NamedTuple):
    """What bits would do for layers that read the same input; they get the same, for engines make one layer of them.

    Attributes:
        weights: of all of them.
        choices: by the widths of :data:`WIDTHS`, from that which all layers have at least.
    """

    weights: int
    choices: list[Priced]


def budgeted(needs: Needs, target_bits: float | None, saliency: str) -> Needs:
    """What a method that trains wants prepared besides, where it has a budget."""
    if target_bits is None:
        return needs
    return dataclasses.replace(
        needs,
        survey=True,
        target_bits=target_bits,
        saliency=needs.saliency if saliency == "none" else saliency,
        hessians="block",
        layer_bytes=max(needs.layer_bytes, SURVEY_BYTES),
    )


class WidthsOfBudget:
    """A method whose layers may have the widths that one budget gives them: those of affine codes.

    Attributes:
        scheme: what every layer has at least.
        options: the budget, and how tokens count.
    """

    scheme: UniformScheme
    options: GptqOptions | ApiQOptions | EfficientQatOptions

    @property
    def _widths(self) -> list[int]:
        return [bits for bits in WIDTHS if bits >= self.scheme.bits]

    def survey_block(self, task: BlockTask) -> dict[str, Widths]:
        """What bits would do for a block's layers, by their full names with commas.

        Every layer is rounded at every width. An error counts by the second moments of the layer's inputs, and by what
        :func:`~ulbq.solvers.hessian.output_cost` says of its outputs.
        """
        found: dict[str, Widths] = {}

        def look(linears: Sequence[str], inputs: HessianSum) -> Mapping[str, torch.Tensor]:
            hessian = inputs.matrix
            moments = hessian.diagonal()
            losses = dict.fromkeys(self._widths, 0.0)
            stored, weights = dict.fromkeys(losses, 0), 0
            for linear in linears:
                weight = task.weight(linear)
                weights += weight.numel()
                scores = None if task.saliency is None else task.saliency(linear)
                cost = output_cost(weight, hessian, inputs.tokens, scores)
                for bits in losses:
                    own = _affine_of(task, linear, self.scheme).model_copy(update={"bits": bits})
                    codes, scales, zeros = round_to_nearest(weight, own, importance=moments if moments.any() else None)
                    steps = codes.view(*scales.shape, -1) - zeros.unsqueeze(-1)
                    error = steps.mul_(scales.unsqueeze(-1)).flatten(1).sub_(weight)
                    losses[bits] += cost * (error.square_() @ moments).sum().item()
                    stored[bits] += total_bits(own, (weight.shape[0], weight.shape[1]))
            names = ",".join(task.prefix + linear for linear in linears)
            found[names] = Widths(weights, [Priced(stored[bits], loss) for bits, loss in losses.items()])
            return {}

        solve_in_sequence(task, look, one_by_one=False, weighting=self.options.token_weighting)
        return found

    def decide(self, surveys: Mapping[str, Widths]) -> dict[str, torch.Tensor]:
        """Bits of all layers, by their full names and ``.bits``: one budget given out among them."""
        budget = (self.options.target_bits or 0.0) * sum(one.weights for one in surveys.values())
        taken = give_out([one.choices for one in surveys.values()], budget)
        return {
            f"{name}.bits": torch.tensor(self._widths[index])
            for names, index in zip(surveys, taken, strict=True)
            for name in names.split(",")
        }


def _affine_of(task: BlockTask, linear: str, scheme: UniformScheme) -> AffineScheme:
    own = uniform_of(task, linear, scheme)
    if not isinstance(own, AffineScheme):
        raise TypeError(f"'{linear}' is {own.format}, whose widths no budget gives out")
    return own
