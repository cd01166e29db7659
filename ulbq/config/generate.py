"""What ``generate`` and ``serve`` are asked to do."""

from typing import Annotated

from pydantic import ConfigDict, Field

from ulbq.config.options import ADDRESS, HOW, SAMPLING, SAY, Option, Settings
from ulbq.config.run import CudaGraphs, Devices, DtypeName, Offline, PrefillCache, Seed, Verify

_MOST_TOKENS = 2**31 - 1


class GenerationSettings(Settings):
    """A model that writes, and how it chooses its tokens.

    Repetitions are divided down as by Keskar et al. (2019, https://arxiv.org/abs/1909.05858). Small models of few bits
    answer in circles without.

    Attributes:
        source: as :func:`ulbq.models.source.resolve` takes it.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    source: str | None = None
    temperature: Annotated[
        Annotated[float, Field(ge=0)] | None,
        Option("Draw tokens; 0 takes the likeliest every time.", SAMPLING, "X", default="0; 1 with --top-p"),
    ] = None
    top_p: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        Option("Draw from the likeliest tokens that hold this share of the probability.", SAMPLING, "X", default="1"),
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, Field(gt=0, le=10)] | None,
        Option(
            "Above 1, what was said already is less likely to be said again.",
            SAMPLING,
            "X",
            default="1.1 in a chat, else 1",
        ),
    ] = None
    seed: Seed = 0
    dtype: Annotated[DtypeName, Option("What the model computes in.", HOW)] = "bf16"
    device: Devices = "auto"
    adapter: Annotated[bool, Option("With the adapter of the artifact, or its base alone.", HOW)] = True
    prefill_cache: PrefillCache = False
    cuda_graphs: CudaGraphs = True
    offline: Offline = False
    verify: Verify = True


class ConverseRequest(GenerationSettings):
    """A chat with a model, one message after the other."""

    max_new_tokens: Annotated[
        int,
        Field(ge=1, le=_MOST_TOKENS),
        Option("Write at most so many tokens.", SAY, "N", flag="--max-new-tokens -n"),
    ] = 256


class GenerateRequest(ConverseRequest):
    """One prompt to go on from.

    Attributes:
        prompt: the text.
    """

    prompt: str
    chat: Annotated[
        bool,
        Option(
            "The prompt is a message: answer it, by the model's chat template. Without --prompt, a conversation.",
            SAY,
            flag="--chat",
        ),
    ] = False


class ServeRequest(GenerationSettings):
    """A model that answers over HTTP. What a request says itself goes before the sampling options."""

    host: Annotated[
        str, Field(min_length=1), Option("Name or address to listen at; 0.0.0.0 is all of them.", ADDRESS, "NAME")
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535), Option("Port to listen at; 0 takes a free one.", ADDRESS, "N")] = 8000
    model_name: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Option("What requests call the model.", ADDRESS, "NAME", default="the source's name"),
    ] = None
    max_new_tokens: Annotated[
        Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None,
        Option(
            "Refuse requests for longer answers, and end others there.",
            SAY,
            "N",
            flag="--max-new-tokens -n",
            default="what the model's context leaves",
        ),
    ] = None
