"""How the whole model is trained after its blocks."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from ulbq.config.options import Count, Number, Positive
from ulbq.config.training import Role, TrainSettings
from ulbq.errors import UsageError

Loss = Literal["ce", "kl", "ce-kl", "kl-hidden", "dad"]
Trained = Literal["scales", "scales-zeros", "all"]
TeacherKind = Literal["streamed", "cached"]

# Tokens that run at once where samples are short: quantized weights are made once for all of them.
_TOGETHER = 1024


class EndToEndSettings(BaseModel):
    """Settings of end-to-end training. Building one raises UsageError where values do not go together.

    Attributes:
        loss: ``ce`` on the text, ``kl`` to the teacher, ``ce-kl`` both, ``kl-hidden`` with the hidden states, ``dad``
            deviation-aware.
        epochs: passes over the samples.
        rate: learning rates, as a share of the block-wise training's.
        train: ``scales`` with norms, router and adapter; ``scales-zeros`` with zero points too; ``all`` with weights.
        zero_rate: learning rate of zero points, in grid steps, before ``rate``.
        accumulation: samples a step.
        teacher: ``streamed`` runs for every batch, ``cached`` keeps its ``top_k`` best guesses of each token.
        gamma: exponent of the entropies in ``dad``.
        hidden_weight: weight of the hidden states in ``kl-hidden``.
        checkpointing: see :class:`~ulbq.training.student.Student`.
        block: the block-wise training's settings: rates, decays, schedule, warm-up, clip and the base's share of the
            steps are taken from there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Loss
    epochs: Count = 1
    rate: Positive = 0.4
    train: Trained = "scales"
    zero_rate: Number = 0.1
    accumulation: Count = 2
    teacher: TeacherKind = "streamed"
    top_k: Count = 64
    gamma: Number = 0.5
    hidden_weight: Number = 1.0
    checkpointing: bool = True
    block: TrainSettings = TrainSettings()

    @model_validator(mode="after")
    def _refuse_hidden_states_from_a_cache(self) -> Self:
        if self.loss == "kl-hidden" and self.teacher == "cached":
            raise UsageError(
                "`teacher=cached` keeps predictions, and `end_to_end=kl-hidden` wants the hidden states too.",
                hint="Use `teacher=streamed`, or `end_to_end=kl`.",
            )
        return self

    @property
    def taught(self) -> bool:
        """Whether a teacher is needed."""
        return self.loss != "ce"

    def together(self, length: int) -> int:
        """Samples of ``length`` tokens that run at once: as many as a step has, up to 1,024 tokens."""
        return max(1, min(self.accumulation, _TOGETHER // length))

    def rates(self) -> dict[Role, float]:
        """Learning rates of the roles that train."""
        rates = {**self.block.rates(), "zeros": self.zero_rate if self.train == "scales-zeros" else 0.0}
        return {role: self.rate * r for role, r in rates.items() if r and (self.train == "all" or role != "weights")}
