"""Groups of options that methods take; each method's ``Options`` is put together from them.

A field here is an option of ``ulbq quantize``, and a field of the same name in ``QuantizeRequest``. What a method
takes, its defaults and what does not go together stand in one place, its ``Options``; the request, the recipes and
the command line follow.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ulbq.errors import UsageError
from ulbq.formats.binary_mos import Zeros
from ulbq.nn.adapter import AdapterConfig
from ulbq.training.end_to_end import EndToEndSettings
from ulbq.training.penalty import Penalized
from ulbq.training.settings import TrainSettings
from ulbq.training.stages import Stage

AffineBits = Literal[1, 2, 3, 4, 8]
EndToEnd = Literal["none", "ce", "kl", "kl-hidden", "dad"]


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


def _unpenalized(known: Mapping[str, Any]) -> bool:
    """Whether no stage has a λ above 0."""
    if "penalty" not in known:
        return False
    stages = [Stage.model_validate(stage) for stage in known.get("stages") or [{"name": "mixed", "epochs": 0}]]
    own = [known["penalty"] if stage.penalty is None else stage.penalty for stage in stages if stage.penalized]
    return not any(own)


_TEACHER = frozenset({"teacher", "teacher_top_k"})
SWITCHES = (
    Switch("--train-weights", _has("train_weights", False), frozenset({"weight_rate"})),
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
    Switch("--schedule cosine", _has("schedule", "constant"), frozenset({"final_rate"})),
    Switch("--lambda", _unpenalized, frozenset({"saliency", "saliency_power", "penalize", "block_multiplier"})),
    Switch("--saliency", _has("saliency", "none"), frozenset({"saliency_power"})),
    Switch(
        "--end-to-end",
        _has("end_to_end", "none"),
        frozenset({"end_to_end_epochs", "end_to_end_rate", "end_to_end_train", "accumulation"}) | _TEACHER,
    ),
    Switch("--end-to-end kl", _has("end_to_end", "ce"), _TEACHER),
    Switch("--teacher cached", _has("teacher", "streamed"), frozenset({"teacher_top_k"})),
)

# Settings of the training that mean something only where a method has what they are for.
_BELONGS_TO = {
    "weight_rate": "train_weights",
    "adapter_rate": "adapter",
    "adapter_decay": "adapter",
    "base_share": "adapter",
    "router_rate": "experts",
}
_TYPED = {"penalty": "lambda", "penalize": "penalise", "stages": "stage"}


def typed(option: str) -> str:
    """An option as it is typed, ``--group-size`` for ``group_size``."""
    return "--" + _TYPED.get(option, option).replace("_", "-")


def idle(values: Mapping[str, Any]) -> dict[str, Switch]:
    """Options that the given values of other options leave without a meaning, and which switch does so."""
    return {name: switch for switch in reversed(SWITCHES) if switch.off(values) for name in switch.governs}


class MethodOptions(BaseModel):
    """What every method's ``Options`` is made of. Building one raises UsageError where values do not go together.

    Attributes:
        grouped: whether the format has groups of columns, so that ``group_size`` means something.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    grouped: ClassVar[bool] = True

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        fields = cls.model_fields.keys()
        return frozenset(name for name in fields if _BELONGS_TO.get(name, name) in fields)

    def in_effect(self) -> dict[str, Any]:
        """Every option that the others leave a meaning, with its value."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name in self.taken()}
        return {name: value for name, value in values.items() if name not in idle(values)}

    @model_validator(mode="after")
    def _refuse_what_would_do_nothing(self) -> Self:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        for name, switch in sorted(idle(values).items()):
            if name in self.model_fields_set:
                raise UsageError(
                    f"{typed(name)} means nothing without {switch.needed}.",
                    hint=f"Add {switch.needed}, or leave out {typed(name)}.",
                )
        return self


class AffineOptions(MethodOptions):
    """Of the affine format.

    Attributes:
        bits: a code.
        symmetric: fixed zero point, none stored; both orientations of the grid are tried.
    """

    bits: AffineBits = 2
    symmetric: bool = False


class TrainOptions(TrainSettings, MethodOptions):
    """All of the block-wise training's settings; rates of roles that a method lacks are no options of it."""

    def settings(self) -> TrainSettings:
        """The settings alone."""
        return TrainSettings.model_validate(self.model_dump(include=set(TrainSettings.model_fields)))


class WeightOptions(MethodOptions):
    """Of methods whose weights may move.

    Attributes:
        train_weights: let them; otherwise scales, norms and whatever stands beside them train alone.
    """

    train_weights: bool = True


