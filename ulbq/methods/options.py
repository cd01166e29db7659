"""Groups of options that methods take; each method's ``Options`` is put together from them.

A field here is an option of ``ulbq quantize``, and a field of the same name in ``QuantizeRequest``. What a method
takes, its defaults and what does not go together stand in one place, its ``Options``; the request, the recipes and
the command line follow.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ulbq.data.prompts import Template
from ulbq.errors import UsageError
from ulbq.formats.binary_mos import Zeros
from ulbq.methods.switches import BELONGS_TO, idle, typed
from ulbq.nn.adapter import AdapterConfig
from ulbq.solvers.allocation import CANDIDATES, NOMINAL_OUTLIER_BITS, OUTLIER_BITS
from ulbq.training.end_to_end import EndToEndSettings, Trained
from ulbq.training.losses import TokenWeighting
from ulbq.training.penalty import Penalized
from ulbq.training.settings import TrainSettings
from ulbq.training.stages import Stage

AffineBits = Literal[1, 2, 3, 4, 8]
Allocation = Literal["global", "layer", "outlier", "hessian"]
EndToEnd = Literal["none", "ce", "kl", "ce-kl", "kl-hidden", "dad"]


class MethodOptions(BaseModel):
    """What every method's ``Options`` is made of. Building one raises UsageError where values do not go together.

    Attributes:
        grouped: whether the format has groups of columns, so that ``group_size`` means something.
        preset_epochs: whether a preset's epochs are meant for the method, which otherwise trains only when told to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    grouped: ClassVar[bool] = True
    preset_epochs: ClassVar[bool] = True

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        fields = cls.model_fields.keys()
        return frozenset(name for name in fields if BELONGS_TO.get(name, frozenset({name})) & fields)

    def in_effect(self) -> dict[str, Any]:
        """Every option that the others leave a meaning, with its value."""
        values = {name: value for name, value in self if name in self.taken()}
        off = idle(values)
        return {name: value for name, value in values.items() if name not in off}

    @model_validator(mode="after")
    def _refuse_what_would_do_nothing(self) -> Self:
        for name, switch in sorted(idle(dict(self)).items()):
            if name in self.model_fields_set:
                value = getattr(self, name)
                option = f"{typed(name)} {value}" if isinstance(value, str) else typed(name)
                raise UsageError(
                    f"{option} means nothing without {switch.needed}.",
                    hint=f"Add {switch.needed}, or leave out {option}.",
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


class CompensationOptions(MethodOptions):
    """Of methods that make the error of each column good in the columns after it (GPTQ, CLAQ).

    Attributes:
        damping: share of the mean diagonal that is added to the diagonal of the inputs' second moments.
        act_order: take the columns with the largest inputs first.
        true_sequential: layers read what the quantized layers before them in the block give, in one pass over the
            samples for each; otherwise all are solved from one pass through the block in full precision.
        column_block: columns after which the errors are handed on to all others at once; a matter of speed alone.
        token_weighting: how much each token counts in the second moments.
    """

    token_weighting: TokenWeighting = TokenWeighting.ENERGY
    damping: float = Field(default=0.01, ge=0, le=1)
    act_order: bool = True
    true_sequential: bool = True
    column_block: int = Field(default=128, ge=1)


class RoundingOptions(AffineOptions):
    """Of methods that find affine codes without training.

    Attributes:
        search: shrink each group's range where that lowers its error.
    """

    bits: AffineBits = 4
    search: bool = True


_MOST_OUTLIER_BITS = CANDIDATES * OUTLIER_BITS
"""A weight: what all candidates of a survey take."""


class CodebookOptions(MethodOptions):
    """Of column codebooks (CLAQ).

    Attributes:
        bits: a code, in columns that are not widened.
        target_bits: true bits a weight of all layers, codebooks and outliers with their positions counted; None for
            columns of ``bits`` alone. As published, nominal: of codes and outliers, ``outlier_bits`` included.
        allocation: how bits beyond the base are given out. ``layer``: by the loss that a bit saves inside each layer,
            all with as many bits a weight beyond the base; ``global``: by the same across all layers; ``outlier`` and
            ``hessian``: to the first columns of an order, by their share of extreme values or by what losing them would
            cost, as published.
        outlier_bits: those of the bits a weight that outliers get; None for as many as pay, or none by an order.
        refit: fit the codebooks of all columns together after the pass.
        as_published: what the authors' code does, slips included.
    """

    grouped: ClassVar[bool] = False

    bits: Literal[2, 3, 4] = 2
    target_bits: float | None = Field(default=None, gt=0)
    allocation: Allocation = "layer"
    outlier_bits: float | None = Field(default=None, ge=0, le=1)
    refit: bool = True
    as_published: bool = False

    @property
    def allocated(self) -> bool:
        """Whether there are bits to give out."""
        return self.target_bits is not None or bool(self.outlier_bits)

    @property
    def surveyed(self) -> bool:
        """Whether all layers have to be seen before bits are given out."""
        return self.allocated and self.allocation == "global"

    @property
    def extra_bits(self) -> float:
        """About how many bits a weight come on top of columns of ``bits``, where no true target tells."""
        outlier_bits = self.outlier_bits or 0.0
        if self.as_published:
            wider = 0.0 if self.target_bits is None else self.target_bits - outlier_bits - self.bits
            # Taken at both tails, twice as many as are counted.
            return wider + 2 * outlier_bits / NOMINAL_OUTLIER_BITS * OUTLIER_BITS
        return outlier_bits if self.target_bits is None else 0.0

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        """The authors' code has orders only, no fit of all columns, and plain squares."""
        if not isinstance(data, dict) or not data.get("as_published"):
            return data
        if data.get("refit"):
            raise UsageError("--refit is not as published.", hint="Leave out --refit or --as-published.")
        if data.get("allocation") in {"global", "layer"}:
            raise UsageError(
                f"--allocation {data['allocation']} is not as published.", hint="Take --allocation outlier or hessian."
            )
        more = data.get("target_bits") is not None or data.get("outlier_bits")
        meant = {"token_weighting": "uniform"} | ({"allocation": "outlier"} if more else {})
        return {**meant, **data, "refit": False}

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        reserved, target = self.outlier_bits or 0.0, self.target_bits
        if self.allocation in {"global", "layer"} and reserved > _MOST_OUTLIER_BITS:
            raise UsageError(
                f"--outlier-bits {reserved:g} is more than the {_MOST_OUTLIER_BITS:g} that outliers can take by loss.",
                hint="Give fewer, or --allocation outlier.",
            )
        if target is None:
            return self
        if self.bits == 4:
            raise UsageError(
                "--target-bits widens columns, and none is wider than the 4 bits of --bits.",
                hint="Give --outlier-bits, or fewer --bits.",
            )
        if target - reserved <= self.bits:
            outliers = f" and {reserved:g} for outliers" if reserved else ""
            raise UsageError(
                f"--target-bits {target:g} leaves nothing beside codes of {self.bits} bits{outliers}.",
                hint="Raise it, or leave it out for columns of one width.",
            )
        if self.as_published and target - reserved > 4:
            raise UsageError(f"--target-bits {target:g} is more than 4 bits.", hint="Give fewer.")
        return self


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

    @model_validator(mode="after")
    def _refuse_what_does_nothing_in_a_stage(self) -> Self:
        # The end-to-end phase has the run's rates, not a stage's.
        off, taken = idle({**dict(self), "end_to_end": "none"}), self.taken()
        for stage in self.stages:
            for name in sorted(key for key, value in stage if value is not None and key not in {"name", "epochs"}):
                _check_key(stage, name, off[name].needed if name in off else None, name in taken)
            if stage.name == "wpt" and not (self.penalty if stage.penalty is None else stage.penalty):
                raise UsageError(
                    "--stage wpt minimizes the penalty alone, and its lambda is 0.",
                    hint="Give --lambda X, or penalty=X in the stage.",
                )
        return self


def _check_key(stage: Stage, name: str, needed: str | None, taken: bool) -> None:
    """Refuse a key of a stage that does nothing. Raises UsageError."""
    key = f"--stage {stage.name}:{name.replace('_', '-')}"
    if name == "penalty":
        # That no stage takes the run's λ says nothing of the stages' own.
        if not stage.penalized:
            raise UsageError(f"{key} means nothing: {stage.name} has no penalty.", hint="Leave it out, or take mixed.")
    elif not taken:
        raise UsageError(f"{key} means nothing to this method.", hint="Leave it out.")
    elif needed is not None:
        raise UsageError(f"{key} means nothing without {needed}.", hint=f"Add {needed}, or leave it out.")


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
            ``ce-kl`` both, ``kl-hidden`` with the distance of the hidden states too, ``dad`` deviation-aware (DB-LLM).
        end_to_end_data: plain text or an instruction set, see :func:`ulbq.data.instructions.training_text`; None for
            the calibration samples.
        end_to_end_samples: how many of that train, which may be more than train the blocks; None for as many as those.
        end_to_end_template: how instructions are laid out; None for the tokenizer's chat template, if it has one.
        end_to_end_epochs: passes over the samples.
        end_to_end_rate: learning rates, as a share of those of the blocks' training; 0.4 in steps of 2 samples was the
            best of five settings for two epochs of ``kl`` on 16 samples.
        end_to_end_train: scales and what is as small, the codes fixed; zero points too; or weights too.
        end_to_end_zero_rate: learning rate of zero points in grid steps, before ``end_to_end_rate``.
        checkpointing: keep only the blocks' inputs for the backward pass, and run each block again there.
        accumulation: samples a step.
        teacher: ``streamed`` runs the full-precision model beside the student, ``cached`` keeps its best guesses.
        teacher_top_k: guesses a token that the cache keeps; the rest is one lump.
        end_to_end_gamma: exponent of the entropies in ``dad``.
        end_to_end_hidden_weight: weight of the hidden states' error in ``kl-hidden``.
    """

    end_to_end: EndToEnd = "none"
    end_to_end_data: str | None = None
    end_to_end_samples: int | None = Field(default=None, ge=1)
    end_to_end_template: Template | None = None
    end_to_end_epochs: int = Field(default=1, ge=1)
    end_to_end_rate: float = Field(default=0.4, gt=0)
    end_to_end_train: Trained = "scales"
    end_to_end_zero_rate: float = Field(default=0.1, ge=0)
    accumulation: int = Field(default=2, ge=1)
    checkpointing: bool = True
    teacher: Literal["streamed", "cached"] = "streamed"
    teacher_top_k: int = Field(default=64, ge=1)
    end_to_end_gamma: float = Field(default=0.5, ge=0)
    end_to_end_hidden_weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _refuse_zero_points_that_are_not_there(self) -> Self:
        # Of all formats only affine's asymmetric grids have zero points that are integers.
        if self.end_to_end_train == "scales-zeros" and getattr(self, "symmetric", True):
            raise UsageError(
                "--end-to-end-train scales-zeros wants zero points, which only an asymmetric affine format has.",
                hint="Take --end-to-end-train scales.",
            )
        return self


class TrainedOptions(EndToEndOptions, StageOptions, GranularityOptions, AdapterOptions, TrainOptions):
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
            zero_rate=self.end_to_end_zero_rate,
            accumulation=self.accumulation,
            checkpointing=self.checkpointing,
            teacher=self.teacher,
            top_k=self.teacher_top_k,
            gamma=self.end_to_end_gamma,
            hidden_weight=self.end_to_end_hidden_weight,
            block=self.settings(),
        )
