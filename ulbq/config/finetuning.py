"""How a whole model trains: after its blocks, on the text or by its full-precision self, or on a task."""

import math
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ulbq.config.options import HOW, RATES, Count, Number, Option, Part, Positive, Settings, Share
from ulbq.config.run import Checkpointing
from ulbq.config.training import Role
from ulbq.errors import UsageError

Loss = Literal["ce", "kl", "ce-kl", "kl-hidden", "dad"]
Trained = Literal["scales", "scales-zeros", "all"]
TrainedBeside = Literal["adapter", "adapter-scales"]
TeacherKind = Literal["streamed", "cached"]
Schedule = Literal["cosine", "linear", "constant"]

_BESIDE: tuple[Role, ...] = ("scales", "norms", "adapter", "router")
_ROLES: dict[Trained | TrainedBeside, tuple[Role, ...]] = {
    "adapter": ("adapter", "magnitudes"),
    "adapter-scales": ("scales", "adapter", "magnitudes"),
    "scales": _BESIDE,
    "scales-zeros": (*_BESIDE, "zeros"),
    "all": ("weights", *_BESIDE),
}


class FinetuneForm(Settings):
    """What both doors to the training of a whole model ask for, with the defaults of a task."""

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: Annotated[
        Count,
        Option("Passes over the samples.", HOW, "N", default="the task's; of end-to-end 1", primary=True),
    ] = 3
    batch_size: Annotated[
        Count, Option("Samples a step.", HOW, "N", default="the task's; of end-to-end 2", primary=True)
    ] = 16
    micro_batch: Annotated[
        Count, Option("Samples that run at once; a step adds up several.", HOW, "N", default="4")
    ] = 4
    checkpointing: Checkpointing = True
    clip: Annotated[
        Number, Option("Largest gradient norm; 0 for none.", HOW, "X", default="the task's; of end-to-end 1")
    ] = 1
    adapter_lr: Annotated[
        Positive,
        Option(
            "Learning rate of the adapter.",
            RATES,
            "X",
            default="the task's; of end-to-end 0.005",
            primary=True,
            formerly=("adapter_rate",),
        ),
    ] = 3e-4
    adapter_weight_decay: Annotated[
        Number,
        Option(
            "Weight decay of the adapter.",
            RATES,
            "X",
            default="the task's; of end-to-end 0",
            formerly=("adapter_decay",),
        ),
    ] = 0
    scale_lr: Annotated[
        Positive,
        Option(
            "Learning rate of scales, in shares of themselves.",
            RATES,
            "X",
            default="0.001; of end-to-end 0.005, of binary-mos 0.03",
            formerly=("scale_rate",),
        ),
    ] = 1e-3
    scale_weight_decay: Annotated[
        Number, Option("Weight decay of scales.", RATES, "X", default="0", formerly=("scale_decay",))
    ] = 0
    schedule: Annotated[
        Schedule,
        Option("How the rates fall.", RATES, default="the task's; of end-to-end cosine"),
    ] = "cosine"
    warmup: Annotated[
        Part,
        Option("Share of the steps with rising rates.", RATES, "X", default="the task's; of end-to-end 0.05"),
    ] = 0.03


