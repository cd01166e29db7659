"""What each method takes: its defaults, and what does not go together.

Groups of options come first; each method's ``Options`` are put together from them. A field is an option of ``ulbq
quantize``, of recipes and of the plan, and a field of :class:`~ulbq.config.quantize.QuantizeRequest`.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ulbq.config.adapter import AdapterConfig, AdapterForm
from ulbq.config.finetuning import PHASE_OPTIONS, FinetuneSettings, Loss, TeacherKind, Trained
from ulbq.config.options import (
    ADAPTER,
    CODEBOOKS,
    COLUMNS,
    END_TO_END,
    FORMAT,
    MOST,
    STAGES,
    TRAINING,
    Bits,
    Count,
    Number,
    Option,
    Positive,
    Settings,
    Share,
)
from ulbq.config.run import DATA_SETS, Template
from ulbq.config.stages import STAGE_KEYS, STAGE_NAMES, Stage, Stages
from ulbq.config.training import RateSettings, TokenSettings, TrainSettings
from ulbq.errors import UsageError

HessianKind = Literal["plain", "guided", "two-sided"]
Allocation = Literal["global", "layer", "outlier", "hessian"]
Zeros = Literal["none", "output", "input"]
Penalized = Literal["before-adapter", "after-adapter"]
BlockApStart = Literal["min-max", "search", "gptq"]
BlockTrained = Literal["clipping", "grid", "rounding", "weights", "all"]
RateUnit = Literal["step", "weight"]

# Tokens that run at once where samples are short: quantized weights are made once for all of them.
_TOGETHER = 1024

MOST_TRELLIS_BITS = 4
MOST_OUTLIER_BITS = 0.25
"""A weight: what all candidates for outliers take that a look at a matrix keeps."""


class MethodOptions(Settings):
    """What every method's ``Options`` is made of. Building one raises UsageError where values do not go together.

    Attributes:
        calibrated: whether the method needs calibration samples.
        grouped: whether the format has groups of columns, so that ``group_size`` means something.
        preset_epochs: whether a preset's epochs are meant for the method, which otherwise trains only when told to.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    calibrated: ClassVar[bool] = True
    grouped: ClassVar[bool] = True
    preset_epochs: ClassVar[bool] = True

    @property
    def zero_points(self) -> bool:
        """Whether the format has zero points that are integers."""
        return False

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        return frozenset(cls.model_fields)

    def idle(self) -> dict[str, str]:
        """Options that the others leave without a meaning, and what would give them one."""
        return {}

    def in_effect(self) -> dict[str, Any]:
        """Every option that the others leave a meaning, with its value."""
        off = self.idle()
        return {name: value for name, value in self if name in self.taken() and name not in off}

    @model_validator(mode="after")
    def _refuse_what_would_do_nothing(self) -> Self:
        for name, needed in sorted(self.idle().items()):
            if name in self.model_fields_set:
                value = getattr(self, name)
                option = f"`{name}={value}`" if isinstance(value, str) else f"`{name}`"
                raise UsageError(
                    f"{option} means nothing without {needed}.", hint=f"Add {needed}, or leave out {option}."
                )
        return self


class BitsOptions(MethodOptions):
    """Of all formats: bits of a code."""

    bits: Annotated[Bits, Option("1, 2, 3, 4 or 8; claq takes 2, 3 or 4.", FORMAT, "N", primary=True)] = 2


class AffineOptions(BitsOptions):
    """Of the affine format. Without a zero point both orientations of the grid are tried."""

    symmetric: Annotated[bool, Option("Fixed zero point, or one a group.", FORMAT, flag="--symmetric/--asymmetric")] = (
        False
    )

    mid_rise: Annotated[
        bool,
        Option(
            "Levels of a symmetric grid: as many on both sides and none at zero, or one at zero.",
            FORMAT,
            flag="--mid-rise/--mid-tread",
        ),
    ] = False

    @property
    def zero_points(self) -> bool:
        """Whether the format has zero points that are integers."""
        return not self.symmetric

    def idle(self) -> dict[str, str]:
        """Zero points that are stored move the levels, and two levels without a zero point have none at zero."""
        needed = "`symmetric`" if not self.symmetric else "`bits` 2 or more" if self.bits == 1 else None
        return super().idle() | ({} if needed is None else {"mid_rise": needed})


