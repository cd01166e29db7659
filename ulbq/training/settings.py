"""How blocks are trained; one value that requests, recipes and manifests share."""

from pydantic import BaseModel, ConfigDict, Field

from ulbq.training.losses import TokenWeighting


class TrainSettings(BaseModel):
    """Settings of block-wise training.

    Attributes:
        epochs: passes over the calibration samples; 0 stores the closed-form start.
        batch_size: samples a step.
        weight_rate: learning rate of the weights, in grid steps an update (AdamW moves about that far).
        scale_rate: learning rate of the scales, as a share of the group's starting step.
        norm_rate: learning rate of the block's norm weights (and of other vectors beside its linear layers); 0
            freezes them.
        warmup: share of the steps with a rising rate.
        final_rate: share of the rate that is left at the end of the cosine.
        clip: largest norm of the gradients of a step; 0 for none.
        token_weighting: how much each token counts.
        augmented_loss: add the distance to the full-precision block's output on the *quantized* stream.
        patience: epochs without a better held-out loss after which a block stops.
        retries: how often a block that diverged or got worse starts again at a quarter of the rates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=10, ge=0)
    batch_size: int = Field(default=4, ge=1)
    weight_rate: float = Field(default=0.015, gt=0)
    scale_rate: float = Field(default=0.005, gt=0)
    norm_rate: float = Field(default=2e-3, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    final_rate: float = Field(default=0.05, ge=0, le=1)
    clip: float = Field(default=1.0, ge=0)
    token_weighting: TokenWeighting = TokenWeighting.ENERGY
    augmented_loss: bool = False
    patience: int = Field(default=4, ge=1)
    retries: int = Field(default=2, ge=0)
