"""``generate --chat`` without a prompt: a model answers one message after the other."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from ulbq.config.generate import ConverseRequest
from ulbq.errors import UsageError
from ulbq.models.decoding import Ending, TextStream
from ulbq.progress import Progress, Silent
from ulbq.serving.generator import TextGenerator


class Answer(NamedTuple):
    """What was said to one message.

    Attributes:
        text: the answer.
        ending: why it ended; ``interrupt`` where the reader had heard enough.
        new_tokens: its tokens.
    """

    text: str
    ending: Ending | Literal["interrupt"]
    new_tokens: int


def converse(
    request: ConverseRequest,
    ask: Callable[[], str | None],
    on_text: Callable[[str], object] = lambda text: None,
    on_answer: Callable[[Answer], object] = lambda answer: None,
    progress: Progress | None = None,
) -> None:
    """Answer messages, each in the light of those before it.

    KeyboardInterrupt ends an answer, which counts as far as it was heard; the next message is asked for.

    Args:
        request: what to do.
        ask: called for each message; None ends the conversation, an empty one is asked for again.
        on_text: called with every piece of an answer as soon as it is known.
        on_answer: called after each answer.
        progress: told how it goes.

    Raises:
        UsageError: options that do not go together, or no room is left for an answer.
        InputError: a source that is no model, or has no chat template that takes the messages.
        ResourceError: the model, the device or memory are not to be had.
        NumericsError: the model's predictions are not finite.
    """
    progress = progress or Silent()
    generator = TextGenerator(request, progress)
    generator.chat_tokens([{"role": "user", "content": "Hello"}])  # before the weights are read
    generator.load(progress)
    messages: list[dict[str, str]] = []
    while (message := ask()) is not None:
        if not message.strip():
            continue
        messages.append({"role": "user", "content": message})
        tokens = generator.chat_tokens(messages)
        settings = generator.settings(_room(generator, len(tokens), request.max_new_tokens), chat=True)
        stream = TextStream(generator.tokenizer, on_text)
        ending: Ending | Literal["interrupt"] = "interrupt"
        try:
            ending = generator.write(tokens, settings, stream)
        except KeyboardInterrupt:
            stream.end()
        if stream.text or ending != "interrupt":
            messages.append({"role": "assistant", "content": stream.text})
        else:
            messages.pop()
        on_answer(Answer(stream.text, ending, max(stream.new_tokens, 0)))


def _room(generator: TextGenerator, prompt: int, wanted: int) -> int:
    """New tokens that there is room for, at most as many as are wanted. Raises UsageError."""
    if generator.context is None:
        return wanted
    if prompt >= generator.context:
        raise UsageError(
            f"The conversation has {prompt:,} tokens, and '{generator.source.given}' holds {generator.context:,}.",
            hint="Begin a new one.",
        )
    return min(wanted, generator.context - prompt)