class SequenceOptions(TokenSettings, MethodOptions):
    """Of methods that solve the layers of a block one after the other, by the second moments of their inputs."""

    hessian: Annotated[
        HessianKind,
        Option(
            "What an error at a layer's outputs costs: the same everywhere; for each token by the gradients of the "
            "loss there (guided); or for each two outputs together, too (two-sided).",
            COLUMNS,
            planned=True,
        ),
    ] = "plain"
    damping: Annotated[
        Share, Option("Share of the mean diagonal that is added to the Hessian's diagonal.", COLUMNS, "X", planned=True)
    ] = 0.01
    true_sequential: Annotated[
        bool,
        Option(
            "Let layers read what the quantized ones before them in the block give.",
            COLUMNS,
            flag="--true-sequential/--one-pass",
        ),
    ] = True
    all_experts: Annotated[
        bool, Option("Show every expert of a mixture every token, not only those that are sent to it.", COLUMNS)
    ] = False
    target_inputs: Annotated[
        Literal["full", "quantized"],
        Option(
            "A layer shall give what it gives in the full-precision model (asymmetric calibration), or what its weight "
            "would give on the inputs that the quantized blocks before it make.",
            COLUMNS,
        ),
    ] = "quantized"

    @property
    def gathering(self) -> dict[str, Any]:
        """How second moments are gathered, by the names of :func:`~ulbq.methods.in_sequence.solve_in_sequence`."""
        full_inputs = self.target_inputs == "full"
        return {"weighting": self.token_weighting, "all_experts": self.all_experts, "full_inputs": full_inputs}

    def idle(self) -> dict[str, str]:
        """Gradients say how much a token counts."""
        return super().idle() | ({} if self.hessian == "plain" else {"token_weighting": "`hessian=plain`"})


class CompensationOptions(SequenceOptions):
    """Of methods that make the error of each column good in the columns after it (GPTQ, CLAQ)."""

    act_order: Annotated[bool, Option("Take columns with the largest inputs first.", COLUMNS)] = True
    column_block: Annotated[
        Count,
        Option("Columns after which errors are handed on to all others; changes speed alone.", COLUMNS, "N"),
    ] = 128


class RoundingOptions(AffineOptions):
    """Of methods that find affine codes without training."""

    bits: Bits = 4
    search: Annotated[bool, Option("Shrink each group's range where that lowers its error (rtn, gptq).", FORMAT)] = True


class BudgetOptions(BitsOptions):
    """Of methods that give out bits where they pay; ``bits`` are what everything has at least."""

    target_bits: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        Option(
            "True bits a weight to spend, all that is stored counted: columns (claq) or layers (trellis) that matter "
            "get wider codes.",
            CODEBOOKS,
            "X",
            default="none, all alike",
        ),
    ] = None


