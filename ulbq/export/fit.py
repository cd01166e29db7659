"""What a model is made of, as far as other layouts care, and which of them can hold it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ulbq.artifacts.shards import EXPERT
from ulbq.config.convert import TARGETS
from ulbq.errors import InputError, UsageError
from ulbq.export.targets import target
from ulbq.formats import AffineScheme, AnyScheme, read_scheme
from ulbq.models.adapter_files import adapter_folder, read_config
from ulbq.models.blocks import skeleton
from ulbq.models.source import ModelSource
from ulbq.models.stored_names import StoredNames
from ulbq.nn.quant_linear import is_dense_linear

if TYPE_CHECKING:
    from ulbq.export.targets.base import Target


class Layer(NamedTuple):
    """A packed linear layer; ``shape`` is ``(out, in)``."""

    scheme: AnyScheme
    shape: tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """A model that may be converted.

    Attributes:
        given: as the user gave it.
        config: of the model.
        layers: the packed layers by full name; none in full precision.
        adapter: ``LoRA``, ``DoRA``, or empty without an adapter.
        unpacked: modules with weight matrices inside the blocks that no layout has a name for: fused experts.
        routers: those beside packed experts, which every layout has dense.
        tables: the table of tokens and the head by full name, those that are packed; a tied head is the former.
    """

    given: str
    config: PreTrainedConfig
    layers: Mapping[str, Layer]
    adapter: Literal["", "LoRA", "DoRA"] = ""
    unpacked: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    tables: Mapping[str, Layer] = field(default_factory=dict)

    @classmethod
    def of(cls, source: ModelSource) -> "Candidate":
        """What a source's manifest and configuration say. Raises InputError where its adapter is damaged."""
        manifest = source.quantized
        folder = adapter_folder(source)
        kind: Literal["", "LoRA", "DoRA"] = ""
        if folder is not None:
            kind = "DoRA" if read_config(folder).dora else "LoRA"
        if manifest is None:
            return cls(source.given, source.config, {}, kind)
        packed = source.packed
        layers = {record.name: Layer(packed[record.name], record.shape) for record in manifest.layers}
        inside, routers = left_dense(manifest.skipped, layers)
        unpacked = nameless(inside, skeleton(source)) if inside else ()
        tables = {name: Layer(read_scheme(one.scheme), one.shape) for name, one in source.tables.items()}
        return cls(source.given, source.config, layers, kind, unpacked, routers, tables)

    @cached_property
    def fused_expert(self) -> str | None:
        """A packed expert whose family has no names for single ones; None for none."""
        if not any(EXPERT.search(name) for name in self.layers):
            return None
        naming = StoredNames(self.config)
        return next((name for name in self.layers if naming.layer(name) is None), None)

    @property
    def weights(self) -> int:
        """How many the packed layers have."""
        return sum(math.prod(layer.shape) for layer in self.layers.values())

    @property
    def schemes(self) -> tuple[AnyScheme, ...]:
        """The different schemes, in the order of the layers."""
        return tuple(dict.fromkeys(layer.scheme for layer in self.layers.values()))


def left_dense(skipped: tuple[str, ...], layers: Mapping[str, Layer]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of the modules that stay dense which lie in the layers' blocks, and of those the routers apart."""
    inside = _inside_blocks(skipped, layers)
    routers = _beside_experts(inside, layers)
    return tuple(name for name in inside if name not in routers), routers


def _inside_blocks(skipped: tuple[str, ...], layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """Those of the modules that stay dense which lie in the blocks that the layers lie in."""
    prefixes = {match[1] for name in layers if (match := re.match(r"(.*?\.)\d+\.", name))}
    return tuple(name for name in skipped if any(name.startswith(prefix) for prefix in prefixes))


def _beside_experts(names: tuple[str, ...], layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """Those of the modules whose parent has packed experts."""
    # Of `mlp.experts.7.gate_proj`, the `mlp`.
    owners = {name.rsplit(".", 3)[0] for name in layers if EXPERT.search(name)}
    return tuple(name for name in names if name.rpartition(".")[0] in owners)


def nameless(names: tuple[str, ...], model: PreTrainedModel) -> tuple[str, ...]:
    """Those of a model's modules that are neither linear layers nor convolutions, which engines know to be dense."""
    modules = {name: model.get_submodule(name) for name in names}
    return tuple(name for name, one in modules.items() if not (is_dense_linear(one) or isinstance(one, nn.Conv1d)))


def holders(candidate: Candidate) -> list[str]:
    """The targets that can hold a model, its adapter merged where that is what it takes."""
    merge = bool(candidate.adapter)
    return [name for name in TARGETS if target(name).unsupported_reason(candidate, merge_adapter=merge) is None]


def check(candidate: Candidate, to: "Target", *, merge_adapter: bool = False) -> None:
    """Refuse what a target cannot hold.

    Raises:
        UsageError: an adapter shall be merged into codes.
        InputError: anything else; the hint lists the targets that can hold the model.
    """
    if merge_adapter and not to.merges:
        raise UsageError(
            f"An adapter cannot be merged into what `to={to.name}` writes: codes have no room for it.",
            hint="Leave out `merge_adapter` (the adapter is copied beside the weights), or use `to=dense`.",
        )
    why = to.unsupported_reason(candidate, merge_adapter=merge_adapter)
    if why is not None:
        able = holders(candidate)
        raise InputError(
            f"'{candidate.given}' cannot be converted to {to.name}: {why}.",
            # Only the adapter can be why a target fails that is among them.
            hint="Add `merge_adapter`."
            if to.name in able
            else f"Targets that can hold it: {', '.join(able) or 'none'}.",
        )


def affine_schemes(candidate: Candidate) -> list[AffineScheme]:
    """Those of the schemes that are affine."""
    return [scheme for scheme in candidate.schemes if isinstance(scheme, AffineScheme)]


def describe(candidate: Candidate) -> str:
    """The weights in a few words: ``2 bits, groups of 64, asymmetric``."""
    schemes = candidate.schemes
    if not schemes:
        return "full precision"
    first = schemes[0]
    if not all(isinstance(scheme, AffineScheme) for scheme in schemes) or not isinstance(first, AffineScheme):
        return ", ".join(dict.fromkeys(f"{scheme.format} {scheme.label}" for scheme in schemes[:3]))
    if len(schemes) > 1:
        return "several widths: " + ", ".join(scheme.label for scheme in schemes[:4])
    group = "whole rows" if first.group_size == -1 else f"groups of {first.group_size}"
    grid = "symmetric without a zero" if first.mid_rise else "symmetric" if first.symmetric else "asymmetric"
    return f"{first.bits} bits, {group}, {grid}"
