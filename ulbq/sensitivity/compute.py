"""Scores of a model's weights, with one block of it in memory at a time.

``fisher`` is the empirical Fisher information's diagonal as ULB-SAPR weights its penalty: the sum over sequences of the
squared gradient of that sequence's mean cross-entropy. A pass forward keeps the input of every block (on disk beyond a
limit); the head gives the gradient of each sequence's hidden states behind the last block; then each block, from the
last to the first, runs again, one sequence at a time, and hands the gradient on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq import distributed
from ulbq.artifacts import BlockScores
from ulbq.blockwise.samples import Samples
from ulbq.errors import NumericsError
from ulbq.models.blocks import Linear, ModelStructure, load_block
from ulbq.models.source import ModelSource
from ulbq.models.watch import watching
from ulbq.nn.quant_linear import linear_layer
from ulbq.progress import Phase, Progress, Silent
from ulbq.sensitivity.passing import BACK, Passing
from ulbq.sensitivity.settings import BACKWARD, SaliencySettings
from ulbq.sensitivity.stored import block_file, write_scores


def compute_saliency(
    model: PreTrainedModel,
    source: ModelSource,
    found: ModelStructure,
    samples: Samples | None,
    settings: SaliencySettings,
    folder: Path,
    *,
    scratch: Path,
    progress: Progress | None = None,
    done: Mapping[int, BlockScores] | None = None,
    on_block: Callable[[BlockScores], None] = lambda scores: None,
) -> tuple[BlockScores, ...]:
    """Score every linear layer of a model's blocks; writes one file a block, see :func:`block_file`.

    Args:
        model: a skeleton of the source's model.
        found: its structure.
        samples: of text or of images; None for ``magnitude``.
        folder: for the files.
        scratch: for activations beyond the settings' ``activation_memory``.
        progress: told how it goes.
        done: blocks whose files an earlier run wrote. They are only passed through, with the same result for the rest.
        on_block: called as soon as a block's file is written.

    Returns:
        What is to be said of each block, in the model's order. Layers that no sample calls have scores of zero.

    Raises:
        InputError: tokens that the model cannot take, or a model whose blocks are no plain chain.
        ResourceError: the disk is full.
        NumericsError: a loss or a score is not finite.
    """
    run = _Scoring(model, source, found, settings, folder, dict(done or {}), on_block)
    if len(run.done) < found.n_blocks:
        steps = found.n_blocks * (1 + (BACK if settings.kind in BACKWARD else 0))
        with (progress or Silent()).phase(f"Scoring ({settings.kind})", steps) as phase:
            if samples is None:
                run.magnitudes(phase)
            elif settings.kind in BACKWARD:
                run.gradients(Passing(model, source, samples, settings, scratch), phase)
            else:
                run.inputs(Passing(model, source, samples, settings, scratch), phase)
    return tuple(run.done[index] for index in range(found.n_blocks))


@dataclass
class _Scoring:
    """One computation; ``done`` grows as it goes."""

    model: PreTrainedModel
    source: ModelSource
    found: ModelStructure
    settings: SaliencySettings
    folder: Path
    done: dict[int, BlockScores]
    on_block: Callable[[BlockScores], None]

    def load(self, index: int) -> nn.Module:
        """A block in float32, on the device."""
        return load_block(self.model, self.source, index, torch.float32, self.settings.precision.device)

    def layers(self, index: int, block: nn.Module) -> dict[Linear, torch.Tensor]:
        """The weights of a block's linear layers."""
        prefix = self._prefix(index)
        return {
            linear: linear_layer(block, linear.name.removeprefix(prefix)).weight for linear in self.found.linears[index]
        }

    def magnitudes(self, phase: Phase) -> None:
        """Score by |W|."""
        for index in range(self.found.n_blocks):
            if index not in self.done:
                self._write(index, {x: weight.abs() for x, weight in self.layers(index, self.load(index)).items()})
            phase.advance(detail=f"block {index}")

    @torch.no_grad()
    def inputs(self, passing: Passing, phase: Phase) -> None:
        """Score by the inputs of each layer, on one pass forward."""
        for index in range(self.found.n_blocks):
            block = passing.walk.load(index)
            weights = self.layers(index, block)
            names = {linear: linear.name.removeprefix(self._prefix(index)) for linear in weights}
            with _square_sums(block, names) as sums:
                passing.forward(index, block, keep=False)
            if index not in self.done:
                if self.settings.kind == "hessian":
                    self._write(index, {linear: sums[linear].float()[None] for linear in weights})
                else:
                    norms = {linear: sums[linear].sqrt().float() for linear in weights}
                    self._write(index, {linear: weight.abs() * norms[linear] for linear, weight in weights.items()})
            phase.advance(detail=f"block {index}")

    def gradients(self, passing: Passing, phase: Phase) -> None:
        """Score by the gradients of the loss, on one pass forward and one back."""
        for index, block, loss in passing.both_ways(self.done, phase):
            if index in self.done:
                passing.backward(index, block)
            else:
                weights = self.layers(index, block)
                with _accumulating(weights.values(), square=self.settings.kind == "fisher") as sums:
                    passing.backward(index, block)
                share = 1 if self.settings.kind == "fisher" else passing.samples
                self._write(index, {linear: sums[weight] / share for linear, weight in weights.items()}, loss)

    def _write(self, index: int, scores: Mapping[Linear, torch.Tensor], loss: float | None = None) -> None:
        bad = next((linear.name for linear, values in scores.items() if not values.isfinite().all()), None)
        if bad is not None:
            raise NumericsError(
                f"The scores of '{bad}' are not finite.", hint="Try `precision=fp32`; the model may be damaged."
            )
        path = self.folder / block_file(index)
        layers = write_scores(path, index, self._prefix(index), scores, self.settings.dtype)
        self.done[index] = BlockScores(index=index, layers=layers, loss=loss)
        self.on_block(self.done[index])

    def _prefix(self, index: int) -> str:
        return f"{self.found.blocks_prefix}.{index}."


@contextmanager
def _accumulating(weights: Iterable[torch.Tensor], *, square: bool) -> Iterator[dict[torch.Tensor, torch.Tensor]]:
    """Sums over backward passes of each weight's squared or absolute gradient, float32, in the weight's shape.

    Behind the context they are those of all processes.

    A gradient is counted and forgotten as soon as it is whole, before the next weight's is made: hooks on the layers
    would miss a weight that a model uses by itself, and split one that it uses twice.
    """
    sums = {weight: torch.zeros_like(weight) for weight in weights}

    def count(weight: torch.Tensor) -> None:
        gradient = weight.grad
        if gradient is not None:
            with torch.no_grad():
                sums[weight].addcmul_(gradient, gradient) if square else sums[weight].add_(gradient.abs())
        weight.grad = None

    handles = [weight.requires_grad_().register_post_accumulate_grad_hook(count) for weight in sums]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
    distributed.sum_(*sums.values())


@contextmanager
def _square_sums(block: nn.Module, names: Mapping[Linear, str]) -> Iterator[dict[Linear, torch.Tensor]]:
    """Sums over tokens of each layer's squared input, float64 ``[in]``; zeros where no token comes by.

    Behind the context they are those of all processes.
    """
    device = next(block.parameters()).device
    sums = {x: torch.zeros(x.in_features, dtype=torch.float64, device=device) for x in names}

    def add(linear: Linear, inputs: torch.Tensor) -> None:
        sums[linear] += inputs.float().square().flatten(0, -2).sum(0, dtype=torch.float64)

    with watching({linear: block.get_submodule(name) for linear, name in names.items()}, add):
        yield sums
    distributed.sum_(*sums.values())