class CodebookOptions(BudgetOptions):
    """Of column codebooks (CLAQ); ``bits`` are those of columns that are not widened."""

    grouped: ClassVar[bool] = False

    bits: Literal[2, 3, 4] = 2
    allocation: Annotated[
        Allocation,
        Option(
            "Who gets the bits: by the loss that a bit saves, in each layer or across all; or the first columns of an "
            "order, by extreme values or by the Hessian, as published.",
            CODEBOOKS,
        ),
    ] = "layer"
    outlier_bits: Annotated[
        Share | None,
        Option(
            "Of these bits, how many go to single values that are stored as they are.",
            CODEBOOKS,
            "X",
            default="as pays; by an order none",
        ),
    ] = None
    refit: Annotated[bool, Option("Fit all codebooks together after the pass.", CODEBOOKS)] = True
    sweeps: Annotated[
        int,
        Field(ge=0, le=MOST),
        Option(
            "How often codes may move after the fit, column by column, and the codebooks be fitted anew; as long as it "
            "lowers a layer's error on the samples held out.",
            CODEBOOKS,
            "N",
        ),
    ] = 0
    as_published: Annotated[
        bool,
        Option(
            "What the authors' code does, its slips included; bits are nominal.",
            CODEBOOKS,
            flag="--as-published/--as-meant",
        ),
    ] = False

    @property
    def allocated(self) -> bool:
        """Whether there are bits to give out."""
        return self.target_bits is not None or bool(self.outlier_bits)

    @property
    def surveyed(self) -> bool:
        """Whether all layers have to be seen before bits are given out."""
        return self.allocated and self.allocation == "global"

    def idle(self) -> dict[str, str]:
        """A budget that is not there is not given out; codes move once the codebooks are fitted."""
        off = super().idle() | ({} if self.allocated else {"allocation": "`target_bits`"})
        return off if self.refit else off | {"sweeps": "`refit`"}

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        """The authors' code has orders only, no fit of all columns, and plain squares."""
        if not isinstance(data, dict) or not data.get("as_published"):
            return data
        if data.get("refit"):
            raise UsageError("`refit` is not as published.", hint="Leave out `refit` or `as_published`.")
        for name, published in (("hessian", "plain"), ("target_inputs", "quantized")):
            if data.get(name, published) != published:
                raise UsageError(
                    f"`{name}={data[name]}` is not as published.", hint=f"Leave out `{name}` or `as_published`."
                )
        if data.get("allocation") in {"global", "layer"}:
            raise UsageError(
                f"`allocation={data['allocation']}` is not as published.", hint="Take `allocation=outlier` or hessian."
            )
        more = data.get("target_bits") is not None or data.get("outlier_bits")
        meant = {"token_weighting": "uniform"} | ({"allocation": "outlier"} if more else {})
        return {**meant, **data, "refit": False}

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        reserved, target = self.outlier_bits or 0.0, self.target_bits
        if self.allocation in {"global", "layer"} and reserved > MOST_OUTLIER_BITS:
            raise UsageError(
                f"`outlier_bits={reserved:g}` is more than the {MOST_OUTLIER_BITS:g} that outliers can take by loss.",
                hint="Give fewer, or `allocation=outlier`.",
            )
        if target is None:
            return self
        if self.bits == 4:
            raise UsageError(
                "`target_bits` widens columns, and none is wider than the 4 bits of `bits`.",
                hint="Give `outlier_bits`, or fewer `bits`.",
            )
        if target - reserved <= self.bits:
            outliers = f" and {reserved:g} for outliers" if reserved else ""
            raise UsageError(
                f"`target_bits={target:g}` leaves nothing beside codes of {self.bits} bits{outliers}.",
                hint="Raise it, or leave it out for columns of one width.",
            )
        if self.as_published and target - reserved > 4:
            raise UsageError(f"`target_bits={target:g}` is more than 4 bits.", hint="Give fewer.")
        return self


class ExpertOptions(BitsOptions):
    """Of the mixture of scales (BinaryMoS)."""

    grouped: ClassVar[bool] = False

    bits: Literal[1] = 1
    experts: Annotated[Count, Option("Pairs of scales to mix (binary-mos).", FORMAT, "N", planned=True)] = 4
    zeros: Annotated[Zeros, Option("A zero point for each output or input channel (binary-mos).", FORMAT)] = "none"

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        return super().taken() | {"router_lr"}


