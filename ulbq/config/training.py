"""How blocks are trained."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from ulbq.config.options import ADAPTER, MOST, TRAINING, Count, Number, Option, Part, Settings, Share

Role = Literal["weights", "scales", "zeros", "norms", "adapter", "magnitudes", "router"]
"""What parameters are for; each role has a rate of its own. Magnitudes are DoRA's, where they have one."""

OptimizerKind = Literal["adamw", "adamw-bf16", "sign"]


class TokenWeighting(StrEnum):
    """How much each token counts in the output loss.

    ``energy`` divides a token's squared error by the token's own squared norm, so that every token counts by its
    relative error, and bounds what one token can weigh (:func:`ulbq.training.losses.bounded`). ``uniform`` is the plain
    mean squared error of the published methods, in which an attention sink with massive activations weighs by its
    energy.
    """

    ENERGY = "energy"
    UNIFORM = "uniform"


class TokenSettings(Settings):
    """How much each token counts, in output losses and second moments."""

    token_weighting: Annotated[
        TokenWeighting, Option("Count each token by its relative error, or all by plain squared error.", TRAINING)
    ] = TokenWeighting.ENERGY


class RateSettings(Settings):
    """Rates of what stands beside the weights, and how all rates go. Rates of 0 freeze their role."""

    scale_lr: Annotated[
        Number,
        Option(
            "Learning rate of scales and clip ends, relative to the grid step.", TRAINING, "X", formerly=("scale_rate",)
        ),
    ] = 0.005
    norm_lr: Annotated[
        Number, Option("Learning rate of the norm weights; 0 freezes them.", TRAINING, "X", formerly=("norm_rate",))
    ] = 2e-3
    scale_weight_decay: Annotated[
        Number, Option("Weight decay of scales and clip ends.", TRAINING, "X", formerly=("scale_decay",))
    ] = 0.0
    schedule: Annotated[Literal["cosine", "constant"], Option("Whether the rates fall.", TRAINING)] = "cosine"
    warmup: Annotated[Part, Option("Share of the steps with rising rates.", TRAINING, "X")] = 0.05
    final_lr_factor: Annotated[
        Share, Option("Share of the learning rates that the cosine leaves.", TRAINING, "X", formerly=("final_rate",))
    ] = 0.05
    clip: Annotated[Number, Option("Largest gradient norm; 0 for none.", TRAINING, "X")] = 1.0


class EpochSettings(RateSettings, TokenSettings):
    """Of passes over the samples with a block's weights."""

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
    optimizer: Annotated[
        OptimizerKind,
        Option(
            "AdamW; the same with moments in bfloat16, for less memory; or descent by the gradients' signs.", TRAINING
        ),
    ] = "adamw"
    weight_lr: Annotated[
        Number,
        Option(
            "Learning rate of the weights, in grid steps (trellis: in root mean squares of their row).",
            TRAINING,
            "X",
            formerly=("weight_rate",),
        ),
    ] = 0.015
    patience: Annotated[Count, Option("Epochs without a better held-out loss before a block stops.", TRAINING, "N")] = 4
    retries: Annotated[
        int,
        Field(ge=0, le=MOST),
        Option("How often a block that got worse starts again at a quarter of the rates.", TRAINING, "N"),
    ] = 2


class TrainSettings(EpochSettings):
    """Settings of block-wise training. Rates of 0 freeze their role."""

    adapter_lr: Annotated[Number, Option("Learning rate of the adapter.", ADAPTER, "X", formerly=("adapter_rate",))] = (
        5e-3
    )
    router_lr: Annotated[
        Number, Option("Learning rate of the router (binary-mos).", TRAINING, "X", formerly=("router_rate",))
    ] = 0.03
    adapter_weight_decay: Annotated[
        Number, Option("Weight decay of the adapter.", ADAPTER, "X", formerly=("adapter_decay",))
    ] = 0.0
    augmented_loss: Annotated[
        bool, Option("Also match the full-precision block on the quantized stream.", TRAINING)
    ] = False
    sliced_wasserstein: Annotated[
        Number, Option("Weight of the sliced-Wasserstein distance of the outputs.", TRAINING, "X")
    ] = 0.0
    base_share: Annotated[
        Part, Option("Share of the steps without the adapter, so that the base can stand alone.", ADAPTER, "X")
    ] = 0.0

    def learning_rates(self) -> dict[Role, float]:
        """Learning rates by role: AdamW moves a weight about as many grid steps in an update."""
        return {
            "weights": self.weight_lr,
            "scales": self.scale_lr,
            "norms": self.norm_lr,
            "adapter": self.adapter_lr,
            "router": self.router_lr,
        }

    def weight_decays(self) -> dict[Role, float]:
        """Decoupled weight decays by role, towards 0; 0 where a role is not named."""
        return {"scales": self.scale_weight_decay, "adapter": self.adapter_weight_decay}
