"""Hidden states on their way through a model's blocks, and the gradient of the loss on its way back."""

from collections.abc import Collection, Iterator
from math import ceil, isqrt
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq import distributed
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.walk import BlockWalk
from ulbq.errors import NumericsError
from ulbq.models.blocks import block_list
from ulbq.models.source import ModelSource
from ulbq.progress import Phase
from ulbq.sensitivity.head import LossHead
from ulbq.sensitivity.settings import PassSettings

BACK = 3
"""Steps that a block's way back counts as, where its way forward counts as one: that again, and twice as much back."""


def kept_every(blocks: int, *, fits: bool) -> int:
    """Of how many blocks the inputs of one are kept: of each where memory holds all, else so that least is stored."""
    return 1 if fits else max(1, isqrt(blocks))


def kept_stores(blocks: int, every: int) -> int:
    """How many blocks' inputs are there at once, those of one stretch that is run again and the outputs too."""
    return ceil(blocks / every) + every


class Passing:
    """One block at a time forward, inputs kept, and one at a time back.

    Where memory holds the inputs of all blocks they are kept. Else those of every n-th block are, and on the way back
    the blocks between two of them run once more: on disk lie twice the root of as many stores instead of all, for one
    way forward in three. The numbers are the same. Of several processes each has its share of the samples.

    Args:
        model: a skeleton of the source's model.
        samples: those of all processes.
        settings: of the passes.
        scratch: for activations beyond the settings' ``activation_memory``.

    Attributes:
        samples: of all processes together.
        walk: over the blocks.
    """

    def __init__(
        self, model: PreTrainedModel, source: ModelSource, samples: Samples, settings: PassSettings, scratch: Path
    ) -> None:
        self._model, self._source, self._settings = model, source, settings
        self.samples = len(samples)
        samples = distributed.own(samples)
        self._tokens = samples.tokens
        self._scratch = scratch
        self._room = settings.activation_memory
        self.walk = BlockWalk(
            model,
            source,
            samples,
            dtype=torch.float32,
            device=settings.precision.device,
            limit=self._room,
            directory=scratch,
            batch_size=settings.batch_size,
        )
        self._blocks, hidden = len(block_list(model)[1]), self.walk.hidden
        # Images add to hidden states between blocks, once.
        fits = samples.inputs is not None or hidden.nbytes * (self._blocks + 1) <= settings.activation_memory
        self._every = kept_every(self._blocks, fits=fits)
        self._stores = {0: self._counted(hidden)}

    def both_ways(
        self, done: Collection[int], phase: Phase, seed: int | None = None
    ) -> Iterator[tuple[int, nn.Module, float]]:
        """Pass all blocks forward, and go back as far as the first that is not ``done``.

        Args:
            phase: told of every block.
            seed: as of :meth:`turn`.

        Yields:
            On the way back each block's index, the block, through which the caller takes the gradient
            (:meth:`backward`), and the mean loss.
        """
        for index in range(self._blocks):
            self.forward(index, self.walk.load(index), keep=True)
            phase.advance(detail=f"block {index} forward")
        loss = self.turn(seed)
        first = min(index for index in range(self._blocks) if index not in done)
        for index in reversed(range(first, self._blocks)):
            self.reach(index)
            yield index, self.walk.load(index), loss
            phase.advance(BACK, detail=f"block {index} backward")
        phase.advance(BACK * first)

    def forward(self, index: int, block: nn.Module, *, keep: bool) -> None:
        """Pass a block; ``keep`` what the way back wants of its inputs."""
        kept = keep and index % self._every == 0
        inputs = self._stores[index] if kept else self._stores.pop(index)
        outputs = self._like(inputs) if kept else inputs
        self._advance(index, block, inputs, outputs)
        self.walk.add_between(index, outputs)
        self._stores[index + 1] = outputs

    def reach(self, index: int) -> None:
        """Have the inputs of a block there on the way back: those that were not kept are computed again."""
        for before in range(max(kept for kept in self._stores if kept <= index), index):
            inputs = self._stores[before]
            self._stores[before + 1] = self._like(inputs)
            self._advance(before, self.walk.load(before), inputs, self._stores[before + 1])

    def _advance(self, index: int, block: nn.Module, inputs: ActivationStore, outputs: ActivationStore) -> None:
        settings = self._settings
        self.walk.advance(
            index, block, inputs, outputs, batch_size=settings.batch_size, context=settings.precision.autocast
        )

    def turn(self, seed: int | None = None) -> float:
        """Put the gradient in the place of the last block's outputs. Returns the mean loss of the sequences.

        Args:
            seed: of tokens that the model predicts, drawn where the text's own would be; None for the text's own.
        """
        outputs, precision = self._stores[max(self._stores)], self._settings.precision
        head = LossHead(self._model, self._source, precision, extras=self.walk.extras)
        losses = torch.empty(len(self._tokens), dtype=torch.float64)
        for row in range(len(self._tokens)):
            hidden = outputs.get(slice(row, row + 1), precision.device)
            tokens, drawn = self._tokens[row : row + 1].to(precision.device), None
            if seed is not None:
                sample = distributed.rank() + row * distributed.size()
                drawn = torch.Generator(precision.device).manual_seed(seed + sample)
            losses[row], gradient = head.gradient(hidden, tokens, drawn)
            outputs.set(row, gradient)
        if not losses.isfinite().all():
            raise NumericsError(
                "The model's loss on the samples is not finite.", hint="Try `precision=fp32`; the model may be damaged."
            )
        return distributed.mean(losses).item()

    def backward(self, index: int, block: nn.Module) -> None:
        """Take the gradient from behind a block to before it. Its inputs, now of no more use, are let go.

        They have to be there (:meth:`reach`).
        """
        gradients, inputs = self._stores.pop(index + 1), self._stores[index]
        for row in range(len(self._tokens)):
            one = slice(row, row + 1)
            hidden = inputs.get(one, self._settings.precision.device).requires_grad_()
            with self._settings.precision.autocast():
                output = self.walk.call(index, block, hidden, row)
            if output.requires_grad:
                torch.autograd.backward(output, gradients.get(one).to(output))
            if hidden.grad is not None:
                gradients.set(row, hidden.grad)
        self._stores[index] = gradients
        self._room += inputs.nbytes if inputs.in_memory else 0

    def _like(self, store: ActivationStore) -> ActivationStore:
        return self._counted(ActivationStore(store.shape, store.dtype, limit=self._room, directory=self._scratch))

    def _counted(self, store: ActivationStore) -> ActivationStore:
        self._room -= store.nbytes if store.in_memory else 0
        return store