class TrainOptions(TrainSettings, MethodOptions):
    """All of the block-wise training's settings; a method without a router has no rate for one."""

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Names of the options that mean something to the method."""
        return super().taken() - {"router_lr"}

    def settings(self) -> TrainSettings:
        """The settings alone."""
        return TrainSettings.model_validate(self.model_dump(include=set(TrainSettings.model_fields)))

    def idle(self) -> dict[str, str]:
        """Constant rates leave nothing."""
        return super().idle() | ({"final_lr_factor": "`schedule=cosine`"} if self.schedule == "constant" else {})


class AdapterOptions(AdapterForm, MethodOptions):
    """Of the low-rank adapter beside each layer."""

    adapter: Annotated[
        bool, Option("Train a low-rank adapter beside the weights; it is stored in adapter/.", ADAPTER)
    ] = False

    def adapter_config(self) -> AdapterConfig | None:
        """Form of the adapter; None for no adapter."""
        if not self.adapter:
            return None
        return AdapterConfig.model_validate(self.model_dump(include=set(AdapterConfig.model_fields)))

    def idle(self) -> dict[str, str]:
        """An adapter that is not there has neither a form nor rates."""
        if self.adapter:
            return super().idle()
        names = (*AdapterConfig.model_fields, "adapter_lr", "adapter_weight_decay", "base_share", "penalize")
        return super().idle() | dict.fromkeys(names, "`adapter`")


class GranularityOptions(MethodOptions):
    """Of methods that can train layer by layer, in execution order."""

    granularity: Annotated[
        Literal["block", "layer"], Option("Match each block's output, or each layer's.", TRAINING)
    ] = "block"


class SaliencyOptions(MethodOptions):
    """Of methods that weigh by scores of the weights."""

    saliency: Annotated[
        str,
        Option(
            "What weighs the penalty, or the layers that share a budget: an artifact, a kind to compute now, or none.",
            STAGES,
            "DIR|KIND|none",
            offers=("fisher", "gradient", "hessian", "wanda", "magnitude", "none"),
        ),
    ] = "none"


class StageOptions(SaliencyOptions):
    """Of training in stages that preserve salient weights (ULB-SAPR). With stages, epochs are their sum.

    λ is dimensionless, see :class:`~ulbq.training.penalty.WeightPenalty`. A thousandth of the weights holds most of the
    Fisher information, and the others then weigh next to nothing; the root of the scores spreads the penalty.
    """

    stages: Annotated[
        Stages,
        Option(
            "A stage of the training, as in wpt:epochs=5,scale-lr=0.01; repeat for the next: wpt (weights alone), "
            f"mixed, opt (outputs alone). Keys: {', '.join(STAGE_KEYS)}.",
            STAGES,
            "STAGE:epochs=N…",
            flag="--stage",
            default="one mixed stage of --epochs",
            offers=STAGE_NAMES,
            repeated=True,
        ),
    ] = ()
    penalty: Annotated[
        Number,
        Option(
            "Weight of the penalty on moving salient weights, relative to the block's salient energy.",
            STAGES,
            "X",
            flag="--lambda",
        ),
    ] = 0.0
    block_multiplier: Annotated[Positive, Option("Lambda grows by this from block to block.", STAGES, "X")] = 1.0
    penalize: Annotated[Penalized, Option("Hold the quantized weight alone, or with its adapter.", STAGES)] = (
        "before-adapter"
    )
    saliency_power: Annotated[Positive, Option("Exponent of the scores; 1 is as published.", STAGES, "X")] = 0.5

    @property
    def penalized(self) -> bool:
        """Whether a stage has a λ above 0."""
        own = any(stage.penalized and stage.penalty for stage in self.stages)
        return own or (bool(self.penalty) and not self._overruled)

    @property
    def _overruled(self) -> bool:
        """Whether there are stages, and none that takes the run's λ."""
        return bool(self.stages) and not any(one.penalized and one.penalty is None for one in self.stages)

    def idle(self) -> dict[str, str]:
        """Scores and growth of a penalty that is not there."""
        off = super().idle()
        if self.saliency == "none":
            off["saliency_power"] = "`saliency`"
        if not self.penalized:
            off |= dict.fromkeys(("saliency", "saliency_power", "block_multiplier"), "`penalty`")
            off.setdefault("penalize", "`penalty`")
        if self._overruled:
            off["penalty"] = "a wpt or mixed stage without its own penalty"
        return off

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
                f"`epochs={data['epochs']}` contradicts the stages: {_listed(stages)}.",
                hint="Give the epochs in `stages` and leave out `epochs`.",
            )
        return {**data, "epochs": total}


