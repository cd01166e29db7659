"""``--stage wpt:epochs=15,scale-rate=0.01``: from words to stages."""

import difflib
from collections.abc import Sequence
from typing import get_args

from ulbq.errors import UsageError


def names() -> tuple[str, ...]:
    """What a stage may be called."""
    from ulbq.training.stages import StageName

    return get_args(StageName)


def keys() -> tuple[str, ...]:
    """What may be set of a stage, as it is typed."""
    from ulbq.training.stages import Stage

    return tuple(name.replace("_", "-") for name in Stage.model_fields if name != "name")


def read_stages(texts: Sequence[str]) -> list[dict[str, object]]:
    """Fields of each stage.

    Raises:
        UsageError: an unknown stage or key, a value that is no number, or no epochs.
    """
    return [_read(text) for text in texts]


def _read(text: str) -> dict[str, object]:
    name, _, settings = text.partition(":")
    if name not in names():
        raise UsageError(f"There is no stage '{name}'.", hint=f"Stages: {', '.join(names())}.")
    stage: dict[str, object] = {"name": name}
    for setting in filter(None, settings.split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in keys():
            close = difflib.get_close_matches(key, keys(), n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Keys: {', '.join(keys())}."
            raise UsageError(f"--stage {text}: a stage has no '{key}'.", hint=hint)
        field = key.replace("-", "_")
        if field in stage:
            raise UsageError(f"--stage {text}: '{key}' stands there twice.", hint="Leave one out.")
        stage[field] = _number(text, key, value)
    if "epochs" not in stage:
        raise UsageError(f"--stage {text} names no epochs.", hint=f"Write --stage {name}:epochs=N.")
    return stage


def _number(text: str, key: str, value: str) -> int | float:
    try:
        number = int(value) if key == "epochs" else float(value)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        kind = "whole number" if key == "epochs" else "number"
        raise UsageError(f"--stage {text}: '{value}' is no {kind} of at least 0.", hint=f"Write {key}=N.")
    return number
