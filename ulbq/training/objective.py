"""What a block minimizes: the distance of its output to the full-precision one, and the penalty on its weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ulbq import distributed
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.arguments import Arguments, run_block
from ulbq.config.stages import Stage
from ulbq.config.training import TrainSettings
from ulbq.training.attention import chunked_attention
from ulbq.training.fused import FusedParts
from ulbq.training.linear import TrainedLinear
from ulbq.training.losses import output_loss, sliced_wasserstein, spurious_sinks, token_weights
from ulbq.training.precision import Precision

Penalty = Callable[[Mapping[str, TrainedLinear]], torch.Tensor]


@dataclass(frozen=True)
class BlockData:
    """Inputs and targets of one block.

    Of several processes each holds its share of the samples, as :func:`ulbq.distributed.rows` tells.

    Attributes:
        inputs: ``x_q [samples, length, hidden]``, the stream through the quantized blocks before.
        targets: ``f_fp(x_fp)``, the full-precision stream behind this block.
        augmented: ``f_fp(x_q)``, for the augmented loss; None without it.
        kwargs: the block's other arguments (position embeddings, mask).
        training: the first so many samples train, the rest are held out; of all processes together.
        originals: ``x_fp``, the full-precision stream before this block; None unless the method asks for it.
    """

    inputs: ActivationStore
    targets: ActivationStore
    augmented: ActivationStore | None
    kwargs: Arguments
    training: int
    originals: ActivationStore | None = None


class Validation(NamedTuple):
    """How a block does on the samples that are held out.

    Attributes:
        error: the output loss.
        sinks: tokens that became attention sinks, which they are not in full precision.
    """

    error: float
    sinks: int


class Objective:
    """The loss of a block, of a batch that trains or of the samples held out.

    Samples are named by their numbers among those of all processes; of each batch a process runs what it holds.

    Args:
        block: with its linears replaced by :class:`TrainedLinear`.
        data: inputs and targets.
        settings: token weighting, augmented loss and the like.
        precision: device and dtype.
        penalty: on the weights; None for none.
    """

    def __init__(
        self, block: nn.Module, data: BlockData, settings: TrainSettings, precision: Precision, penalty: Penalty | None
    ) -> None:
        self._block = block
        self._data = data
        self._settings = settings
        self._precision = precision
        self._penalty = penalty
        self._samples = int(distributed.total(len(data.inputs))[0])
        self.layers = {name: m for name, m in block.named_modules() if isinstance(m, TrainedLinear)}
        self._adapters = [layer for layer in self.layers.values() if layer.adapter is not None]
        self._fused = FusedParts(block, precision)

    def learns(self, stage: Stage) -> bool:
        """Whether anything that trains has a part in a stage's loss; a penalty may reach frozen weights alone."""
        if stage.output:
            return True
        return bool(stage.penalty) and self._penalty is not None and self._penalty(self.layers).requires_grad

    def training(self, batch: torch.Tensor, stage: Stage, generator: torch.Generator) -> torch.Tensor:
        """Loss of a batch of training samples, differentiable; ``generator`` draws what is random in it.

        Of several processes each gets a part, and their sum is the loss. A process that holds none of the samples may
        get a part that depends on nothing.
        """
        share = self._settings.base_share if self._adapters else 0.0
        alone = bool(share) and torch.rand((), generator=generator).item() < share
        loss = torch.zeros((), device=self._precision.device)
        if stage.output:
            loss = loss + stage.output * self._output(batch, adapted=not alone, generator=generator)
        if stage.penalized and self._penalty is not None and stage.penalty:
            loss = loss + stage.penalty * self._penalty(self.layers) / distributed.size()
        self.forget()
        return loss

    def forget(self) -> None:
        """What a step leaves behind must not be taken for the next step's."""
        for layer in self.layers.values():
            layer.matrix = None

    @torch.no_grad()
    def validation_loss(self, stage: Stage, output: Validation | None = None) -> float:
        """The same loss on the held-out samples, the random parts left out; with and without the adapter by share.

        Args:
            output: what :meth:`validation_output` gives, where that is known.
        """
        value = 0.0
        if stage.output:
            value = stage.output * (self.validation_output() if output is None else output).error
        if stage.penalized and self._penalty is not None and stage.penalty:
            value += stage.penalty * self._penalty(self.layers).item()
        return value

    @torch.no_grad()
    def validation_output(self) -> Validation:
        """Output loss on the held-out samples, and what sinks there are with the adapter."""
        share = self._settings.base_share if self._adapters else 0.0
        adapted = self._mean_output(adapted=True)
        if not share:
            return adapted
        alone = self._mean_output(adapted=False)
        return adapted._replace(error=(1 - share) * adapted.error + share * alone.error)

    def _mean_output(self, *, adapted: bool) -> Validation:
        indices = torch.arange(self._data.training, self._samples)
        loss, sinks = 0.0, 0
        for batch in indices.split(self._settings.batch_size):
            own = distributed.rows(batch)
            targets = self._data.targets.get(own, self._precision.device)
            weights = token_weights(targets, self._settings.token_weighting)
            if len(own):
                outputs = self._run(own, adapted=adapted, training=False)
                loss += self._distance(outputs, targets, weights, own).item() * len(own)
                sinks += spurious_sinks(outputs, targets)
        loss, everywhere = distributed.total(loss, sinks)
        return Validation(loss / len(indices), int(everywhere))

    def _output(self, batch: torch.Tensor, *, adapted: bool, generator: torch.Generator) -> torch.Tensor:
        device = self._precision.device
        own = distributed.rows(batch)
        targets = self._data.targets.get(own, device)
        weights = token_weights(targets, self._settings.token_weighting)
        if not len(own):
            return torch.zeros((), device=device)
        outputs = self._run(own, adapted=adapted, training=True)
        loss = self._distance(outputs, targets, weights, own)
        if self._settings.sliced_wasserstein:
            distance = sliced_wasserstein(outputs, targets, generator)
            # Brought to the output loss's size, as published: its own would depend on the batch.
            scale = (loss / distance.clamp_min(torch.finfo(torch.float32).tiny)).detach()
            loss = loss + self._settings.sliced_wasserstein * scale * distance
        return loss * (len(own) / len(batch))

    def _run(self, own: torch.Tensor, *, adapted: bool, training: bool) -> torch.Tensor:
        """What the block makes of some of this process's samples, ``[batch, length, hidden]``."""
        settings = self._adapters_set(adapted=adapted, training=training)
        with settings, chunked_attention(self._precision), self._fused.active(), self._precision.autocast():
            hidden = self._data.inputs.get(own, self._precision.device)
            return run_block(self._block, hidden, self._data.kwargs, own)

    def _distance(
        self, outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        """The output loss, with its augmented part where there is one."""
        weighting, augmented = self._settings.token_weighting, self._data.augmented
        loss = output_loss(outputs, targets, weights, weighting)
        if augmented is not None:
            loss = loss + output_loss(outputs, augmented.get(own, targets.device), weights, weighting)
        return loss

    @contextmanager
    def _adapters_set(self, *, adapted: bool, training: bool) -> Iterator[None]:
        """Adapters switched on or off, with dropout in training alone; afterwards on and without, as others expect."""
        for layer in self._adapters:
            layer.adapted = adapted
            layer.train(training)
        try:
            yield
        finally:
            for layer in self._adapters:
                layer.adapted = True
                layer.eval()