class AdapterOptions(MethodOptions):
    """Of the low-rank adapter beside each layer.

    Attributes:
        adapter: train one.
        rank, alpha, dropout, dora, targets: as :class:`~ulbq.nn.adapter.AdapterConfig` has them.
    """

    adapter: bool = False
    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    dora: bool = False
    targets: tuple[str, ...] = ()

    def adapter_config(self) -> AdapterConfig | None:
        """Form of the adapter; None for no adapter."""
        if not self.adapter:
            return None
        return AdapterConfig.model_validate(self.model_dump(include=set(AdapterConfig.model_fields)))


class GranularityOptions(MethodOptions):
    """Of methods that can train layer by layer.

    Attributes:
        granularity: ``block`` matches the block's output; ``layer`` that of each linear layer, in execution order.
    """

    granularity: Literal["block", "layer"] = "block"


class StageOptions(MethodOptions):
    """Of training in stages that preserve salient weights (ULB-SAPR).

    Attributes:
        stages: in order; empty for one ``mixed`` stage of the run's epochs. With stages, epochs are their sum.
        penalty: λ, dimensionless, see :class:`~ulbq.training.penalty.WeightPenalty`.
        block_multiplier: block i has ``λ · multiplier^i``.
        penalize: the quantized weight alone, or with the adapter on top.
        saliency: a saliency artifact's path, a kind to compute on the fly, or ``none`` for 1 everywhere.
        saliency_power: exponent of the scores; 1 is as published. A thousandth of the weights holds most of the Fisher
            information, and the others then weigh next to nothing; the root spreads the penalty.
    """

    stages: tuple[Stage, ...] = ()
    penalty: float = Field(default=0.0, ge=0)
    block_multiplier: float = Field(default=1.0, gt=0)
    penalize: Penalized = "before-adapter"
    saliency: str = "none"
    saliency_power: float = Field(default=0.5, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _count_epochs(cls, data: Any) -> Any:
        """Stages bring their own epochs; ``epochs`` beside them may only say the same."""
        if not isinstance(data, dict) or not data.get("stages"):
            return data
        stages = [Stage.model_validate(stage) for stage in data["stages"]]
        total = sum(stage.epochs for stage in stages)
        if data.get("epochs", total) != total:
            raise UsageError(
                f"--epochs {data['epochs']} contradicts the stages: {_listed(stages)}.",
                hint="Give the epochs in --stage and leave out --epochs.",
            )
        return {**data, "epochs": total}


def _listed(stages: Iterable[Stage]) -> str:
    return " + ".join(f"{stage.name} {stage.epochs}" for stage in stages)


class ExpertOptions(MethodOptions):
    """Of the mixture of scales (BinaryMoS).

    Attributes:
        bits: the sign.
        experts: pairs of scale vectors.
        zeros: a zero point for every output or input channel, or none.
    """

    grouped: ClassVar[bool] = False

    bits: Literal[1] = 1
    experts: int = Field(default=4, ge=1)
    zeros: Zeros = "none"


class EndToEndOptions(MethodOptions):
    """Of the distillation of the whole model after its blocks.

    Attributes:
        end_to_end: the loss: ``none`` for no such phase, ``ce`` on the text, ``kl`` to the teacher's predictions,
            ``kl-hidden`` with the distance of the hidden states too, ``dad`` deviation-aware (DB-LLM).
        end_to_end_epochs: passes over the samples.
        end_to_end_rate: learning rates, as a share of those of the blocks' training.
        end_to_end_train: scales and what is as small, or weights too.
        accumulation: samples a step.
        teacher: ``streamed`` runs the full-precision model beside the student, ``cached`` keeps its best guesses.
        teacher_top_k: guesses a token that the cache keeps; the rest is one lump.
    """

    end_to_end: EndToEnd = "none"
    end_to_end_epochs: int = Field(default=1, ge=1)
    end_to_end_rate: float = Field(default=0.1, gt=0)
    end_to_end_train: Literal["scales", "all"] = "scales"
    accumulation: int = Field(default=4, ge=1)
    teacher: Literal["streamed", "cached"] = "streamed"
    teacher_top_k: int = Field(default=64, ge=1)


class TrainedOptions(EndToEndOptions, StageOptions, GranularityOptions, AdapterOptions, WeightOptions, TrainOptions):
    """What every trained method takes."""

    def end_to_end_settings(self) -> EndToEndSettings | None:
        """Settings of the end-to-end phase; None for no such phase. Raises UsageError where they do not go together."""
        if self.end_to_end == "none":
            return None
        return EndToEndSettings(
            loss=self.end_to_end,
            epochs=self.end_to_end_epochs,
            rate=self.end_to_end_rate,
            train=self.end_to_end_train,
            accumulation=self.accumulation,
            teacher=self.teacher,
            top_k=self.teacher_top_k,
            block=self.settings(),
        )
