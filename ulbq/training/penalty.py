"""ULB-SAPR's regularizer: salient weights shall stay where full precision had them."""

from collections.abc import Callable, Mapping

import torch

from ulbq.config.trained import Penalized
from ulbq.training.linear import TrainedLinear


class WeightPenalty:
    """``Σ_layers Σ_ij S_ij (W_eff − W)²_ij`` over the same sum for ``W_eff = 0``.

    The published sum is not divided by anything, so that its λ belongs to one model's size and scale. The share is
    dimensionless: 0 for the full-precision weights, 1 for a block of zeros, whatever the model; the output loss is
    such a share too, so that λ has no unit. Which layer and weight counts how much within a block is as published.

    Args:
        originals: ``[out, in]`` full-precision weight of each layer, by name; in half precision where that has it.
        saliency: S of a layer, ``[out, in]`` float32, by its name; asked twice for each. None for 1 everywhere.
        penalized: whether ``W_eff`` is the quantized weight alone or with the adapter on top.
    """

    def __init__(
        self,
        originals: Mapping[str, torch.Tensor],
        saliency: Callable[[str], torch.Tensor] | None,
        penalized: Penalized = "before-adapter",
    ) -> None:
        self._originals = originals
        self._with_adapter = penalized == "after-adapter"
        score = saliency or (lambda name: torch.ones_like(originals[name], dtype=torch.float32))
        total = sum(
            ((score(name) * weight.float().square()).sum().double() for name, weight in originals.items()),
            start=torch.zeros((), dtype=torch.float64),
        )
        scale = 1.0 / total.clamp_min(torch.finfo(torch.float32).tiny).item()
        self._scores = {name: (score(name).double() * scale).float() for name in originals}

    def __call__(self, layers: Mapping[str, TrainedLinear]) -> torch.Tensor:
        """The penalty of a block's layers, a scalar; ``layers`` by the same names."""
        terms = []
        for name, layer in layers.items():
            distance = layer.weight_now(with_adapter=self._with_adapter) - self._originals[name]
            terms.append((self._scores[name] * distance.square()).sum())
        return torch.stack(terms).sum()
