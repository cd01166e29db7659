"""Which of a model's linear layers are quantized, and why the others are not."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ulbq.errors import InputError
from ulbq.formats import AnyScheme
from ulbq.models.blocks import Linear, ModelStructure, check_group_size

ASKED = "left out, as asked"
NEVER_CALLED = "never called: the model uses its weight by itself, or not at all"

# Few weights whose error is felt everywhere: they decide which experts a token goes to, which tokens are looked at, how
# fast a state forgets. Their names are those of transformers' models.
_DECIDES = re.compile(
    r"(^|\.)(\w*router\w*|gate|wg|classifier|shared_expert_gate|indexer|altup|dt_proj|in_proj_(a|b|ba))(\.|$)"
)
# Share of the weights that a group size or a format may leave out: more is a mistake in what was asked for.
_UNFIT = 0.1
_ANOTHER_FORMAT = "Take another format, as that of `method=gptq` without `k_quant`."


@dataclass(frozen=True)
class Selection:
    """The layers that are quantized.

    Attributes:
        found: the model's structure, with these layers; the others stand among what is skipped.
        reasons: why each of the others is none of them, by full name.
    """

    found: ModelStructure
    reasons: Mapping[str, str] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> "Selection":
        """The same without further layers."""
        linears = tuple(tuple(one for one in block if one.name not in reasons) for block in self.found.linears)
        # In front, as blocks come before the head.
        found = replace(self.found, linears=linears, skipped=(*reasons, *self.found.skipped))
        return Selection(found, {**self.reasons, **reasons})

    def storing(self, tables: Iterable[Linear]) -> "Selection":
        """The same with matrices outside the blocks packed: a head is not skipped then, nor one that is tied to one."""
        packed = {table.name for table in tables}
        if self.found.tied and not packed.isdisjoint(self.found.embeddings):
            packed.add(self.found.head or "")
        skipped = tuple(name for name in self.found.skipped if name not in packed)
        return replace(self, found=replace(self.found, skipped=skipped))


def select(found: ModelStructure, skip: Sequence[str], only: Sequence[str]) -> Selection:
    """Leave out what was asked for, and what decides.

    Args:
        found: the model's structure.
        skip: patterns of layers to leave out: parts of their full names between dots, ``*`` for any letters of one.
        only: patterns of the layers that are quantized; empty for all. What decides is left out all the same, unless
            a pattern matches the end of its name.

    Raises:
        InputError: a pattern matches no layer.
    """
    layers = found.layers
    for pattern in (*skip, *only):
        if not any(matches(pattern, layer.name) for layer in layers):
            names = dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers)
            raise InputError(
                f"No linear layer of the model's blocks matches '{pattern}'.",
                hint=f"Its layers: {', '.join(names)}; a block: {found.blocks_prefix.rpartition('.')[2]}.0.",
            )
    reasons = {layer.name: why for layer in layers if (why := _left_out(layer.name, skip, only))}
    return Selection(found).without(reasons)


def of_artifact(found: ModelStructure, packed: Mapping[str, AnyScheme]) -> Selection:
    """The layers that an artifact has packed, to go on from them."""
    return Selection(found).without(
        {layer.name: "not packed in the artifact" for layer in found.layers if layer.name not in packed}
    )


def fitting(
    selected: Selection, scheme: AnyScheme, group_size: int, schemes: Mapping[str, AnyScheme] = {}
) -> Selection:
    """Leave out the few layers that a scheme cannot store; ``schemes`` of those, by full name, that have their own.

    Raises:
        InputError: nothing is left, or it cannot store more than a tenth of the weights.
    """
    layers = selected.found.layers
    if not layers:
        raise InputError("No layer is left to be quantized.", hint="Leave out less with `skip` and `only`.")
    reasons: dict[str, str] = {}
    uneven: set[str] = set()
    for layer in layers:
        own = schemes.get(layer.name)
        reason = (own or scheme).unsupported_reason(layer.out_features, layer.in_features)
        size = group_size if own is None else own.group_size
        if size != -1 and layer.in_features % size:
            reason = f"groups of {size} do not divide its {layer.in_features} inputs"
            uneven.add(layer.name)
        if reason is not None:
            reasons[layer.name] = reason
    unfit = sum(layer.weights for layer in layers if layer.name in reasons)
    if unfit > _UNFIT * sum(layer.weights for layer in layers):
        check_group_size(selected.found, group_size)
        name, reason = next(iter(reasons.items()))
        another = "Give it another `group_size` in the plan." if name in uneven else _ANOTHER_FORMAT
        raise InputError(f"'{name}': {reason}.", hint=another)
    return selected.without(reasons)


def _left_out(name: str, skip: Sequence[str], only: Sequence[str]) -> str | None:
    if any(matches(pattern, name) for pattern in skip):
        return ASKED
    if only and not any(matches(pattern, name) for pattern in only):
        return ASKED
    if _DECIDES.search(name) and not any(matches(pattern, name, end="$") for pattern in only):
        return "decides more than it computes"
    return None


def matches(pattern: str, name: str, *, end: str = r"(\.|$)") -> bool:
    """Whether parts of a full name between dots are those of a pattern, ``*`` in it being any letters of one."""
    first, *others = (re.escape(part).replace(r"\?", "[^.]") for part in re.split(r"\*+", pattern))
    # What follows a star is taken where it first comes, and not tried again: time grows with the name's length alone.
    parts = "".join([first, *(rf"(?>[^.]*?{part})" for part in others[:-1]), *(f"[^.]*{part}" for part in others[-1:])])
    return re.search(rf"(^|\.){parts}{end}", name) is not None
