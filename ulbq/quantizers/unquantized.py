"""A weight that is not quantized yet, and trains beside those that are."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from ulbq.formats import AnyScheme
from ulbq.quantizers.base import SCALE_FLOOR, Quantizer


class Unquantized(Quantizer):
    """One weight matrix in full precision under training.

    Args:
        weight: ``[out, in]``, where it starts.

    Attributes:
        latents: ``[out, in]`` float32, in units of ``step``.
        step: ``[out, 1]`` root mean square of each row at the start.
    """

    step: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("step", weight.square().mean(1, keepdim=True).sqrt().clamp_min(SCALE_FLOOR))
        self.latents = nn.Parameter(weight / self.step)

    def forward(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out, in]`` in ``dtype``."""
        return (self.latents * self.step).to(dtype)

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by role: ``weights``."""
        return {"weights": [self.latents]}

    def finalize(self) -> dict[str, torch.Tensor]:
        """Raises TypeError: no format stores it."""
        raise TypeError("this weight is not quantized yet")

    @classmethod
    def from_packed(
        cls, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor], scheme: AnyScheme, *, train_weights: bool = True
    ) -> Self:
        """Raises TypeError: no format stores it."""
        raise TypeError("this weight is not quantized yet")
