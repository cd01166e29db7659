"""Which options others leave without a meaning: what is accepted and does nothing is refused instead."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ulbq.training.stages import Stage


class Switch(NamedTuple):
    """Something that, where it is off, leaves options without a meaning.

    Attributes:
        needed: what would have to be typed to give them one.
        off: whether it is off, judged by the options that are known.
        governs: the options.
    """

    needed: str
    off: Callable[[Mapping[str, Any]], bool]
    governs: frozenset[str]


def _has(option: str, *values: object) -> Callable[[Mapping[str, Any]], bool]:
    return lambda known: option in known and known[option] in values


def _stages(known: Mapping[str, Any]) -> list[Stage]:
    return [Stage.model_validate(stage) for stage in known.get("stages") or ()]


def _overruled(known: Mapping[str, Any]) -> bool:
    """Whether there are stages, and none that takes the run's λ."""
    stages = _stages(known)
    return bool(stages) and not any(stage.penalized and stage.penalty is None for stage in stages)


def _unpenalized(known: Mapping[str, Any]) -> bool:
    """Whether no stage has a λ above 0."""
    if any(stage.penalized and stage.penalty for stage in _stages(known)):
        return False
    return _overruled(known) or _has("penalty", 0)(known)


def _unweighted(known: Mapping[str, Any]) -> bool:
    """Whether nothing is weighted by scores, where only a penalty could be."""
    return _unpenalized(known) and "allocation" not in known


def _unshared(known: Mapping[str, Any]) -> bool:
    """Whether nothing is weighted by scores, where a budget could be shared by them."""
    shared = known.get("allocation") == "global" and not _unallocated(known)
    return _unpenalized(known) and "allocation" in known and not shared


def _unallocated(known: Mapping[str, Any]) -> bool:
    """Whether there is no budget of bits to give out."""
    return known.get("target_bits") is None and not known.get("outlier_bits")


def _untrained(known: Mapping[str, Any]) -> bool:
    """Whether a method that trains only where it is told to was not told to."""
    trains = known.get("epochs") or known.get("stages") or known.get("end_to_end", "none") != "none"
    return "as_published" in known and not trains


def _layers_alone(known: Mapping[str, Any]) -> bool:
    """Whether layers learn their own outputs, and nothing behind them trains norms."""
    return known.get("granularity") == "layer" and known.get("end_to_end", "none") == "none"


def _frozen_for_good(known: Mapping[str, Any]) -> bool:
    return known.get("train_weights") is False and known.get("end_to_end_train") == "all"


def _grid_for_good(known: Mapping[str, Any]) -> bool:
    return known.get("train") in {"clipping", "grid"} and known.get("end_to_end_train") == "all"


def _fixed_grid(known: Mapping[str, Any]) -> bool:
    """Whether no scale trains, in the blocks or behind them."""
    return known.get("train") == "weights" and known.get("end_to_end", "none") == "none"


def _textless(known: Mapping[str, Any]) -> bool:
    """Whether an end-to-end phase has no text of its own."""
    return "end_to_end_data" in known and (known["end_to_end_data"] is None or known.get("end_to_end") == "none")


def _zeros_fixed(known: Mapping[str, Any]) -> bool:
    train = known.get("end_to_end_train", "scales-zeros")
    return train != "scales-zeros" or known.get("end_to_end") == "none"


_TEACHER = frozenset({"teacher", "teacher_top_k"})
SWITCHES = (
    Switch("--train-weights", _has("train_weights", False), frozenset({"weight_rate"})),
    Switch("--train all", _has("train", "clipping", "grid"), frozenset({"weight_rate"})),
    Switch("--train all", _fixed_grid, frozenset({"scale_rate", "scale_decay"})),
    Switch(
        "--adapter",
        _has("adapter", False),
        frozenset(
            {
                *("rank", "alpha", "dropout", "dora", "targets"),
                *("adapter_rate", "adapter_decay", "base_share", "penalize"),
            }
        ),
    ),
    Switch("--experts 2 or more", _has("experts", 1), frozenset({"router_rate"})),
    Switch("--granularity block", _layers_alone, frozenset({"norm_rate"})),
    Switch("--schedule cosine", _has("schedule", "constant"), frozenset({"final_rate"})),
    Switch("a wpt or mixed stage without its own penalty", _overruled, frozenset({"penalty"})),
    Switch("--lambda", _unpenalized, frozenset({"saliency_power", "penalize", "block_multiplier"})),
    Switch("--lambda", _unweighted, frozenset({"saliency"})),
    Switch("--target-bits and --allocation global", _unshared, frozenset({"saliency"})),
    Switch(
        "--epochs 1 or more",
        _untrained,
        frozenset(
            {
                *("train_weights", "weight_rate", "scale_rate", "norm_rate", "adapter_rate", "scale_decay"),
                *("adapter_decay", "schedule", "warmup", "final_rate", "clip", "patience", "retries", "optimizer"),
                *("augmented_loss", "sliced_wasserstein", "granularity", "base_share", "penalty", "adapter"),
            }
        ),
    ),
    Switch("--target-bits", _unallocated, frozenset({"allocation"})),
    Switch("--saliency", _has("saliency", "none"), frozenset({"saliency_power"})),
    Switch(
        "--end-to-end",
        _has("end_to_end", "none"),
        frozenset(
            {
                *("end_to_end_data", "end_to_end_epochs", "end_to_end_rate", "end_to_end_train", "accumulation"),
                *("end_to_end_samples", "checkpointing"),
            }
        )
        | _TEACHER,
    ),
    Switch("--end-to-end-data", _textless, frozenset({"end_to_end_template"})),
    Switch("--end-to-end-train scales-zeros", _zeros_fixed, frozenset({"end_to_end_zero_rate"})),
    Switch("--train-weights", _frozen_for_good, frozenset({"end_to_end_train"})),
    Switch("--train all", _grid_for_good, frozenset({"end_to_end_train"})),
    Switch("--end-to-end kl", _has("end_to_end", "ce"), _TEACHER),
    Switch(
        "--end-to-end dad",
        _has("end_to_end", "none", "ce", "kl", "ce-kl", "kl-hidden"),
        frozenset({"end_to_end_gamma"}),
    ),
    Switch(
        "--end-to-end kl-hidden",
        _has("end_to_end", "none", "ce", "kl", "ce-kl", "dad"),
        frozenset({"end_to_end_hidden_weight"}),
    ),
    Switch("--teacher cached", _has("teacher", "streamed"), frozenset({"teacher_top_k"})),
)

# Settings of the training that mean something only where a method has what they are for.
BELONGS_TO = {
    "weight_rate": frozenset({"train_weights", "train"}),
    "adapter_rate": frozenset({"adapter"}),
    "adapter_decay": frozenset({"adapter"}),
    "base_share": frozenset({"adapter"}),
    "router_rate": frozenset({"experts"}),
}
_TYPED = {
    "penalty": "lambda",
    "stages": "stage",
    "end_to_end_template": "template",
    "end_to_end_zero_rate": "zero-rate",
    "end_to_end_gamma": "dad-gamma",
    "end_to_end_hidden_weight": "hidden-weight",
}


def typed(option: str) -> str:
    """An option as it is typed, ``--group-size`` for ``group_size``."""
    return "--" + _TYPED.get(option, option).replace("_", "-")


def idle(values: Mapping[str, Any]) -> dict[str, Switch]:
    """Options that the given values of other options leave without a meaning, and which switch does so."""
    return {name: switch for switch in reversed(SWITCHES) if switch.off(values) for name in switch.governs}
