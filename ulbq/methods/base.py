"""What a method is given for one block, and what it gives back."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ulbq import formats
from ulbq.errors import NumericsError
from ulbq.formats import AffineScheme, DualBinaryScheme
from ulbq.nn.quant_linear import linear_layer
from ulbq.training.block import BlockData, TrainOutcome
from ulbq.training.precision import Precision

Packed = dict[str, torch.Tensor]

# Rounding a float32 scale to float16 moves a level by at most 2^-11 of itself; the levels of a matrix add two scales.
_ROUNDING = 2.0**-9
# A matrix of zeros keeps the smallest scale, which float16 stores as 0.
_UNDERFLOW = 1e-8


@dataclass(frozen=True)
class BlockTask:
    """One block to quantize.

    Attributes:
        index: of the block.
        block: full precision, float32, on the device; the method may change it.
        linears: names of the layers to quantize, relative to the block, in execution order as far as known.
        importance: ``[in]`` float32 mean squared input of each of them; empty for methods without calibration.
        data: activations; None for methods without calibration.
        precision: device and dtype of the work.
        seed: of everything random in this block.
        on_epoch: called with the held-out loss after each epoch.
    """

    index: int
    block: nn.Module
    linears: tuple[str, ...]
    importance: Mapping[str, torch.Tensor]
    data: BlockData | None
    precision: Precision
    seed: int
    on_epoch: Callable[[float], None]

    def weight(self, linear: str) -> torch.Tensor:
        """Full-precision weight ``[out, in]`` of a layer."""
        return linear_layer(self.block, linear).weight.detach()


@dataclass(frozen=True)
class BlockResult:
    """What becomes of the block.

    Attributes:
        packed: stored tensors of each quantized layer.
        dense: parameters of the block that training changed (norm weights), by name relative to the block.
        outcome: how training went; None for methods that do not train.
    """

    packed: dict[str, Packed]
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    outcome: TrainOutcome | None = None


class Method(Protocol):
    """A way to quantize blocks one after the other.

    Attributes:
        name: as typed after ``--method``.
        epochs: training epochs a block, for progress and prediction; 0 for methods that do not train.
        calibrated: whether it needs calibration samples.
        augmented: whether it needs the full-precision block's output on the quantized stream.
    """

    name: str
    epochs: int
    calibrated: bool
    augmented: bool

    @property
    def scheme(self) -> AffineScheme | DualBinaryScheme:
        """How every layer is stored."""
        ...

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize one block. Raises NumericsError where the numbers went wrong beyond repair."""
        ...


def check_packed(linear: str, scheme: AffineScheme | DualBinaryScheme, packed: Packed, simulated: torch.Tensor) -> None:
    """Compare what was packed with what was trained.

    Args:
        simulated: ``[out, in]`` the weight that training saw, float32.

    Raises:
        NumericsError: they differ by more than the rounding of the scales to float16, or are not finite.
    """
    dense = formats.dequantize(scheme, packed, simulated.shape[1])
    scale = simulated.abs().amax().item()
    difference = (dense - simulated).abs().amax().item()
    if not math.isfinite(difference) or difference > _ROUNDING * scale + _UNDERFLOW:
        raise NumericsError(
            f"The packed weight of '{linear}' differs from the trained one by {difference:.3g} (largest weight "
            f"{scale:.3g}).",
            hint="Scales outside float16's range cannot be stored; use a larger group size or another method.",
        )
