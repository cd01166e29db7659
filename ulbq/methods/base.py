"""What a method is given for one block, and what it gives back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import nn

from ulbq import formats
from ulbq.config.adapter import AdapterConfig
from ulbq.config.finetuning import FinetuneSettings
from ulbq.config.groups import MethodOptions
from ulbq.errors import NumericsError
from ulbq.formats import AnyScheme
from ulbq.formats.rounding import SMALLEST_MATRIX
from ulbq.nn.quant_linear import linear_layer
from ulbq.sensitivity.outputs import OutputCosts
from ulbq.training.block import TrainOutcome
from ulbq.training.objective import BlockData
from ulbq.training.precision import Precision

Packed = dict[str, torch.Tensor]

# Rounding a float32 scale to float16 moves a level by at most 2^-11 of itself; the levels of a matrix add two scales.
_ROUNDING = 2.0**-9
# Weights that are compared at a time.
_COMPARED = 1 << 20
# A matrix of zeros keeps the smallest scale, which float16 stores as 0.
_UNDERFLOW = 1e-8


@dataclass(frozen=True)
class BlockStart:
    """What an artifact holds of one block, to go on from.

    Attributes:
        packed: stored tensors of each quantized layer.
        adapters: stored tensors of the layers' adapters, under peft's short names; empty without.
        vectors: what training may change beside the linear layers (norms), as stored, by name inside the block.
        schemes: how layers are stored whose scheme is not the method's.
    """

    packed: Mapping[str, Packed]
    adapters: Mapping[str, Packed]
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    schemes: Mapping[str, AnyScheme] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockTask:
    """One block to quantize.

    Attributes:
        index: of the block.
        block: full precision, float32, on the device; the method may change it.
        linears: names of the layers to quantize, relative to the block, in execution order as far as known.
        importance: ``[in]`` float32 mean squared input of each of them; empty for methods that do not want the
            full-precision stream.
        data: activations; None for methods without calibration.
        precision: device and dtype of the work.
        seed: of everything random in this block.
        on_epoch: called with the held-out loss after each epoch.
        saliency: reads the score of a layer's weights, ``[out, in]`` float32; None where none was asked for.
        start: what to go on from; None for a fresh start.
        prefix: full name of the block, with the dot.
        tokens: that the layers of a mixture's experts saw, by their names; the method fills it in.
        outputs: what an error at each layer's outputs costs; None where all tokens and outputs count alike.
        schemes: how layers are stored that are to be stored otherwise than by the method's scheme, by their names.
        originals: full-precision weights ``[out, in]`` of layers whose weight in the block is not it any more, those
            that were set aside in half precision.
        sharded: each of several processes has a part of what training holds beside the weights.
    """

    index: int
    block: nn.Module
    linears: tuple[str, ...]
    importance: Mapping[str, torch.Tensor]
    data: BlockData | None
    precision: Precision
    seed: int
    on_epoch: Callable[[float], None]
    saliency: Callable[[str], torch.Tensor] | None = None
    start: BlockStart | None = None
    prefix: str = ""
    tokens: dict[str, int] = field(default_factory=dict)
    outputs: Mapping[str, OutputCosts] | None = None
    schemes: Mapping[str, AnyScheme] = field(default_factory=dict)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    sharded: bool = False

    def weight(self, linear: str) -> torch.Tensor:
        """Weight ``[out, in]`` of a layer, in full precision as long as the block was not changed."""
        return linear_layer(self.block, linear).weight.detach()

    def set_aside(self, linear: str) -> None:
        """Have a layer's full-precision weight kept, before the block gets another."""
        original = self.originals.get(linear, self.weight(linear))
        self.originals[linear] = original if original.itemsize == 2 else set_aside(original)

    def restore(self) -> None:
        """Give the block its full-precision weights back."""
        for linear, weight in self.originals.items():
            whole = weight.to(self.precision.device, torch.float32)
            linear_layer(self.block, linear).weight = nn.Parameter(whole, requires_grad=False)

    def between(self, linear: str) -> torch.Tensor | None:
        """What errors of two outputs of a layer cost together, ``[out, out]``; None for nothing."""
        return None if self.outputs is None else self.outputs[linear].between


