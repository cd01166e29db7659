"""A mixture's experts by single names: modules and tensors where transformers has them fused."""

from collections.abc import Collection
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from ulbq.nn.experts import Fusion, single_experts


class ExpertPart(NamedTuple):
    """Where one expert's tensor lies.

    Attributes:
        fused: full name of the parameter that has those of all experts.
    """

    fused: str
    fusion: Fusion
    expert: int
    projection: str

    def take(self, fused: torch.Tensor) -> torch.Tensor:
        """The tensor out of the fused one."""
        return self.fusion.take(fused, self.expert, self.projection)


def expert_parts(model: nn.Module) -> dict[str, ExpertPart]:
    """The experts' tensors of a model that has them fused, by the names that its single experts have."""
    found: dict[str, ExpertPart] = {}
    for name, module in model.named_modules():
        fusion = Fusion.of(module)
        if fusion is None:
            continue
        for kind, projection in product(fusion.kinds, fusion.projections):
            fused = f"{name}.{fusion.fused(projection, kind)}"
            for expert in range(fusion.experts):
                found[f"{name}.{expert}.{projection}.{kind}"] = ExpertPart(fused, fusion, expert, projection)
    return found


def unfuse(model: nn.Module, packed: Collection[str] | None = None) -> None:
    """Put :class:`~ulbq.nn.experts.Experts` in the place of fused ones, in place.

    Args:
        model: on the meta device.
        packed: names of layers; only modules that have one of them change. None: all do.
    """
    # Of ``experts.7.gate_proj``, the ``experts``.
    owners = None if packed is None else {name.rsplit(".", 2)[0] for name in packed}
    for name, module in list(model.named_modules()):
        if (owners is None or name in owners) and (single := single_experts(module)) is not None:
            model.set_submodule(name, single)
