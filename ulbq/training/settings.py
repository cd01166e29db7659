"""How blocks are trained; one value that requests, recipes and manifests share."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ulbq.training.losses import TokenWeighting

Role = Literal["weights", "scales", "zeros", "norms", "adapter", "router"]
"""What parameters are for; each role has a rate of its own."""


OptimizerKind = Literal["adamw", "sign"]


class TrainSettings(BaseModel):
    """Settings of block-wise training.

    Attributes:
        epochs: passes over the calibration samples; 0 stores the closed-form start.
        batch_size: samples a step.
        micro_batch: samples that run at once, their gradients accumulated over a step; None for all of them. A matter
            of memory alone.
        weight_rate: learning rate of the weights, in grid steps an update (AdamW moves about that far); 0 freezes them.
        scale_rate: learning rate of scales and clip ends, as a share of the group's starting step.
        norm_rate: learning rate of the block's norm weights (and of other vectors beside its linear layers); 0
            freezes them.
        adapter_rate: learning rate of LoRA's or DoRA's matrices.
        router_rate: learning rate of a mixture's router.
        optimizer: ``adamw``, or ``sign`` descent: each value moves by its rate in every step, as AutoRound does it.
        scale_decay, adapter_decay: weight decay of these roles (decoupled, towards 0).
        schedule: ``cosine`` falls to ``final_rate``, ``constant`` does not fall.
        warmup: share of the steps with a rising rate.
        final_rate: share of the rate that is left at the end of the cosine.
        clip: largest norm of the gradients of a step; 0 for none.
        token_weighting: how much each token counts.
        augmented_loss: add the distance to the full-precision block's output on the *quantized* stream.
        sliced_wasserstein: weight of the sliced-Wasserstein distance of the outputs, relative to the output loss.
        base_share: share of the steps in which the adapter is switched off, so that the base learns to stand alone.
        patience: epochs without a better held-out loss after which a block stops.
        retries: how often a block that diverged or got worse starts again at a quarter of the rates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=10, ge=0)
    batch_size: int = Field(default=4, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    weight_rate: float = Field(default=0.015, ge=0)
    scale_rate: float = Field(default=0.005, ge=0)
    norm_rate: float = Field(default=2e-3, ge=0)
    adapter_rate: float = Field(default=5e-3, ge=0)
    router_rate: float = Field(default=0.03, ge=0)
    optimizer: OptimizerKind = "adamw"
    scale_decay: float = Field(default=0.0, ge=0)
    adapter_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final_rate: float = Field(default=0.05, ge=0, le=1)
    clip: float = Field(default=1.0, ge=0)
    token_weighting: TokenWeighting = TokenWeighting.ENERGY
    augmented_loss: bool = False
    sliced_wasserstein: float = Field(default=0.0, ge=0)
    base_share: float = Field(default=0.0, ge=0, lt=1)
    patience: int = Field(default=4, ge=1)
    retries: int = Field(default=2, ge=0)

    def rates(self) -> dict[Role, float]:
        """Learning rates by role."""
        return {
            "weights": self.weight_rate,
            "scales": self.scale_rate,
            "norms": self.norm_rate,
            "adapter": self.adapter_rate,
            "router": self.router_rate,
        }

    def decays(self) -> dict[Role, float]:
        """Weight decays by role; 0 where a role is not named."""
        return {"scales": self.scale_decay, "adapter": self.adapter_decay}
