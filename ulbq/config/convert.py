"""What ``convert`` is asked to do."""

from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal

from ulbq.config.options import Option, Settings
from ulbq.config.run import DtypeName, Force, Offline, Out, Verify

TARGETS: dict[str, str] = {
    "dense": "plain weights",
    "gptq": "packed for other libraries",
    "compressed-tensors": "packed for other libraries",
    "auto-round": "packed for other libraries",
    "gguf": "for llama.cpp",
    "exl3": "for exllamav3",
    "mlx": "for MLX",
    "half": "the artifact itself, norms in half precision",
}
"""What each target writes, by the name that ``--to`` takes; :mod:`ulbq.export.targets` has a module for each."""

ENGINES: dict[str, str] = {
    "vllm": "vLLM",
    "vllm-cpu": "vLLM on a CPU",
    "sglang": "SGLang",
    "transformers": "transformers",
    "gptqmodel": "gptqmodel",
    "auto-gptq": "AutoGPTQ",
    "llama.cpp": "llama.cpp",
    "exllamav2": "exllamav2",
    "exllamav3": "exllamav3",
    "mlx": "MLX",
}
"""As their makers write them, by the name that ``--for`` takes."""

if TYPE_CHECKING:
    TargetName = str
    EngineName = str
else:
    TargetName, EngineName = Literal[*TARGETS], Literal[*ENGINES]


class ConvertRequest(Settings):
    """A conversion; without a source, of the newest artifact."""

    source: str | None = None
    to: Annotated[
        TargetName | None,
        Option(
            "; ".join(f"{', '.join(names)}: {summary}" for summary, names in groupby(TARGETS, TARGETS.get)) + ".",
            default="what --for reads best, else dense",
        ),
    ] = None
    engine: Annotated[
        EngineName | None, Option("Check first that this engine loads it, and choose what it reads.", flag="--for")
    ] = None
    dtype: Annotated[
        DtypeName | None,
        Option(
            "Of dense weights and of the tensors that are not packed.",
            default="bf16 for dense weights, fp16 for gguf, exl3 and mlx, else as they are stored",
        ),
    ] = None
    merge_adapter: Annotated[
        bool, Option("Make the adapter part of the weights; else it is copied beside them.", flag="--merge-adapter")
    ] = False
    block_types: Annotated[
        Literal["smallest", "fastest"] | None,
        Option(
            "Of GGUF: the type that takes the fewest bits, or one that every CPU computes fast.",
            flag="--block-types",
            default="smallest",
        ),
    ] = None
    offline: Offline = False
    verify: Verify = True
    out: Out = None
    force: Force = False
