"""Samples as a model takes them: tokens, and what it takes beside them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Inputs = Callable[[], Mapping[str, torch.Tensor]]
"""Makes what a model's forward takes of one sample beside its tokens, by name and of batch size 1: pixel values, above
all. They are made when they are wanted, since they are much larger than the tokens."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of one length.

    Attributes:
        tokens: int64 ``[samples, length]``, no padding.
        inputs: of every sample, what the model takes beside the tokens; None for text.
    """

    tokens: torch.Tensor
    inputs: tuple[Inputs, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Samples":
        return Samples(self.tokens[rows], None if self.inputs is None else self.inputs[rows])