class EndToEndOptions(MethodOptions):
    """Of the training of the whole model after its blocks.

    ``end_to_end_lr_factor`` of 0.4 in steps of 2 samples was the best of five settings for two epochs of ``kl`` on 16
    samples.
    """

    end_to_end: Annotated[
        Literal["none", Loss],
        Option(
            "Train the whole model after its blocks: on the text (ce), to the teacher's predictions (kl), both "
            "(ce-kl), with hidden states too (kl-hidden), or deviation-aware (dad).",
            END_TO_END,
            "LOSS",
            primary=True,
        ),
    ] = "none"
    end_to_end_data: Annotated[
        str | None,
        Option(
            "What it trains on: text as --calibration takes it, or an instruction set, whose answers alone are learnt: "
            "alpaca, a Hub id, or a file of instruction and output, prompt and completion, or chats.",
            END_TO_END,
            "NAME|FILE",
            default="the calibration samples",
            offers=DATA_SETS,
        ),
    ] = None
    end_to_end_samples: Annotated[
        Count | None,
        Option(
            "How many of these train; more or fewer than the blocks' --samples.",
            END_TO_END,
            "N",
            default="as --samples",
        ),
    ] = None
    end_to_end_template: Annotated[
        Template | None,
        Option(
            "How instructions are laid out: by the tokenizer's chat template, as Alpaca's prompt, or as LoftQ's for "
            "GSM8K.",
            END_TO_END,
            flag="--template",
            default="chat where there is one",
        ),
    ] = None
    end_to_end_epochs: Annotated[Count, Option("Passes over the samples.", END_TO_END, "N", planned=True)] = 1
    end_to_end_lr_factor: Annotated[
        Positive,
        Option(
            "Learning rates, as a share of those of the blocks.",
            END_TO_END,
            "X",
            formerly=("end_to_end_rate", "rate"),
        ),
    ] = 0.4
    end_to_end_train: Annotated[
        Trained,
        Option(
            "What trains: scales; the zero points of an asymmetric affine format too; or weights too.",
            END_TO_END,
            planned=True,
        ),
    ] = "scales"
    end_to_end_zero_lr: Annotated[
        Number,
        Option(
            "Learning rate of zero points (scales-zeros), in grid steps.",
            END_TO_END,
            "X",
            flag="--zero-lr",
            formerly=("end_to_end_zero_rate", "zero_rate"),
        ),
    ] = 0.1
    checkpointing: Annotated[
        bool, Option("Run each block again for its gradients, or keep all that they need in memory.", END_TO_END)
    ] = True
    gradient_accumulation: Annotated[
        Count, Option("Samples a step.", END_TO_END, "N", planned=True, formerly=("accumulation",))
    ] = 2
    teacher: Annotated[TeacherKind, Option("Run the teacher beside, or keep its best guesses on disk.", END_TO_END)] = (
        "streamed"
    )
    teacher_top_k: Annotated[Count, Option("Guesses a token in that cache.", END_TO_END, "N")] = 64
    end_to_end_gamma: Annotated[
        Number, Option("Exponent of the entropies that weigh tokens (dad).", END_TO_END, "X", flag="--dad-gamma")
    ] = 0.5
    end_to_end_hidden_weight: Annotated[
        Number, Option("Weight of the hidden states' error (kl-hidden).", END_TO_END, "X", flag="--hidden-weight")
    ] = 1.0

    def end_to_end_settings(self) -> FinetuneSettings | None:
        """Settings of the end-to-end phase; None for no such phase. Raises UsageError where they do not go together."""
        if self.end_to_end == "none":
            return None
        names = {name: PHASE_OPTIONS.get(name, name) for name in FinetuneSettings.model_fields}
        given = {name: getattr(self, own) for name, own in names.items() if own in type(self).model_fields}
        return FinetuneSettings.model_validate({**given, "tokens_at_once": _TOGETHER, "keep_best": True})

    def idle(self) -> dict[str, str]:
        """Settings of a phase, of its data and of its loss mean nothing without them."""
        off, loss = super().idle(), self.end_to_end
        if self.teacher == "streamed":
            off["teacher_top_k"] = "`teacher=cached`"
        if loss == "ce":
            off |= dict.fromkeys(("teacher", "teacher_top_k"), "`end_to_end=kl`")
        if loss == "none":
            off |= dict.fromkeys(_OF_THE_PHASE, "`end_to_end`")
        if loss == "none" or self.end_to_end_data is None:
            off["end_to_end_template"] = "`end_to_end_data`"
        if loss == "none" or self.end_to_end_train != "scales-zeros":
            off["end_to_end_zero_lr"] = "`end_to_end_train=scales-zeros`"
        if loss != "dad":
            off["end_to_end_gamma"] = "`end_to_end=dad`"
        if loss != "kl-hidden":
            off["end_to_end_hidden_weight"] = "`end_to_end=kl-hidden`"
        return off

    @model_validator(mode="after")
    def _refuse_zero_points_that_are_not_there(self) -> Self:
        if self.end_to_end_train == "scales-zeros" and not self.zero_points:
            raise UsageError(
                "`end_to_end_train=scales-zeros` wants zero points, which only an asymmetric affine format has.",
                hint="Take `end_to_end_train=scales`.",
            )
        return self


_OF_THE_PHASE = (
    *("end_to_end_data", "end_to_end_epochs", "end_to_end_lr_factor", "end_to_end_train", "end_to_end_samples"),
    *("gradient_accumulation", "checkpointing", "teacher", "teacher_top_k"),
)