class FinetuneSettings(FinetuneForm):
    """Settings of the training of a whole model. Building one raises UsageError where values do not go together.

    Rates of 0 freeze their role. DoRA's magnitudes have no weight decay on a task.

    Attributes:
        loss: ``ce`` on the text, ``kl`` to the teacher, ``ce-kl`` both, ``kl-hidden`` with the hidden states, ``dad``
            deviation-aware.
        train: ``adapter`` alone, or with the scales; ``scales`` with norms, router and adapter; ``scales-zeros`` with
            zero points too; ``all`` with weights.
        tokens_at_once: as many examples run at once as so many tokens hold, if these are fewer than ``micro_batch``;
            None for no such limit.
        lr_factor: of all learning rates.
        zero_lr: learning rate of zero points, in grid steps, before ``lr_factor``.
        final_lr_factor: share of the learning rates that a cosine of end-to-end training leaves.
        base_share: share of the steps without adapters.
        teacher: ``streamed`` runs for every batch, ``cached`` keeps its ``teacher_top_k`` best guesses of each token.
        dad_gamma: exponent of the entropies in ``dad``.
        hidden_weight: weight of the hidden states in ``kl-hidden``.
        eval_every: steps between two evaluations on the validation examples; 0 for none on the way, None for an epoch.
        save_every: steps between two checkpoints; None for an epoch.
        keep_best: whether the checkpoint with the lowest validation loss is kept, and not the last one.
    """

    loss: Loss = "ce"
    train: Trained | TrainedBeside = "adapter"
    tokens_at_once: Count | None = None
    lr_factor: Number = 1.0
    adapter_lr: Number = 0.0
    scale_lr: Number = 0.0
    weight_lr: Number = 0.0
    zero_lr: Number = 0.0
    norm_lr: Number = 0.0
    router_lr: Number = 0.0
    final_lr_factor: Share = 0.0
    base_share: Part = 0.0
    teacher: TeacherKind = "streamed"
    teacher_top_k: Count = 64
    dad_gamma: Number = 0.5
    hidden_weight: Number = 1.0
    eval_every: Annotated[int, Field(ge=0)] | None = None
    save_every: Count | None = None
    keep_best: bool = False

    @model_validator(mode="after")
    def _refuse_hidden_states_from_a_cache(self) -> Self:
        if self.loss == "kl-hidden" and self.teacher == "cached":
            raise UsageError(
                "`teacher=cached` keeps predictions, and `end_to_end=kl-hidden` wants the hidden states too.",
                hint="Use `teacher=streamed`, or `end_to_end=kl`.",
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is needed."""
        return self.loss != "ce"

    def steps(self, examples: int) -> int:
        """Optimizer steps of the whole run; the last step of an epoch may have fewer examples."""
        return self.epochs * math.ceil(examples / self.batch_size)

    def states(self, examples: int) -> int:
        """Checkpoints that lie on disk at once: the last and the best one, and that which is being written."""
        steps = self.steps(examples)
        written = math.ceil(steps / (self.save_every or math.ceil(examples / self.batch_size)))
        return min(written, 2 + self.keep_best)

    def together(self, length: int) -> int:
        """Examples of up to ``length`` tokens that run at once."""
        most = self.micro_batch
        return most if self.tokens_at_once is None else max(1, min(most, self.tokens_at_once // length))

    def learning_rates(self) -> dict[Role, float]:
        """Learning rates of the roles that train."""
        rates: dict[Role, float] = {
            "weights": self.weight_lr,
            "scales": self.scale_lr,
            "norms": self.norm_lr,
            "adapter": self.adapter_lr,
            "magnitudes": self.adapter_lr,
            "router": self.router_lr,
            "zeros": self.zero_lr,
        }
        return {role: self.lr_factor * rate for role, rate in rates.items() if rate and role in _ROLES[self.train]}

    def weight_decays(self) -> dict[Role, float]:
        """Decoupled weight decays by role, towards 0; 0 where a role is not named."""
        return {"scales": self.scale_weight_decay, "adapter": self.adapter_weight_decay}


PHASE_OPTIONS = {
    **{
        "loss": "end_to_end",
        "epochs": "end_to_end_epochs",
        "lr_factor": "end_to_end_lr_factor",
        "train": "end_to_end_train",
    },
    **{"zero_lr": "end_to_end_zero_lr", "dad_gamma": "end_to_end_gamma"},
    **{"hidden_weight": "end_to_end_hidden_weight"},
    **dict.fromkeys(("batch_size", "micro_batch"), "gradient_accumulation"),
}
"""Settings that a quantization run, whose blocks have their own, calls otherwise."""
