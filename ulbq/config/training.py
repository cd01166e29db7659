"""How blocks are trained."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ulbq.config.options import ADAPTER, MOST, TRAINING, Count, Number, Option, Part, Share

Role = Literal["weights", "scales", "zeros", "norms", "adapter", "magnitudes", "router"]
"""What parameters are for; each role has a rate of its own. Magnitudes are DoRA's, where they have one."""

OptimizerKind = Literal["adamw", "sign"]


class TokenWeighting(StrEnum):
    """How much each token counts in the output loss.

    ``energy`` divides a token's squared error by the token's own squared norm, so that every token counts by its
    relative error, and bounds what one token can weigh (:func:`ulbq.training.losses.bounded`). ``uniform`` is the plain
    mean squared error of the published methods, in which an attention sink with massive activations weighs by its
    energy.
    """

    ENERGY = "energy"
    UNIFORM = "uniform"


class TokenSettings(BaseModel):
    """How much each token counts, in output losses and second moments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_weighting: Annotated[
        TokenWeighting, Option("Count each token by its relative error, or all by plain squared error.", TRAINING)
    ] = TokenWeighting.ENERGY


class RateSettings(BaseModel):
    """Rates of what stands beside the weights, and how all rates go. Rates of 0 freeze their role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale_rate: Annotated[
        Number, Option("Learning rate of scales and clip ends, relative to the grid step.", TRAINING, "X")
    ] = 0.005
    norm_rate: Annotated[Number, Option("Learning rate of the norm weights; 0 freezes them.", TRAINING, "X")] = 2e-3
    scale_decay: Annotated[Number, Option("Weight decay of scales and clip ends.", TRAINING, "X")] = 0.0
    schedule: Annotated[Literal["cosine", "constant"], Option("Whether the rates fall.", TRAINING)] = "cosine"
    warmup: Annotated[Part, Option("Share of the steps with rising rates.", TRAINING, "X")] = 0.05
    final_rate: Annotated[Share, Option("Share of the rates that the cosine leaves.", TRAINING, "X")] = 0.05
    clip: Annotated[Number, Option("Largest gradient norm; 0 for none.", TRAINING, "X")] = 1.0


class TrainSettings(RateSettings, TokenSettings):
    """Settings of block-wise training. Rates of 0 freeze their role."""

    epochs: Annotated[
        int,
        Field(ge=0, le=MOST),
        Option(
            "Passes over the samples, for every block; 0 stores the closed-form start.", TRAINING, "N", planned=True
        ),
    ] = 10
    batch_size: Annotated[Count, Option("Samples a step.", TRAINING, "N", planned=True)] = 4
    micro_batch: Annotated[
        Count | None,
        Option(
            "Samples that run at once; a step adds up several. For less memory.", TRAINING, "N", default="the batch"
        ),
    ] = None
    optimizer: Annotated[OptimizerKind, Option("AdamW, or descent by the gradients' signs.", TRAINING)] = "adamw"
    weight_rate: Annotated[Number, Option("Learning rate of the weights, in grid steps.", TRAINING, "X")] = 0.015
    adapter_rate: Annotated[Number, Option("Learning rate of the adapter.", ADAPTER, "X")] = 5e-3
    router_rate: Annotated[Number, Option("Learning rate of the router (binary-mos).", TRAINING, "X")] = 0.03
    adapter_decay: Annotated[Number, Option("Weight decay of the adapter.", ADAPTER, "X")] = 0.0
    augmented_loss: Annotated[
        bool, Option("Also match the full-precision block on the quantized stream.", TRAINING)
    ] = False
    sliced_wasserstein: Annotated[
        Number, Option("Weight of the sliced-Wasserstein distance of the outputs.", TRAINING, "X")
    ] = 0.0
    base_share: Annotated[
        Part, Option("Share of the steps without the adapter, so that the base can stand alone.", ADAPTER, "X")
    ] = 0.0
    patience: Annotated[Count, Option("Epochs without a better held-out loss before a block stops.", TRAINING, "N")] = 4
    retries: Annotated[
        int,
        Field(ge=0, le=MOST),
        Option("How often a block that got worse starts again at a quarter of the rates.", TRAINING, "N"),
    ] = 2

    def learning_rates(self) -> dict[Role, float]:
        """Learning rates by role: AdamW moves a weight about as many grid steps in an update."""
        return {
            "weights": self.weight_rate,
            "scales": self.scale_rate,
            "norms": self.norm_rate,
            "adapter": self.adapter_rate,
            "router": self.router_rate,
        }

    def weight_decays(self) -> dict[Role, float]:
        """Decoupled weight decays by role, towards 0; 0 where a role is not named."""
        return {"scales": self.scale_decay, "adapter": self.adapter_decay}
