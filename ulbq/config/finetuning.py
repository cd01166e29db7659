"""How a whole model trains: after its blocks, on the text or by its full-precision self, or on a task."""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ulbq.config.options import HOW, RATES, Count, Number, Option, Part, Positive, Share
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


class FinetuneForm(BaseModel):
    """What both doors to the training of a whole model ask for, with the defaults of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
    adapter_rate: Annotated[
        Positive,
        Option("Learning rate of the adapter.", RATES, "X", default="the task's; of end-to-end 0.005", primary=True),
    ] = 3e-4
    adapter_decay: Annotated[
        Number, Option("Weight decay of the adapter.", RATES, "X", default="the task's; of end-to-end 0")
    ] = 0
    scale_rate: Annotated[
        Positive,
        Option(
            "Learning rate of scales, in shares of themselves.",
            RATES,
            "X",
            default="0.001; of end-to-end 0.005, of binary-mos 0.03",
        ),
    ] = 1e-3
    scale_decay: Annotated[Number, Option("Weight decay of scales.", RATES, "X", default="0")] = 0
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
        rate: factor of all learning rates.
        zero_rate: learning rate of zero points, in grid steps, before ``rate``.
        final_rate: share of the rates that a cosine of end-to-end training leaves.
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
    rate: Number = 1.0
    adapter_rate: Number = 0.0
    scale_rate: Number = 0.0
    weight_rate: Number = 0.0
    zero_rate: Number = 0.0
    norm_rate: Number = 0.0
    router_rate: Number = 0.0
    final_rate: Share = 0.0
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

    def together(self, length: int) -> int:
        """Examples of up to ``length`` tokens that run at once."""
        most = self.micro_batch
        return most if self.tokens_at_once is None else max(1, min(most, self.tokens_at_once // length))

    def learning_rates(self) -> dict[Role, float]:
        """Learning rates of the roles that train."""
        rates: dict[Role, float] = {
            "weights": self.weight_rate,
            "scales": self.scale_rate,
            "norms": self.norm_rate,
            "adapter": self.adapter_rate,
            "magnitudes": self.adapter_rate,
            "router": self.router_rate,
            "zeros": self.zero_rate,
        }
        return {role: self.rate * rate for role, rate in rates.items() if rate and role in _ROLES[self.train]}

    def weight_decays(self) -> dict[Role, float]:
        """Decoupled weight decays by role, towards 0; 0 where a role is not named."""
        return {"scales": self.scale_decay, "adapter": self.adapter_decay}


PHASE_OPTIONS = {
    **{"loss": "end_to_end", "epochs": "end_to_end_epochs", "rate": "end_to_end_rate", "train": "end_to_end_train"},
    **{"zero_rate": "end_to_end_zero_rate", "dad_gamma": "end_to_end_gamma"},
    **{"hidden_weight": "end_to_end_hidden_weight"},
    **dict.fromkeys(("batch_size", "micro_batch"), "accumulation"),
}
"""Settings that a quantization run, whose blocks have their own, calls otherwise."""