class TrainedOptions(EndToEndOptions, StageOptions, GranularityOptions, AdapterOptions, TrainOptions):
    """What every trained method takes."""

    def idle(self) -> dict[str, str]:
        """Layers that learn their own outputs leave norms as they are, unless something behind them trains those."""
        layers = self.granularity == "layer" and self.end_to_end == "none"
        return super().idle() | ({"norm_lr": "`granularity=block`"} if layers else {})

    @model_validator(mode="after")
    def _refuse_what_does_nothing_in_a_stage(self) -> Self:
        # The end-to-end phase has the run's rates, not a stage's.
        off = self.model_copy(update={"end_to_end": "none"}).idle()
        for stage in self.stages:
            for name in sorted(key for key, value in stage if value is not None and key not in {"name", "epochs"}):
                _check_key(stage, name, off.get(name), name in self.taken())
            if stage.name == "wpt" and not (self.penalty if stage.penalty is None else stage.penalty):
                raise UsageError(
                    "`stages=wpt` minimizes the penalty alone, and its lambda is 0.",
                    hint="Give `penalty=X`, or penalty=X in the stage.",
                )
        return self


class WeightOptions(TrainedOptions):
    """What trained methods take whose weights may move."""

    train_weights: Annotated[
        bool,
        Option(
            "Let the weights move, or train scales, norms and adapter only.",
            TRAINING,
            flag="--train-weights/--freeze-weights",
        ),
    ] = True

    def idle(self) -> dict[str, str]:
        """Weights that are frozen have no rate, and do not train end to end."""
        off = super().idle()
        if not self.train_weights:
            off["weight_lr"] = "`train_weights`"
            if self.end_to_end_train == "all":
                off["end_to_end_train"] = "`train_weights`"
        return off


def _check_key(stage: Stage, name: str, needed: str | None, taken: bool) -> None:
    """Refuse a key of a stage that does nothing. Raises UsageError."""
    key = f"`stages={stage.name}:{name.replace('_', '-')}`"
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


class RtnOptions(RoundingOptions):
    """Options of ``rtn``."""

    calibrated: ClassVar[bool] = False


class GptqOptions(CompensationOptions, RoundingOptions):
    """Options of ``gptq``."""


class ApiQOptions(WeightOptions, AffineOptions):
    """Options of ``apiq``; the defaults come from ``benchmarks/sweep.py``."""

    adapter: bool = True
    batch_size: Count = 2
    weight_lr: Number = 0.02


class UlbSaprOptions(ApiQOptions):
    """Options of ``ulb-sapr``; without ``stages``, one ``mixed`` stage of ``epochs``."""

    penalty: Number = 0.03
    saliency: str = "fisher"


class DbLlmOptions(WeightOptions, BitsOptions):
    """Options of ``db-llm``; ULB-SAPR's variant freezes the weights and trains α and an adapter."""

    bits: Literal[2] = 2


class BinaryMosOptions(ExpertOptions, WeightOptions):
    """Options of ``binary-mos``; neither an adapter nor a penalty unless asked for.

    A sign changes where a weight has moved by its whole size, so the rates are higher than those of a finer grid
    (``benchmarks/sweep.py mos``).
    """

    weight_lr: Number = 0.09
    scale_lr: Number = 0.03
    end_to_end_lr_factor: Positive = 0.1

    def idle(self) -> dict[str, str]:
        """One expert needs no router."""
        return super().idle() | ({"router_lr": "`experts` 2 or more"} if self.experts == 1 else {})


class EfficientQatOptions(TrainedOptions, AffineOptions):
    """Options of ``efficientqat``; ``train=rounding`` with ``optimizer=sign`` is much what AutoRound does."""

    start: Annotated[
        BlockApStart,
        Option(
            "Where training starts (efficientqat): plain rounding as published, searched ranges, or gptq's codes.",
            FORMAT,
        ),
    ] = "search"
    train: Annotated[
        BlockTrained,
        Option(
            "Of efficientqat: clip ends; scales and zero points; these and each weight within half a step; weights "
            "alone; or weights and clip ends.",
            TRAINING,
        ),
    ] = "all"
    lr_unit: Annotated[
        RateUnit,
        Option(
            "What rates of weights and scales count in: grid steps, or the weight's own unit as published "
            "(efficientqat).",
            TRAINING,
            formerly=("rate_unit",),
        ),
    ] = "step"

    @property
    def train_weights(self) -> bool:
        """Whether weights move."""
        return self.train in {"rounding", "weights", "all"}

    def idle(self) -> dict[str, str]:
        """What does not train has no rate."""
        off = super().idle()
        if not self.train_weights:
            off["weight_lr"] = "`train=all`"
            if self.end_to_end_train == "all":
                off["end_to_end_train"] = "`train=all`"
        if self.train == "weights" and self.end_to_end == "none":
            off |= dict.fromkeys(("scale_lr", "scale_weight_decay"), "`train=all`")
        return off


