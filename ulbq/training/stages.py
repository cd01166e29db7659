"""Training in stages: each weighs the block's output and the preservation of salient weights in its own way."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

StageName = Literal["wpt", "mixed", "opt"]

_WEIGHTS: dict[StageName, tuple[float, bool]] = {"wpt": (0.0, True), "mixed": (1.0, True), "opt": (1.0, False)}
"""Weight of the output loss, and whether the penalty counts (ULB-SAPR's three stages)."""


class Stage(BaseModel):
    """One stage of a block's training. Rates and decays that are None are the run's.

    Attributes:
        name: ``wpt`` (weight preservation: the penalty alone), ``mixed`` (output loss and penalty) or ``opt`` (output
            loss alone).
        epochs: passes over the samples.
        penalty: λ of this stage; None for the run's. Means nothing to ``opt``.
        weight_rate … router_rate: as :class:`~ulbq.training.settings.TrainSettings` has them; 0 freezes the role.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: StageName = "opt"
    epochs: int = Field(ge=0)
    penalty: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    weight_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    scale_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    norm_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    adapter_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    router_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    scale_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    adapter_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @property
    def output(self) -> float:
        """Weight of the output loss."""
        return _WEIGHTS[self.name][0]

    @property
    def penalized(self) -> bool:
        """Whether the penalty counts."""
        return _WEIGHTS[self.name][1]
