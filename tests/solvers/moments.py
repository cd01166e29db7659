"""Second moments of correlated inputs."""

import torch

from ulbq.formats import UniformScheme
from ulbq.solvers.gptq import GptqSettings, Solution, factored, gptq


def moments(columns: int = 24, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Second moments of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns).unsqueeze(1)
    rows = torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator)
    hessian = 2 / tokens * rows.t() @ rows
    # To the last bit: who reads one triangle and who reads both shall see the same matrix.
    return (hessian + hessian.t()) / 2


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    return hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian)).double()


def solved(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: UniformScheme,
    settings: GptqSettings,
    outputs: torch.Tensor | None = None,
) -> Solution:
    """One matrix by GPTQ, from the second moments of its inputs."""
    return gptq([weight], factored(hessian, settings), scheme, settings, outputs)
