"""What each method takes: its defaults, and what does not go together.

Each method's ``Options`` are put together from groups (:mod:`ulbq.config.groups`, :mod:`ulbq.config.trained`).
"""

import difflib
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ulbq.config.groups import (
    AffineOptions,
    BitsOptions,
    BudgetOptions,
    CodebookOptions,
    CompensationOptions,
    ExpertOptions,
    MethodOptions,
    RoundingOptions,
    SaliencyOptions,
    SequenceOptions,
    UniformBudgetOptions,
)
from ulbq.config.options import COLUMNS, FORMAT, MOST, TRAINING, Count, Number, Option, Positive
from ulbq.config.trained import EndToEndOptions, TrainedOptions, WeightOptions
from ulbq.config.training import EpochSettings, RateSettings, TrainSettings
from ulbq.errors import UsageError

BlockApStart = Literal["min-max", "search", "gptq"]
BlockTrained = Literal["clipping", "grid", "rounding", "weights", "all"]
RateUnit = Literal["step", "weight"]

MOST_TRELLIS_BITS = 4


def _with_budget(target_bits: float | None, off: dict[str, str]) -> dict[str, str]:
    """What stays idle beside a budget: scores weigh the layers that share it."""
    return off if target_bits is None else {name: why for name, why in off.items() if name != "saliency"}


class RtnOptions(RoundingOptions):
    """Options of ``rtn``."""

    calibrated: ClassVar[bool] = False


class GptqOptions(SaliencyOptions, CompensationOptions, RoundingOptions, UniformBudgetOptions):
    """Options of ``gptq``."""

    saliency: str = "fisher"

    def idle(self) -> dict[str, str]:
        """Scores weigh the layers that share a budget."""
        return super().idle() | ({"saliency": "`target_bits`"} if self.target_bits is None else {})


class ApiQOptions(WeightOptions, AffineOptions, BudgetOptions):
    """Options of ``apiq``; the defaults come from ``benchmarks/settings.py defaults``."""

    adapter: bool = True
    batch_size: Count = 2
    weight_lr: Number = 0.02

    def idle(self) -> dict[str, str]:
        """Scores weigh the layers that share a budget, too."""
        return _with_budget(self.target_bits, super().idle())


class UlbSaprOptions(ApiQOptions):
    """Options of ``ulb-sapr``; without ``stages``, one ``mixed`` stage of ``epochs``."""

    penalty: Number = 0.03
    saliency: str = "fisher"


class DbLlmOptions(WeightOptions, BitsOptions):
    """Options of ``db-llm``; ULB-SAPR's variant freezes the weights and trains α and an adapter."""

    bits: Literal[2] = 2
    tied_scales: Annotated[
        bool,
        Option(
            "One scale a group in place of two, with levels -1, 0, 1 and 2 times it: what llama.cpp's Q2_0 and vLLM "
            "hold packed (db-llm).",
            FORMAT,
        ),
    ] = False


class BinaryMosOptions(ExpertOptions, WeightOptions):
    """Options of ``binary-mos``; neither an adapter nor a penalty unless asked for.

    A sign changes where a weight has moved by its whole size, so the rates are higher than those of a finer grid
    (``benchmarks/settings.py defaults``).
    """

    weight_lr: Number = 0.09
    scale_lr: Number = 0.03
    end_to_end_lr_factor: Positive = 0.1

    def idle(self) -> dict[str, str]:
        """One expert needs no router."""
        return super().idle() | ({"router_lr": "`experts` 2 or more"} if self.experts == 1 else {})


class EfficientQatOptions(TrainedOptions, UniformBudgetOptions):
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

    @model_validator(mode="before")
    @classmethod
    def _k_quants_have_grids_that_stay(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("k_quant"):
            return data
        if data.get("train", "weights") != "weights":
            raise UsageError(
                f"`train={data['train']}` moves scales, and those of `k_quant` stay while blocks train.",
                hint="Take `train=weights`; `end_to_end` trains the factors of super-blocks.",
            )
        return {**data, "train": "weights"}

    def idle(self) -> dict[str, str]:
        """What does not train has no rate."""
        off = super().idle()
        if not self.train_weights:
            off["weight_lr"] = "`train=all`"
            if self.end_to_end_train == "all":
                off["end_to_end_train"] = "`train=all`"
        if self.train == "weights" and self.end_to_end == "none":
            off |= dict.fromkeys(("scale_lr", "scale_weight_decay"), "`train=all`")
        return _with_budget(self.target_bits, off)


_OF_PASSES = ("batch_size", "micro_batch", "optimizer", "weight_lr", "patience", "retries")


class TrellisOptions(EndToEndOptions, EpochSettings, BudgetOptions, SaliencyOptions, SequenceOptions):
    """Options of ``trellis``. Codes stay as they are found.

    What trains are the vectors around them, and in a block, while it is solved, the weights that have none yet.
    """

    grouped: ClassVar[bool] = False
    preset_epochs: ClassVar[bool] = False

    epochs: Annotated[int, Field(ge=0, le=MOST)] = 0
    batch_size: Count = 2
    weight_lr: Number = 0.006
    bits: Literal[1, 2, 3, 4] = 2
    state_bits: Annotated[
        Literal[12, 16], Option("Of a trellis's state: 16 are better, and take 20 times as long.", FORMAT)
    ] = 12
    row_feedback: Annotated[
        bool, Option("Make errors good in later rows too, with smaller scales for inputs of high energy.", COLUMNS)
    ] = False
    saliency: str = "fisher"
    end_to_end_train: Literal["scales"] = "scales"

    @property
    def feedback(self) -> dict[str, Any]:
        """How errors are made good, by the names of :func:`~ulbq.solvers.trellis.solve`."""
        return {"damping": self.damping, "row_feedback": self.row_feedback}

    def settings(self) -> TrainSettings:
        """Of the training between the layers of a block."""
        return TrainSettings.model_validate(self.model_dump(include=set(EpochSettings.model_fields)))

    def idle(self) -> dict[str, str]:
        """Scores weigh the layers that share a budget, and rates are those of the trainings."""
        off = super().idle() | ({"saliency": "`target_bits`"} if self.target_bits is None else {})
        if not self.epochs:
            off |= dict.fromkeys(_OF_PASSES, "`epochs` 1 or more")
        if not self.epochs and self.end_to_end == "none":
            off |= dict.fromkeys(RateSettings.model_fields, "`epochs` or `end_to_end`")
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
