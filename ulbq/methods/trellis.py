"""Trellis-coded weights (QTIP, https://arxiv.org/abs/2406.11235), solved layer by layer, no training.

Each layer's weight is moved between two Hadamard transforms, where its elements look like Gaussian noise, and coded
there in tiles, errors made good in later tiles by the second moments of the layer's inputs in the quantized model.
Beyond the paper, every token counts by its relative error, and rows are scaled so that their common error is least.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch

from ulbq import formats
from ulbq.config.methods import MethodOptions, TrellisOptions
from ulbq.formats import trellis
from ulbq.formats.trellis import TrellisScheme
from ulbq.methods.base import BlockResult, BlockTask, Needs, Packed
from ulbq.methods.in_sequence import FEWEST_TOKENS, solve_in_sequence
from ulbq.solvers.hessian import HessianSum
from ulbq.solvers.trellis import solve


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
        self.needs = Needs(
            full_precision=False, searches=True, hessians="sequence" if options.true_sequential else "block"
        )

    @classmethod
    def from_options(cls, options: TrellisOptions, group_size: int) -> Self:
        """The method that a request asks for."""
        return cls(options)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block from the inputs of its layers."""
        packed: dict[str, Packed] = {}
        notes: list[tuple[str, str]] = []

        def solve_layers(linears: Sequence[str], inputs: HessianSum) -> Mapping[str, torch.Tensor]:
            hessian, made = inputs.matrix, {}
            if inputs.tokens < FEWEST_TOKENS * len(hessian):
                hessian = hessian.diagonal().diag()
                notes.append((", ".join(linears), f"{inputs.tokens} tokens are too few for {len(hessian)} columns."))
            for linear in linears:
                weight = task.weight(linear)
                generator = torch.Generator().manual_seed(task.seed ^ zlib.crc32(linear.encode()))
                found = solve(weight, hessian, self.scheme, generator, self.options.damping)
                packed[linear] = trellis.pack(self.scheme, found.trellis)
                made[linear] = formats.dequantize(self.scheme, packed[linear], weight.shape[1])
            return made

        solve_in_sequence(
            task, solve_layers, one_by_one=self.options.true_sequential, weighting=self.options.token_weighting
        )
        return BlockResult({linear: packed[linear] for linear in task.linears}, notes=tuple(notes))
