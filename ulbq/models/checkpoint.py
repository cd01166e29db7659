"""Stored tensors under the names that the model's own parameters carry.

Checkpoints on the Hub name tensors as the model did when they were written: with or without the base prefix
(``model.``), under older names (``embed_out``), or one expert a tensor where transformers now holds them fused. How
to get from those names to today's is transformers' own table; it is applied here one tensor at a time.
"""

import copy
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ulbq.models.experts import expert_parts


class TensorReader(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def names(self) -> frozenset[str]:
        """Every name that can be read."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype. Raises KeyError for a name that is not there."""
        ...


@dataclass
class _Recipe:
    """How one parameter comes about: from one stored tensor, or from several through a converter."""

    target: str
    converter: WeightConverter | None = None
    sources: list[tuple[str, str]] = field(default_factory=list)


class Checkpoint:
    """Reads stored tensors by parameter name.

    Args:
        stored: the tensors by their stored names.
        model: the model, on the meta device or not; only its names count.

    Attributes:
        names: parameters (and persistent buffers) of the model that the checkpoint holds, those of single experts too.
        unplaced: stored names that lead to no parameter, each with the name that the model would have for it.
        idle: stored names of experts beyond those that a mixture runs, as LongCat's that give a token itself have them
            where transformers saved the model. They are among those that lead to no parameter.
    """

    def __init__(self, stored: TensorReader, model: PreTrainedModel) -> None:
        self._stored = stored
        self._model = model
        self._recipes, self.unplaced, self.idle = _recipes(stored.names, model)
        self.names = frozenset(self._recipes)

    def sources(self, name: str) -> tuple[str, ...]:
        """Stored names of the tensors that the parameter ``name`` is made of."""
        return tuple(key for key, _ in self._recipes[name].sources)

    def read(self, name: str) -> torch.Tensor:
        """The parameter ``name``, in its stored dtype. Raises KeyError where the checkpoint lacks it."""
        recipe = self._recipes[name]
        if recipe.converter is None:
            return self._stored.read(recipe.sources[0][0])
        converter = copy.deepcopy(recipe.converter)
        for key, pattern in recipe.sources:
            # Typed for transformers' background reads; it takes a tensor as well.
            converter.add_tensor(recipe.target, key, pattern, self._stored.read(key))  # type: ignore[arg-type]
        value = converter.convert(recipe.target, model=self._model, config=self._model.config)[name]
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor


def _recipes(
    stored: frozenset[str], model: PreTrainedModel
) -> tuple[dict[str, _Recipe], dict[str, str], frozenset[str]]:
    """Recipes by parameter name; the stored names without one by what they are renamed to, and idle experts' of them.

    The order of the rules is that of ``PreTrainedModel.from_pretrained``.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = model.state_dict()
    recipes: dict[str, _Recipe] = {}
    unplaced: dict[str, str] = {}
    idle: set[str] = set()
    experts = expert_parts(model)
    fused = {part.fused: part.fusion for part in experts.values()}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if key in experts:
            recipes[key] = _Recipe(key, sources=[(key, key)])
        if name not in wanted:
            if key not in experts:
                unplaced[key] = name
            continue
        converter = None if pattern is None else by_pattern[pattern]
        single = None if converter is None or pattern is None else _single_expert(key, name, pattern, converter)
        if single in experts or single in wanted:
            recipes[single] = _Recipe(single, sources=[(key, key)])
        elif single is not None and name in fused:
            unplaced[key] = single
            idle |= {key} if fused[name].identity else set()
            continue
        recipe = recipes.setdefault(name, _Recipe(name, converter))
        recipe.sources.append((key, pattern or key))
        if converter is not None:
            first, *others = converter.target_patterns
            recipes.update({name.replace(first, other): recipe for other in others})
    return recipes, unplaced, frozenset(idle)


def stacks_experts(converter: WeightConverter) -> bool:
    """Whether a converter makes a fused parameter of experts' matrices as they are, and does nothing else to them."""
    steps = [type(step) for step in converter.operations]
    return steps in ([MergeModulelist], [MergeModulelist, Concatenate])


def _single_expert(key: str, fused: str, pattern: str, converter: WeightConverter) -> str | None:
    """What a stored tensor is called that is one expert's matrix of a fused parameter, and nothing else."""
    if not stacks_experts(converter):
        return None
    owner, _, leaf = fused.rpartition(".")
    numbers = [part for part in key.split(".") if part.isdigit()]
    # The rows of the first pattern come first.
    first = converter.source_patterns.index(pattern) == 0
    projection = leaf if leaf != "gate_up_proj" else "gate_proj" if first else "up_proj"
    return f"{owner}.{numbers[-1]}.{projection}.weight"
