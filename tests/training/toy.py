"""A block of two layers, and activations for it."""

from pathlib import Path

import torch
from torch import nn

from ulbq.blockwise.activations import ActivationStore
from ulbq.training.precision import Precision

CPU = Precision(torch.device("cpu"), torch.float32)


WIDTH = 32


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return x + gain * self.down(torch.relu(self.up(self.norm(x))))


def store(values: torch.Tensor, folder: Path) -> ActivationStore:
    filled = ActivationStore(tuple(values.shape), torch.float32, limit=2**30, directory=folder)
    filled.set(0, values)
    return filled
