"""What all trained methods share: put quantizers and adapters into a block, train, pack, check."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ulbq import distributed, runtime
from ulbq.config.methods import EfficientQatOptions
from ulbq.config.stages import Stage
from ulbq.config.trained import WeightOptions
from ulbq.config.training import OptimizerKind
from ulbq.formats import AnyScheme
from ulbq.methods.base import BlockResult, BlockTask, Needs, Packed, check_packed
from ulbq.nn.adapter import Adapter
from ulbq.nn.quant_linear import linear_layer
from ulbq.quantizers.base import Quantizer
from ulbq.training.block import BlockTrainer
from ulbq.training.layers import LayerwiseTrainer
from ulbq.training.linear import TrainedLinear
from ulbq.training.objective import Penalty
from ulbq.training.penalty import WeightPenalty
from ulbq.training.pieces import Pieces

MakeQuantizer = Callable[[torch.Tensor, torch.Tensor, Any], Quantizer]
"""A quantizer of a weight ``[out, in]``, its importance (``[in]``, the mean squared input) and its scheme."""

GoOn = Callable[[torch.Tensor, Packed, AnyScheme], Quantizer]
"""A quantizer from a weight ``[out, in]`` and what is packed of it (:meth:`Quantizer.from_packed`)."""


COPIES_HELD = 2
"""Copies of a block's weights that each process holds of a block that trains: as read, and as latents."""


class BlockTraining:
    """Block training as a method's options ask for it.

    Args:
        options: of the method.
        scheme: how layers are stored.
        go_on: makes a quantizer that goes on from packed tensors.
    """

    def __init__(self, options: WeightOptions | EfficientQatOptions, scheme: AnyScheme, go_on: GoOn) -> None:
        self._options = options
        self._scheme = scheme
        self._go_on = go_on
        self._adapter = options.adapter_config()
        self._pieces = Pieces()

    @property
    def needs(self) -> Needs:
        """What the blocks' tasks must hold."""
        options = self._options
        weighted, copies = self._penalized(self._stages(0)), self._copies()
        return Needs(
            epochs=sum(stage.epochs for stage in self._stages(0)),
            augmented=options.augmented_loss,
            layerwise=options.granularity == "layer",
            continues=True,
            adapter=self._adapter,
            saliency=options.saliency if weighted and options.saliency != "none" else None,
            end_to_end=options.end_to_end_settings(),
            copies=copies,
            parted=copies - COPIES_HELD,
        )

    def _copies(self) -> int:
        """Copies of a block's weights that live as it trains."""
        options = self._options
        trained = options.train_weights and (options.stages or (options.epochs and options.weight_lr))
        return copies_of_weights(options.optimizer, trained=bool(trained))

    def quantize(self, task: BlockTask, make: MakeQuantizer | None = None) -> BlockResult:
        """Quantize one block.

        Args:
            task: with activations.
            make: the closed-form start of one layer; not looked at where the task has a start.

        Raises:
            NumericsError: what was packed is not what was trained.
        """
        if task.data is None:
            raise ValueError("training needs activations")
        layerwise = self._options.granularity == "layer"
        reference = deepcopy(task.block) if layerwise else None
        stages, settings = self._stages(task.index), self._options.settings()
        # Held for penalties alone: it is as much memory as the block.
        penalized = task.linears if self._penalized(stages) else ()
        originals = {
            linear: task.originals.get(linear, task.weight(linear)).to(task.precision.device) for linear in penalized
        }
        # After the copy: the reference keeps the model's own norms, the block goes on from the artifact's.
        beside = beginning_vectors(task)
        layers = {linear: self._install(task, linear, make) for linear in task.linears}
        shared: dict[str, Any] = {"stages": stages, "pieces": self._pieces, "sharded": task.sharded}
        if reference is None:
            penalty = self._penalty(task, originals, task.linears, stages)
            trainer: BlockTrainer | LayerwiseTrainer = BlockTrainer(
                task.block, task.data, settings, task.precision, penalty=penalty, **shared
            )
        else:
            trainer = LayerwiseTrainer(
                task.block,
                reference,
                task.data,
                settings,
                task.precision,
                penalty=lambda names: self._penalty(task, originals, names, stages),
                **shared,
            )
        with own_randomness(task.seed, task.precision.device):
            outcome = trainer.train(task.seed, task.on_epoch)
        sizes = {linear: task.importance[linear].mean().sqrt().item() for linear in layers}
        packed = {linear: pack_layer(linear, layer.quantizer, sizes[linear]) for linear, layer in layers.items()}
        adapters = {linear: layer.adapter.tensors() for linear, layer in layers.items() if layer.adapter is not None}
        # An artifact's vectors that did not change are stored as they came, in their dtype.
        dense = dict(task.start.vectors) if task.start else {}
        for name, value in task.block.named_parameters():
            if name in beside and not torch.equal(value, beside[name]):
                dense[name] = half_vector(value.detach())
        return BlockResult(packed, dense, outcome, adapters, task.start.schemes if task.start else task.schemes)

    def _stages(self, index: int) -> list[Stage]:
        """The stages of a block, λ and its growth over the blocks filled in."""
        options = self._options
        growth = options.block_multiplier**index
        if not options.stages:
            return [Stage(name="mixed", epochs=options.epochs, penalty=growth * options.penalty)]
        return [
            stage.model_copy(update={"penalty": growth * (options.penalty if stage.penalty is None else stage.penalty)})
            for stage in options.stages
        ]

    def _install(self, task: BlockTask, linear: str, make: MakeQuantizer | None) -> TrainedLinear:
        """Put a trained layer in a dense one's place: where it starts is searched, or taken over from an artifact."""
        dense = linear_layer(task.block, linear)
        weight = dense.weight.detach()
        start = task.start
        if start is not None:
            scheme = start.schemes.get(linear, self._scheme)
            packed = {name: tensor.to(weight.device) for name, tensor in start.packed[linear].items()}
            quantizer = self._go_on(weight, packed, scheme)
        elif make is not None:
            quantizer = make(weight, task.importance[linear], task.schemes.get(linear, self._scheme))
        else:
            raise ValueError("there is nothing to start from")
        layer = TrainedLinear(quantizer.to(weight.device), dense.bias, self._make_adapter(task, linear, quantizer))
        task.block.set_submodule(linear, layer)
        return layer

    def _make_adapter(self, task: BlockTask, linear: str, quantizer: Quantizer) -> Adapter | None:
        if self._adapter is None or not self._adapter.matches(task.prefix + linear):
            return None
        out_features, in_features = linear_layer(task.block, linear).weight.shape
        # One stream of random numbers a layer: whether others have adapters makes no difference.
        seed = task.seed * 1009 + task.linears.index(linear)
        generator = torch.Generator().manual_seed(seed % (runtime.MAX_SEED + 1))
        adapter = Adapter(self._adapter, in_features, out_features, generator=generator).to(task.precision.device)
        if task.start is not None and linear in task.start.adapters:
            adapter.assign(task.start.adapters[linear])
        else:
            with torch.no_grad():
                adapter.init_magnitude(quantizer.dense(quantizer()))
        return adapter

    @staticmethod
    def _penalized(stages: Sequence[Stage]) -> bool:
        return any(stage.penalized and stage.penalty for stage in stages)

    def _penalty(
        self, task: BlockTask, originals: Mapping[str, torch.Tensor], names: Sequence[str], stages: Sequence[Stage]
    ) -> Penalty | None:
        if not self._penalized(stages):
            return None
        scores, power = task.saliency, self._options.saliency_power
        saliency = None if scores is None else lambda name: scores(name) ** power
        return WeightPenalty({name: originals[name] for name in names}, saliency, self._options.penalize)


