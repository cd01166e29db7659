"""What is not solved yet learns to make good what is (QTIP, https://arxiv.org/abs/2406.11235).

After the layers that read one input are coded, the block trains towards its full-precision output: the weights of
layers that are still to come, the vectors around the codes that are there, and the norms.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ulbq import formats
from ulbq.config.training import TrainSettings
from ulbq.formats import AnyScheme
from ulbq.methods.base import BlockResult, BlockStart, BlockTask, Packed
from ulbq.methods.training import beginning_vectors, half_vector, own_randomness, pack_layer, vectors_beside
from ulbq.nn.quant_linear import linear_layer
from ulbq.quantizers.base import Quantizer
from ulbq.quantizers.trainable import TRAINABLE
from ulbq.quantizers.unquantized import Unquantized
from ulbq.training.block import BlockTrainer, TrainOutcome
from ulbq.training.linear import TrainedLinear
from ulbq.training.pieces import Pieces


class Refinement:
    """Training between the layers of one block.

    Args:
        task: with activations and what the block shall give. An artifact's vectors are put into the block.
        settings: of the training.
    """

    def __init__(self, task: BlockTask, settings: TrainSettings) -> None:
        if task.data is None:
            raise ValueError("training needs activations")
        self._task = task
        self._data = task.data
        self._settings = settings
        self._before = beginning_vectors(task)
        self._outcomes: list[TrainOutcome] = []
        self._pieces = Pieces()

    def train(self, packed: dict[str, Packed], schemes: Mapping[str, AnyScheme]) -> None:
        """Train the block as it stands, and leave it with dense layers again.

        Args:
            packed: stored tensors of the layers that are coded; changed in place where their vectors move.
            schemes: of those.

        Raises:
            NumericsError: what was packed is not what was trained.
        """
        task, block = self._task, self._task.block
        dense = {linear: linear_layer(block, linear) for linear in task.linears}
        quantizers: dict[str, Quantizer] = {}
        for linear, layer in dense.items():
            weight, scheme = layer.weight.detach(), schemes.get(linear)
            if scheme is None:
                quantizers[linear] = Unquantized(weight)
            else:
                stored = {name: tensor.to(weight.device) for name, tensor in packed[linear].items()}
                fixed = TRAINABLE[scheme.format].fixed
                quantizers[linear] = fixed.from_packed(weight, stored, scheme, train_weights=False)
            block.set_submodule(linear, TrainedLinear(quantizers[linear].to(weight.device), layer.bias))
        with torch.enable_grad(), own_randomness(task.seed, task.precision.device):
            given: dict[str, Any] = {"pieces": self._pieces, "sharded": task.sharded}
            trainer = BlockTrainer(block, self._data, self._settings, task.precision, **given)
            self._outcomes.append(trainer.train(task.seed, task.on_epoch))
        block.requires_grad_(False)
        for linear, layer in dense.items():
            if linear in schemes:
                packed[linear] = pack_layer(linear, quantizers[linear], 1.0)
                weight = formats.dequantize(schemes[linear], packed[linear], layer.in_features)
            else:
                weight = quantizers[linear]().detach()
            layer.weight = nn.Parameter(weight, requires_grad=False)
            block.set_submodule(linear, layer)

    def go_on(self, start: BlockStart, scheme: AnyScheme) -> BlockResult:
        """Train a block that an artifact holds: its vectors alone, for all of it is coded.

        Args:
            start: of the artifact.
            scheme: of every layer that has none of its own there.
        """
        packed = {linear: dict(tensors) for linear, tensors in start.packed.items()}
        self.train(packed, {linear: start.schemes.get(linear, scheme) for linear in packed})
        # An artifact's vectors that did not change are stored as they came, in their dtype.
        return BlockResult(packed, {**start.vectors, **self.moved()}, self.outcome, schemes=start.schemes)

    @property
    def outcome(self) -> TrainOutcome | None:
        """From the first training's start to the last one's end; None where nothing trained."""
        if not self._outcomes:
            return None
        first, last = self._outcomes[0], self._outcomes[-1]
        return TrainOutcome(
            start_error=first.start_error,
            end_error=last.end_error,
            steps=sum(one.steps for one in self._outcomes),
            retries=sum(one.retries for one in self._outcomes),
            fallback=all(one.fallback for one in self._outcomes),
            diverged=any(one.diverged for one in self._outcomes),
            sinks=last.sinks,
            at_once=last.at_once,
        )

    def moved(self) -> dict[str, torch.Tensor]:
        """Norms that are not the model's any more, as they are stored, by name inside the block."""
        now = vectors_beside(self._task.block, self._task.linears)
        return {name: half_vector(now[name]) for name, old in self._before.items() if not torch.equal(now[name], old)}
