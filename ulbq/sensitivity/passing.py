"""Hidden states on their way through a model's blocks, and the gradient of the loss on its way back."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq import distributed
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.walk import BlockWalk
from ulbq.errors import NumericsError
from ulbq.models.source import ModelSource
from ulbq.sensitivity.head import LossHead
from ulbq.sensitivity.settings import PassSettings


class Passing:
    """One block at a time forward, every block's inputs kept, and one at a time back.

    Of several processes each has its share of the samples.

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
        self._stores = [self._counted(self.walk.hidden)]

    def forward(self, index: int, block: nn.Module, *, keep: bool) -> None:
        """Pass a block; ``keep`` its inputs for the way back."""
        inputs, settings = self._stores[-1], self._settings
        outputs = self._like(inputs) if keep else inputs
        self.walk.advance(
            index, block, inputs, outputs, batch_size=settings.batch_size, context=settings.precision.autocast
        )
        self.walk.add_between(index, outputs)
        if keep:
            self._stores.append(outputs)

    def turn(self, seed: int | None = None) -> float:
        """Put the gradient in the place of the last block's outputs. Returns the mean loss of the sequences.

        Args:
            seed: of tokens that the model predicts, drawn where the text's own would be; None for the text's own.
        """
        outputs, precision = self._stores[-1], self._settings.precision
        head = LossHead(self._model, self._source, precision, extras=self.walk.extras)
        losses = torch.empty(len(self._tokens), dtype=torch.float64)
        for row in range(len(self._tokens)):
            hidden = outputs.get(slice(row, row + 1)).to(precision.device)
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
        """Take the gradient from behind a block to before it. Its inputs, now of no more use, are let go."""
        gradients, inputs = self._stores.pop(), self._stores[-1]
        for row in range(len(self._tokens)):
            one = slice(row, row + 1)
            hidden = inputs.get(one).to(self._settings.precision.device).requires_grad_()
            with self._settings.precision.autocast():
                output = self.walk.call(index, block, hidden, row)
            if output.requires_grad:
                torch.autograd.backward(output, gradients.get(one).to(output))
            if hidden.grad is not None:
                gradients.set(row, hidden.grad)
        self._stores[-1] = gradients
        self._room += inputs.nbytes if inputs.in_memory else 0

    def _like(self, store: ActivationStore) -> ActivationStore:
        return self._counted(ActivationStore(store.shape, store.dtype, limit=self._room, directory=self._scratch))

    def _counted(self, store: ActivationStore) -> ActivationStore:
        self._room -= store.nbytes if store.in_memory else 0
        return store
