"""What requests ask for, as OpenAI's API has it, as far as one model without tools can do it.

Whatever would change the answer and is not done here is refused, not passed over. Of such fields the values that change
nothing are taken: many clients always send them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ulbq.runtime import MAX_SEED

_Nothing = Annotated[list[Any] | dict[str, Any], Field(max_length=0)] | None
_Zero = Annotated[float, Field(ge=0, le=0)] | None
_Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)] | None


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """What one side of a chat said. An answer of this server can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: _Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: _Nothing = None

    def for_template(self) -> dict[str, str]:
        """As chat templates take it: they know of no developers."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class StreamOptions(_Body):
    """What a stream holds beside text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(_Body):
    """What both kinds of requests have in common; ``repetition_penalty`` is this program's own, by vLLM's name.

    Attributes:
        stop: strings that end the answer and are no part of it.
        stream: server-sent events in place of one object.
    """

    model: str | None = None
    max_tokens: _Tokens = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]] | None,
        Field(max_length=16),
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Of no consequence.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # Not done here.
    n: Literal[1] | None = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None
    logit_bias: _Nothing = None

    @property
    def limit(self) -> int | None:
        """The longest answer that is asked for, in tokens."""
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class _TextFormat(_Body):
    type: Literal["text"]


class CompletionBody(GenerationBody):
    """A text to go on from: ``POST /v1/completions``."""

    prompt: Annotated[
        str, BeforeValidator(lambda given: given[0] if isinstance(given, list) and len(given) == 1 else given)
    ]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None


class ChatBody(GenerationBody):
    """A chat to answer: ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Tokens = None
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: _Zero = None
    modalities: list[Literal["text"]] | None = None
    response_format: _TextFormat | None = None
    tools: _Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def limit(self) -> int | None:
        """The longest answer that is asked for, in tokens; ``max_tokens`` is the former name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
