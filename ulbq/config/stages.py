"""Training in stages: each weighs the block's output and the preservation of salient weights in its own way."""

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from ulbq.config.options import Number, Settings, former_names, renamed
from ulbq.config.training import TrainSettings
from ulbq.errors import UsageError

StageName = Literal["wpt", "mixed", "opt"]

_WEIGHTS: dict[StageName, tuple[float, bool]] = {"wpt": (0.0, True), "mixed": (1.0, True), "opt": (1.0, False)}
"""Weight of the output loss, and whether the penalty counts (ULB-SAPR's three stages)."""


class Stage(Settings):
    """One stage of a block's training. Rates and decays that are None are the run's.

    Attributes:
        name: ``wpt`` (weight preservation: the penalty alone), ``mixed`` (output loss and penalty) or ``opt`` (output
            loss alone).
        epochs: passes over the samples.
        penalty: λ of this stage; None for the run's. Means nothing to ``opt``.
        weight_lr … router_lr: as :class:`~ulbq.config.training.TrainSettings` has them; 0 freezes the role.
    """

    name: StageName = "opt"
    epochs: int = Field(ge=0)
    penalty: Number | None = None
    weight_lr: Number | None = None
    scale_lr: Number | None = None
    norm_lr: Number | None = None
    adapter_lr: Number | None = None
    router_lr: Number | None = None
    scale_weight_decay: Number | None = None
    adapter_weight_decay: Number | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_the_names_of_training(cls, data: Any) -> Any:
        return renamed(TrainSettings, data) if isinstance(data, dict) else data

    def __str__(self) -> str:
        """As it is typed."""
        given = {name: value for name, value in self if name != "name" and value is not None}
        return f"{self.name}:" + ",".join(f"{name.replace('_', '-')}={value:g}" for name, value in given.items())

    @property
    def output(self) -> float:
        """Weight of the output loss."""
        return _WEIGHTS[self.name][0]

    @property
    def penalized(self) -> bool:
        """Whether the penalty counts."""
        return _WEIGHTS[self.name][1]


STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
STAGE_KEYS = tuple(name.replace("_", "-") for name in Stage.model_fields if name != "name")
"""What may be set of a stage, as it is typed."""


def read_stage(text: object) -> object:
    """Fields of ``wpt:epochs=15,scale-lr=0.01``; what is no text stays.

    Raises:
        UsageError: an unknown stage or key, a value that is no number, or no epochs.
    """
    if not isinstance(text, str):
        return text
    name, _, settings = text.partition(":")
    if name not in STAGE_NAMES:
        raise UsageError(f"There is no stage '{name}'.", hint=f"Stages: {', '.join(STAGE_NAMES)}.")
    stage: dict[str, object] = {"name": name}
    for setting in filter(None, settings.split(",")):
        key, _, value = (part.strip() for part in setting.partition("="))
        field = key.replace("-", "_")
        field = former_names(TrainSettings).get(field, field)
        if field.replace("_", "-") not in STAGE_KEYS:
            close = difflib.get_close_matches(key, STAGE_KEYS, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Keys: {', '.join(STAGE_KEYS)}."
            raise UsageError(f"`stages={text}`: a stage has no '{key}'.", hint=hint)
        if field in stage:
            raise UsageError(f"`stages={text}`: '{key}' stands there twice.", hint="Leave one out.")
        stage[field] = _number(text, key, value)
    if "epochs" not in stage:
        raise UsageError(f"`stages={text}` names no epochs.", hint=f"Write `stages={name}:epochs=N`.")
    return stage


def _number(text: str, key: str, value: str) -> int | float:
    try:
        number = int(value) if key == "epochs" else float(value)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        kind = "whole number" if key == "epochs" else "number"
        raise UsageError(f"`stages={text}`: '{value}' is no {kind} of at least 0.", hint=f"Write {key}=N.")
    return number


Stages = tuple[Annotated[Stage, BeforeValidator(read_stage)], ...]