def set_aside(weight: torch.Tensor) -> torch.Tensor:
    """A weight out of the work's way: in the process's memory, and in half precision where that changes no value."""
    for dtype in (torch.bfloat16, torch.float16):
        half, rows = weight.to(dtype), max(1, _COMPARED // weight.shape[1])
        if all(torch.equal(own.float(), part) for own, part in zip(half.split(rows), weight.split(rows), strict=True)):
            return half.cpu()
    return weight.cpu()


@dataclass(frozen=True)
class BlockResult:
    """What becomes of the block.

    Attributes:
        packed: stored tensors of each quantized layer.
        dense: parameters of the block that are not the model's any more (norm weights), by name relative to the block.
        outcome: how training went; None for methods that do not train.
        adapters: stored tensors of each adapted layer's adapter, under peft's short names.
        schemes: how layers are stored whose scheme is not the method's, as where it counts what one matrix has.
        notes: what a person must read of layers that could not be treated as the others: their names, with commas,
            and a sentence.
    """

    packed: dict[str, Packed]
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    outcome: TrainOutcome | None = None
    adapters: dict[str, Packed] = field(default_factory=dict)
    schemes: Mapping[str, AnyScheme] = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is stored."""
        parts = (*self.packed.values(), *self.adapters.values(), self.dense)
        return [tensor for named in parts for tensor in named.values()]

    def on_host(self) -> "BlockResult":
        """The same with all that is stored in the host's memory."""
        packed, adapters = (
            {layer: _on_host(one) for layer, one in part.items()} for part in (self.packed, self.adapters)
        )
        return replace(self, packed=packed, adapters=adapters, dense=_on_host(self.dense))


def _on_host(tensors: Packed) -> Packed:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Needs:
    """What a method wants prepared, as its options have it.

    Attributes:
        epochs: training epochs a block, for progress and prediction; 0 for methods that do not train.
        augmented: the full-precision block's output on the quantized stream.
        layerwise: training of one layer after the other.
        drifts: closed forms that make good what the blocks before have changed of a layer's inputs.
        full_precision: the full-precision stream at all: what training aims at, and the importance of columns.
        adapter: form of the adapter that it trains; None without.
        saliency: scores of the weights: an artifact's path, a kind, or None.
        continues: whether the method can go on from an artifact.
        end_to_end: training of the whole model after its blocks; None without.
        hessians: which second moments of the layers' inputs live at once: those of one step in the ``sequence`` of a
            block's layers, or of the whole ``block``.
        searches: whether its closed forms are among those that are compiled for CPUs (:mod:`ulbq.kernels.solvers`).
        output_groups: of each layer's rows that have a Hessian of their own, by what their errors cost; 0 where they
            all have that of the inputs.
        between_outputs: what errors of two outputs cost together.
        survey: a look at all blocks before the first is quantized, as :class:`SurveyingMethod` has it.
        target_bits: true bits a weight that the layers will have, where that is not what the scheme tells.
        extra_bits: how many more than the scheme tells they will have, about.
        copies: float32 copies of a block's weights that live as it trains; 0 for methods that do not train.
        parted: those of them of which each process has a part where training is sharded.
        layer_bytes: memory that the closed form of a layer takes at its peak, for each of its weights beside itself.
        stacked: whether layers that read the same input are solved as one.
        at_once: weights of a matrix that are solved at a time; 0 for all.
        rounds_few: whether second moments of too few tokens are no more than a diagonal, and all others are factored
            in their place.
        heldout_moments: second moments of the samples held out, too.
    """

    epochs: int = 0
    augmented: bool = False
    layerwise: bool = False
    drifts: bool = False
    full_precision: bool = True
    adapter: AdapterConfig | None = None
    saliency: str | None = None
    end_to_end: FinetuneSettings | None = None
    continues: bool = False
    hessians: Literal["none", "sequence", "block"] = "none"
    searches: bool = False
    output_groups: int = 0
    between_outputs: bool = False
    survey: bool = False
    target_bits: float | None = None
    extra_bits: float = 0.0
    copies: int = 0
    parted: int = 0
    layer_bytes: float = 0.0
    stacked: bool = False
    at_once: int = 0
    rounds_few: bool = False
    heldout_moments: bool = False

    @property
    def trains(self) -> bool:
        """Whether the weights of a block train, which takes several copies of them."""
        return self.copies > 2

    @property
    def originals(self) -> bool:
        """Whether the full-precision stream before the block is wanted."""
        return self.layerwise or self.drifts

    @property
    def stores(self) -> int:
        """Stores of activations that live at once, of which each gets its share of the memory.

        Both streams and what is wanted beside them; layer by layer also the inputs in full precision, inputs, targets
        and augmented targets of the layers that train.
        """
        return 2 + self.augmented + self.originals + (3 + self.augmented if self.layerwise else 0)


class Method(Protocol):
    """A way to quantize blocks one after the other.

    Attributes:
        name: as typed after ``--method``.
        Options: what it takes, with its defaults, and whether it needs calibration samples.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]

    @classmethod
    def from_options(cls, options: Any, group_size: int) -> Self:
        """The method that ``options``, an instance of ``Options``, ask for. Raises UsageError."""
        ...

    @property
    def scheme(self) -> AnyScheme:
        """How layers are stored, as far as that is known before any is; :class:`BlockResult` tells the exceptions."""
        ...

    @property
    def needs(self) -> Needs:
        """What its tasks must hold."""
        ...

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block. Raises NumericsError where the numbers went wrong beyond repair."""
        ...


class SurveyingMethod(Method, Protocol):
    """A method that decides about one block by what it has seen of all, where its :class:`Needs` say so."""

    def survey_block(self, task: BlockTask) -> Mapping[str, Any]:
        """What there is to know of each layer of a block in the full-precision model, by the layer's full name."""
        ...

    def decide(self, surveys: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What follows from the surveys of all layers: the bits of each, by its full name and ``.bits``."""
        ...


class DecidedMethod(SurveyingMethod, Protocol):
    """One that decides something else than bits of layers, by names of its own."""

    def decided(self, decisions: Mapping[str, torch.Tensor]) -> Method:
        """The method that goes by what :meth:`decide` gave."""
        ...


def check_finite(index: int, result: BlockResult) -> None:
    """Refuse a block with values that are not finite as they are stored. Raises NumericsError."""
    if not all(torch.isfinite(tensor).all() for tensor in result.tensors if tensor.is_floating_point()):
        raise NumericsError(
            f"Block {index} has scales, norms or adapters that are not finite.",
            hint="Try `precision=fp32`, or lower rates.",
        )


def check_range(linear: str, weight: torch.Tensor) -> None:
    """Refuse a weight ``[out, in]`` whose scales float16 would store as zero; one of zeros is stored as it is.

    Raises:
        NumericsError: its largest value is below :data:`~ulbq.formats.rounding.SMALLEST_MATRIX`.
    """
    largest = _largest(weight)
    if 0 < largest < SMALLEST_MATRIX:
        raise NumericsError(
            f"The weights of '{linear}' are at most {largest:.3g}, too small for scales in float16.",
            hint="Is the checkpoint damaged? Else multiply the layer, and divide what reads it, before quantizing.",
        )


def check_packed(linear: str, scheme: AnyScheme, packed: Packed, simulated: torch.Tensor) -> None:
    """Compare what was packed with what was trained.

    Args:
        simulated: ``[out, in]`` the weight that training saw, float32.

    Raises:
        NumericsError: they differ by more than the rounding of the scales to float16, or are not finite.
    """
    dense = formats.dequantize(scheme, packed, simulated.shape[1])
    # Without copies of the matrix: this is where a run of a method that does not train holds most.
    scale = _largest(simulated)
    difference = _largest(dense.sub_(simulated))
    if not math.isfinite(difference) or difference > _ROUNDING * scale + _UNDERFLOW:
        raise NumericsError(
            f"The packed weight of '{linear}' differs from the trained one by {difference:.3g} (largest weight "
            f"{scale:.3g}).",
            hint="Scales outside float16's range cannot be stored; use a larger group size or another method.",
        )


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    least, most = values.aminmax()
    return torch.maximum(-least, most).item()