class TrellisOptions(EndToEndOptions, RateSettings, BudgetOptions, SaliencyOptions, SequenceOptions):
    """Options of ``trellis``. Codes stay as they are found; what trains end to end are the vectors around them."""

    grouped: ClassVar[bool] = False

    bits: Literal[1, 2, 3, 4] = 2
    state_bits: Annotated[
        Literal[12, 16], Option("Of a trellis's state: 16 are better, and take 20 times as long.", FORMAT)
    ] = 12
    row_feedback: Annotated[
        bool,
        Option("Make errors good in later rows too, with smaller scales for inputs of high energy.", COLUMNS),
    ] = False
    saliency: str = "fisher"
    end_to_end_train: Literal["scales"] = "scales"

    @property
    def feedback(self) -> dict[str, Any]:
        """How errors are made good, by the names of :func:`~ulbq.solvers.trellis.solve`."""
        return {"damping": self.damping, "row_feedback": self.row_feedback}

    def idle(self) -> dict[str, str]:
        """Scores weigh the layers that share a budget, and rates are those of the end-to-end phase."""
        off = super().idle() | ({"saliency": "`target_bits`"} if self.target_bits is None else {})
        if self.end_to_end == "none":
            off |= dict.fromkeys(RateSettings.model_fields, "`end_to_end`")
        elif self.schedule == "constant":
            off["final_lr_factor"] = "`schedule=cosine`"
        return off

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        target = self.target_bits
        if target is not None and not self.bits < target <= MOST_TRELLIS_BITS:
            raise UsageError(
                f"`target_bits={target:g}` is not between the {self.bits} of `bits` and {MOST_TRELLIS_BITS}.",
                hint="Leave it out for layers of one width, or give another, or fewer `bits`.",
            )
        return self


_OF_TRAINING = (
    *("train_weights", "weight_lr", "scale_lr", "norm_lr", "adapter_lr", "scale_weight_decay"),
    *("adapter_weight_decay", "schedule", "warmup", "final_lr_factor", "clip", "patience", "retries", "optimizer"),
    *("augmented_loss", "sliced_wasserstein", "granularity", "base_share", "penalty", "adapter"),
)


class ClaqOptions(WeightOptions, CodebookOptions, CompensationOptions):
    """Options of ``claq``, which trains where it is told to."""

    preset_epochs: ClassVar[bool] = False

    epochs: Annotated[int, Field(ge=0, le=MOST)] = 0
    train_weights: bool = False

    def idle(self) -> dict[str, str]:
        """Scores weigh a penalty, or the layers that share a budget; nothing of the training means anything without."""
        off = super().idle()
        if not self.penalized:
            off["saliency"] = "`target_bits` and `allocation=global`"
            if self.surveyed:
                del off["saliency"]
        if self.epochs or self.stages:
            off.pop("token_weighting", None)
        trains = self.epochs or self.stages or self.end_to_end != "none"
        return off if trains else dict.fromkeys(_OF_TRAINING, "`epochs` 1 or more") | off

    @model_validator(mode="after")
    def _refuse_feedback_between_rows(self) -> Self:
        if self.hessian == "two-sided":
            raise UsageError(
                "`hessian=two-sided` makes errors good from row to row, and a codebook is found for all rows of a "
                "column at once.",
                hint="Take `hessian=guided`, or `method=gptq`.",
            )
        return self


METHOD_OPTIONS: dict[str, type[MethodOptions]] = {
    "db-llm": DbLlmOptions,
    "efficientqat": EfficientQatOptions,
    "apiq": ApiQOptions,
    "ulb-sapr": UlbSaprOptions,
    "binary-mos": BinaryMosOptions,
    "claq": ClaqOptions,
    "trellis": TrellisOptions,
    "gptq": GptqOptions,
    "rtn": RtnOptions,
}
"""What every method takes, by the name that ``method`` has."""


def method_options(name: str) -> type[MethodOptions]:
    """What the method of that name takes. Raises UsageError where there is none."""
    if name not in METHOD_OPTIONS:
        close = difflib.get_close_matches(name, METHOD_OPTIONS, n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"There is no method '{name}'.", hint=f"{meant}Methods: {', '.join(METHOD_OPTIONS)}.")
    return METHOD_OPTIONS[name]
