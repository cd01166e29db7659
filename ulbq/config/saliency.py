"""What ``saliency`` is asked to do."""

from typing import Annotated, Literal

from pydantic import Field

from ulbq.config.options import CALIBRATION, COMPUTE, MOST, Count, Option, Settings
from ulbq.config.quantize import Calibration
from ulbq.config.run import (
    ActivationMemory,
    DataDir,
    Deterministic,
    Device,
    Force,
    Offline,
    Out,
    Precision,
    Seed,
    Stream,
)

SaliencyKind = Literal["fisher", "gradient", "hessian", "wanda", "magnitude"]
SaliencyDtype = Literal["bf16", "fp16"]


class SaliencyRequest(Settings):
    """A saliency run. None means: as the kind or the machine has it.

    Attributes:
        source: as given; None for the default model.
    """

    source: str | None = None
    kind: Annotated[
        SaliencyKind,
        Option("Squared or mean absolute gradients, squared inputs, |W|·‖x‖, or |W| alone.", flag="--kind -k"),
    ] = "fisher"
    dtype: Annotated[SaliencyDtype, Option("Of the stored scores: the wider range, or the finer steps.")] = "bf16"
    calibration: Calibration | None = None
    samples: Annotated[
        Count | None, Option("Sequences to score on.", CALIBRATION, "N", default="32 on a CPU, 128 on a GPU")
    ] = None
    sequence_length: Annotated[
        Annotated[int, Field(ge=2, le=MOST)] | None, Option("Tokens a sequence.", CALIBRATION, "N", default="512")
    ] = None
    batch_size: Annotated[
        Count | None,
        Option("Sequences at once on the way forward; each goes back by itself.", COMPUTE, "N", default="4"),
    ] = None
    activation_memory: ActivationMemory | None = None
    stream: Stream = None
    precision: Precision | None = None
    deterministic: Deterministic | None = None
    seed: Seed = 0
    device: Device = "auto"
    data_dir: DataDir = None
    offline: Offline = False
    out: Out = None
    force: Force = False
