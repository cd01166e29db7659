"""Groups of options that trained methods share: stages, the end-to-end phase, and what does not go together in them."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from ulbq.config.finetuning import PHASE_OPTIONS, FinetuneSettings, Loss, TeacherKind, Trained
from ulbq.config.groups import AdapterOptions, GranularityOptions, MethodOptions, SaliencyOptions, TrainOptions
from ulbq.config.options import END_TO_END, STAGES, TRAINING, Count, Number, Option, Positive
from ulbq.config.run import DATA_SETS, Template
from ulbq.config.stages import STAGE_KEYS, STAGE_NAMES, Stage, Stages
from ulbq.errors import UsageError

Penalized = Literal["before-adapter", "after-adapter"]

# Tokens that run at once where samples are short: quantized weights are made once for all of them.
_TOGETHER = 1024


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
            "Learning rates, as a share of those of the blocks.", END_TO_END, "X", formerly=("end_to_end_rate", "rate")
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
