"""What ``convert`` is asked to do."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict

from ulbq.config.options import Option
from ulbq.config.run import DtypeName, Force, Offline, Out, Verify

Target = Literal["dense", "gptq", "compressed-tensors", "gguf", "half"]
Engine = Literal["vllm", "sglang", "transformers", "gptqmodel", "auto-gptq", "llama.cpp", "exllamav2"]


class ConvertRequest(BaseModel):
    """A conversion; without a source, of the newest artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    to: Annotated[
        Target | None,
        Option(
            "dense: plain weights; gptq, compressed-tensors: packed for other libraries; gguf: for llama.cpp; half: "
            "the artifact itself, norms in half precision.",
            default="what --for reads best, else dense",
        ),
    ] = None
    engine: Annotated[
        Engine | None, Option("Check first that this engine loads it, and choose what it reads.", flag="--for")
    ] = None
    dtype: Annotated[
        DtypeName | None,
        Option("Of the tensors that are not packed.", default="bf16 for dense, fp16 for gguf, else as is"),
    ] = None
    merge_adapter: Annotated[
        bool,
        Option("Make the adapter part of the weights; else it is copied beside them.", flag="--merge-adapter"),
    ] = False
    offline: Offline = False
    verify: Verify = True
    out: Out = None
    force: Force = False
