"""Names under which a mixture's family stores tensors on the Hub, where they are not those of transformers' modules."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, apply_renamings

from ulbq.models.checkpoint import stacks_experts
from ulbq.models.experts import ExpertPart, expert_parts
from ulbq.models.skeleton import empty_model
from ulbq.nn.experts import Fusion


class StoredNames:
    """From the names of a model's tensors to those that its family has on the Hub, and that engines read.

    Mixtral's ``mlp.experts.7.gate_proj`` is ``block_sparse_moe.experts.7.w1`` there. Models without experts keep the
    names that they have.

    Args:
        config: of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        model = empty_model(config)
        self._parts = expert_parts(model)
        rules = get_model_conversion_mapping(model, add_legacy=False) if self._parts else []
        # Last first, as transformers does it when it saves.
        backwards = [rule.reverse_transform() for rule in rules[::-1] if not isinstance(rule, PrefixChange)]
        self._renamings = [rule for rule in backwards if isinstance(rule, WeightRenaming)]
        self._splits = [
            rule.reverse_transform() for rule in rules if isinstance(rule, WeightConverter) and stacks_experts(rule)
        ]

    def layer(self, name: str) -> str | None:
        """A linear layer's name; None for one of experts that the family stores fused."""
        found = self._name(f"{name}.weight")
        return None if found is None else found.removesuffix(".weight")

    def dense(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Dense tensors of whole blocks by their stored names, experts joined where the family stores them so."""
        named: dict[str, torch.Tensor] = {}
        experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
        fusions: dict[str, Fusion] = {}
        for name, tensor in tensors.items():
            stored = self._name(name)
            if stored is not None:
                named[stored] = tensor
                continue
            part = self._parts[name]
            owner, _, projection, kind = name.rsplit(".", 3)
            fusions[owner], own = part.fusion, f"{projection}.{kind}"
            experts.setdefault(owner, {}).setdefault(part.expert, {})[own] = tensor
        for owner, ones in experts.items():
            joined = fusions[owner].join([ones[number] for number in sorted(ones)])
            named |= {self._renamed(f"{owner}.{short}"): tensor for short, tensor in joined.items()}
        return named

    def _name(self, name: str) -> str | None:
        part = self._parts.get(name)
        return self._renamed(name) if part is None else self._single(part)

    def _single(self, part: ExpertPart) -> str | None:
        for split in self._splits:
            stored, pattern = split.rename_source_key(part.fused)
            if pattern is not None:
                first, *others = split.target_patterns
                # The rows of the first pattern are the gate's.
                own = others[0] if part.projection == "up_proj" and others else first
                return self._renamed(stored.replace(first, own).replace("*", str(part.expert)))
        return None

    def _renamed(self, name: str) -> str:
        return apply_renamings(name, self._renamings)