def copies_of_weights(optimizer: OptimizerKind, *, trained: bool) -> int:
    """Copies of a block's weights: as read and as latents; of what trains gradients, moments and two snapshots."""
    moments = {"adamw": 2, "adamw-bf16": 1, "sign": 0}[optimizer]
    return COPIES_HELD + (1 + moments + 2 if trained else 0)


@torch.no_grad()
def beginning_vectors(task: BlockTask) -> dict[str, torch.Tensor]:
    """Values of the vectors outside the linear layers (norms), which training may change; an artifact's are put in."""
    found = vectors_beside(task.block, task.linears)
    for name, value in (task.start.vectors if task.start else {}).items():
        found[name].copy_(value)
    return {name: parameter.clone() for name, parameter in found.items()}


def vectors_beside(block: nn.Module, linears: Sequence[str]) -> dict[str, torch.Tensor]:
    """The vectors of a block outside its linear layers, by name."""
    inside = tuple(f"{linear}." for linear in linears)
    named = block.named_parameters()
    return {name: p.detach() for name, p in named if p.dim() == 1 and not name.startswith(inside)}


def half_vector(value: torch.Tensor) -> torch.Tensor:
    """A trained vector as it is stored: in float16 where that rounds no element by more than 2⁻¹⁰ of itself."""
    half = value.to(torch.float16)
    return half if ((half.float() - value).abs() <= 2.0**-10 * value.abs()).all() else value


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generators: seeded anew, a block does not depend on those before it.

    Each process of a run draws for its own samples.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed + 7907 * distributed.rank()) % (runtime.MAX_SEED + 1))
        yield


@torch.no_grad()
def pack_layer(linear: str, quantizer: Quantizer, size: float) -> Packed:
    """Pack a trained layer and check what came of it.

    Args:
        linear: its name, for errors.
        quantizer: of its weight.
        size: root mean square of its inputs; 0 for a layer that saw none.

    Raises:
        NumericsError: what was packed is not what was trained.
    """
    packed = quantizer.finalize()
    check_packed(linear, quantizer.scheme, packed, quantizer.dense(quantizer()))
    quantizer.check_product(linear, packed, size=size or 1.0)
    return packed
