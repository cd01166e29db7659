"""Settings that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ulbq.config.options import COMPUTE, HOW, RUN, Option, Size
from ulbq.runtime import MAX_SEED

PrecisionName = Literal["auto", "fp32", "bf16"]
DtypeName = Literal["bf16", "fp16", "fp32"]
Template = Literal["chat", "alpaca", "gsm8k"]

TEXTS = ("wikitext2", "c4", "ptb", "pile", "redpajama", "alpaca", "mix", "self")
DATA_SETS = (*TEXTS, "llm-adapters/math")

Seed = Annotated[int, Field(ge=0, le=MAX_SEED), Option("Seed of everything random.", RUN, metavar="N", primary=True)]
Device = Annotated[
    str, Option("auto, cpu, cuda or cuda:N.", RUN, metavar="NAME", offers=("auto", "cpu", "cuda"), primary=True)
]
Devices = Annotated[
    str,
    Option(
        "auto, cpu, cuda or cuda:N; or several, as cuda:0,cuda:1,cpu, for a model that the first has no room for.",
        RUN,
        metavar="NAME,…",
        offers=("auto", "cpu", "cuda"),
        primary=True,
    ),
]
DataDir = Annotated[
    Path | None,
    Option("Folder of data sets laid out like the Hub, looked at first.", RUN, "DIR", default="ULBQ_DATA_DIR"),
]
Offline = Annotated[bool, Option("Never touch the network.", RUN, flag="--offline", primary=True)]
Out = Annotated[
    Path | None,
    Option(
        "Folder for the new artifact.",
        RUN,
        "DIR",
        flag="--output -o",
        default="a telling name under ./artifacts",
        primary=True,
    ),
]
Force = Annotated[
    bool, Option("Replace an artifact, or another run's partial one, at -o.", RUN, flag="--force", primary=True)
]
Verify = Annotated[
    bool,
    Option("Compare an artifact's files with their hashes as they are read, or not.", RUN, flag="--verify/--no-verify"),
]
Precision = Annotated[
    PrecisionName,
    Option("Dtype of the matrix products; auto is bf16 where the hardware has it.", COMPUTE, default="auto"),
]
ActivationMemory = Annotated[
    Size, Option("Activations beyond this lie on disk (512M, 4G, …).", COMPUTE, "SIZE", default="4G")
]
Stream = Annotated[
    bool | None,
    Option(
        "Read the full-precision model block by block where all of it is wanted, as by teachers and for samples of its "
        "own, or load it.",
        COMPUTE,
        default="by what memory has room for",
    ),
]
Shard = Annotated[
    bool | None,
    Option(
        "Of several processes that train a block or all of a model, each holds a part of what trains, or all of it.",
        COMPUTE,
        default="by what memory has room for",
    ),
]
Deterministic = Annotated[
    bool,
    Option(
        "On a GPU take algorithms that give the same results again, where torch has them.",
        COMPUTE,
        default="no-deterministic",
    ),
]
PrefillCache = Annotated[
    bool,
    Option(
        "Keep dense copies of packed weights: faster on long prompts, and as much memory as a dense model.",
        HOW,
        flag="--prefill-cache",
    ),
]
CudaGraphs = Annotated[
    bool, Option("On a GPU, record the work of a token once and replay it, or launch it kernel by kernel.", HOW)
]
Checkpointing = Annotated[
    bool, Option("Run each block again for its gradients, or keep all that they need in memory.", HOW)
]


LogTo = Annotated[
    Literal["tensorboard", "wandb", "trackio", "mlflow"] | None,
    Option("Send losses to a tracker as they come; TensorBoard's files go to ./runs.", RUN, default="nowhere"),
]


class RecipeRecord(BaseModel):
    """The recipe that a request was read from.

    Attributes:
        name: as it was asked for: a shipped recipe's name, or the file's.
        sha256: of its content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
