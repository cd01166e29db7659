"""How much of a model is quantized, what stays in full precision, and when that is too much."""

import re
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from ulbq.artifacts.records import Coverage, KeptRecord
from ulbq.errors import InputError
from ulbq.formats import AnyScheme, bits_per_weight
from ulbq.models.blocks import Linear, ModelStructure
from ulbq.models.names import state_names
from ulbq.models.selection import ASKED, Selection
from ulbq.progress import Progress

# Quantized shares of the blocks' weights below which a run warns, and stops.
_MOST = 0.9
_HALF = 0.5
_NAMED = 4


def coverage(
    model: PreTrainedModel, selected: Selection, *, bits: float, carried: int, tables: Mapping[Linear, AnyScheme] = {}
) -> Coverage:
    """Count what of a model is quantized.

    Args:
        model: the skeleton.
        selected: the layers that are quantized.
        bits: of each quantized weight, all that is stored for it included; the rest is counted in half precision.
        carried: values that are stored beside the model.
        tables: matrices outside the blocks that are packed, and how.
    """
    found = selected.found
    tensors = model.state_dict()
    sizes = {name: tensors[name].numel() for name in state_names(model)}
    quantized = sum(linear.weights for linear in found.layers)
    decoder = found.blocks_prefix.rpartition(".")[0]
    outside = {f"{name}.weight" for name in found.embeddings if name.startswith(decoder)} | {f"{found.head}.weight"}
    total = sum(sizes.values()) + carried
    embeddings = sum(size for name, size in sizes.items() if name in outside)
    packed = {table: table.weights for table in tables}
    of_tables = sum(
        bits_per_weight(scheme, table.out_features, table.in_features) * packed[table]
        for table, scheme in tables.items()
    )
    half = 16 * (total - quantized - sum(packed.values()))
    return Coverage(
        quantized=quantized,
        in_blocks=sum(size for name, size in sizes.items() if name.startswith(f"{found.blocks_prefix}.")),
        embeddings=embeddings,
        embedding_bits=(of_tables + 16 * (embeddings - sum(packed.values()))) / embeddings if packed else None,
        total=total,
        bits=(bits * quantized + of_tables + half) / total,
        kept=_kept(model, selected),
    )


def _kept(model: PreTrainedModel, selected: Selection) -> tuple[KeptRecord, ...]:
    found, reasons = selected.found, selected.reasons
    modules = dict(model.named_modules())
    groups: dict[tuple[str, str], list[int]] = {}
    for name in found.skipped:
        why = "the head" if name == found.head else reasons.get(name) or _why(found, name, modules[name])
        weights = sum(p.numel() for p in modules[name].parameters(recurse=False) if p.ndim > 1)
        groups.setdefault((_group(found, name), why), []).append(weights)
    records = [
        KeptRecord(name=name, modules=len(sizes), weights=sum(sizes), why=why) for (name, why), sizes in groups.items()
    ]
    return tuple(sorted(records, key=lambda record: -record.weights))


def _why(found: ModelStructure, name: str, module: nn.Module) -> str:
    if not name.startswith(f"{found.blocks_prefix}."):
        return "outside the blocks"
    return f"{type(module).__name__} is no linear layer"


def _group(found: ModelStructure, name: str) -> str:
    """A module's name without counts; outside the blocks that of the largest part which holds none of them."""
    if name.startswith(f"{found.blocks_prefix}."):
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
    parts, way = name.split("."), found.blocks_prefix.split(".")
    apart = next((i for i, (one, other) in enumerate(zip(parts, way, strict=False)) if one != other), len(parts) - 1)
    return ".".join(parts[: apart + 1])


def check_coverage(covered: Coverage, found: ModelStructure, progress: Progress, *, allow_partial: bool) -> None:
    """Say where much of the blocks stays in full precision; refuse to go on where it is most, unless it is allowed to.

    What was asked to be left out counts neither way.

    Raises:
        InputError: less than half of the weights in the blocks would be quantized.
    """
    asked = sum(record.weights for record in covered.kept if record.why == ASKED)
    share = covered.quantized / max(covered.in_blocks - asked, 1)
    if share >= _MOST:
        return
    kept = sentence(record for record in covered.kept if record.name.startswith(f"{found.blocks_prefix}."))
    said = f"{share:.1%} of the weights in the blocks are quantized"
    if share < _HALF and not allow_partial:
        raise InputError(
            f"Only {said.replace('are', 'would be')}. In full precision stay {kept}.",
            hint="`allow_partial` quantizes what can be.",
        )
    progress.warn(f"{said}. In full precision stay {kept}.")


def sentence(kept: Iterable[KeptRecord]) -> str:
    """The largest of them in words."""
    named = [record.words for record in kept]
    more = f"; and {len(named) - _NAMED} more kinds" if len(named) > _NAMED else ""
    return "; ".join(named[:_NAMED]) + more
