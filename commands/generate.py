"""``ulbq generate``: let a model speak."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ulbq.config.generate import ConverseRequest, GenerateRequest
from ulbq.errors import InputError, UsageError
from ulbq.progress import Progress

from . import console
from .conversation import Questions
from .fields import asked, from_fields
from .options import Debug, Quiet, Source, input_is_piped, read_source
from .streams import write

if TYPE_CHECKING:
    from ulbq.pipeline.converse import Answer
    from ulbq.pipeline.generate import Generation

_KINDS = ("quantized", "converted")
_LONGEST_PROMPT = 64 << 20  # bytes

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="Go on from this text; '-' reads standard input.", show_default=False
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Write text and figures as JSON once all is written, instead of the text as it comes.",
        rich_help_panel="Terminal",
    ),
]


@from_fields(GenerateRequest)
def generate(
    source: Source = None,
    *,
    prompt: Prompt = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Let a model go on from a prompt, and tell its speed and memory.

    Without SOURCE, the newest quantized or converted model below this folder. Standard output carries the new text
    alone, as it comes; the figures go to standard error. --chat without --prompt is a conversation: every line of
    standard input is a message, and Ctrl-D ends it.
    """
    progress, _ = console.session(quiet=quiet, debug=debug)
    if prompt is None:
        _converse(source, given, progress, json=json)
        return
    typed = prompt != "-"
    if not typed and source == "-":
        raise UsageError("Standard input is either the SOURCE or the prompt.", hint="Name the SOURCE.")
    # Where standard input is the prompt's, a SOURCE left out is the newest artifact, even behind a pipe.
    chosen = read_source(source, "newest", progress, _KINDS, piped=typed)

    from ulbq.pipeline.generate import generate

    request = GenerateRequest(source=chosen, prompt=prompt if typed else _read_prompt(), **asked(given))
    try:
        done = generate(request, (lambda text: None) if json else _write, progress)
    except KeyboardInterrupt:
        # Enough was said: nothing is lost, and there is nothing to go on with.
        if not json:
            _write("\n")
        raise typer.Exit(130) from None
    if json:
        write(done.model_dump_json(indent=2))
    elif not done.text.endswith("\n"):
        _write("\n")
    if not done.text.strip():
        progress.warn(_nothing_said(done.new_tokens, chat=request.chat))
    for line in _summary(done):
        progress.note(line)


def _converse(source: str | None, given: dict[str, Any], progress: Progress, *, json: bool) -> None:
    """Answer the lines of standard input, which a terminal or a pipe brings."""
    if not given.pop("chat"):
        raise UsageError("Missing option '--prompt'.", hint="Give one, or --chat for a conversation.")
    if json:
        raise UsageError("--json tells of one prompt, and there is no --prompt.", hint="Leave it out.")
    if source == "-" or (source is None and input_is_piped()):
        raise UsageError("Standard input is either the SOURCE or the conversation.", hint="Name the SOURCE.")
    chosen = read_source(source, "newest", progress, _KINDS, piped=False)

    from ulbq.pipeline.converse import converse

    def told(answer: "Answer") -> None:
        if not answer.text.endswith("\n"):
            _write("\n")
        if answer.ending == "length":
            progress.note(f"(cut after {answer.new_tokens:,} tokens; --max-new-tokens allows more)")
        elif not answer.text.strip() and answer.ending == "stop":
            progress.warn(_nothing_said(answer.new_tokens, chat=True))

    request = ConverseRequest(source=chosen, **asked(given))
    try:
        converse(request, Questions(progress), _write, told, progress)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _summary(done: "Generation") -> Iterator[str]:
    """What the generation took, a line each."""
    from .progress import duration

    first = f"the first after {done.prompt_tokens:,} of the prompt in {done.prefill_seconds:.2f} s"
    if done.tokens_per_second is None:
        yield f"{done.new_tokens} token, {first}."
    else:
        pace = f"{done.new_tokens:,} tokens, {first}, the others in {duration(done.decode_seconds)}"
        yield f"{pace}: {done.tokens_per_second:.1f} tokens per second ({done.device})."
    held = f"Weights {_megabytes(done.weight_memory)}"
    if done.cache_memory:
        held += f", prefill cache {_megabytes(done.cache_memory)}"
    if done.device_memory is not None:
        held += f", at most {_megabytes(done.device_memory)} on the device"
    yield f"{held}; the process at most {_megabytes(done.peak_memory)}."


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _nothing_said(tokens: int, *, chat: bool) -> str:
    """Why there is nothing to read, and what might help: an empty line alone looks like a fault."""
    other = "the bare text, without --chat" if chat else "another prompt"
    what = "ended its answer at once" if tokens == 1 else f"wrote {tokens:,} tokens that show nothing"
    return f"The model {what}; try {other}, --temperature 0.7, or a model of more bits."


def _write(text: str) -> None:
    write(text, end="")


def _read_prompt() -> str:
    raw = sys.stdin.buffer.read(_LONGEST_PROMPT + 1) if sys.stdin is not None else b""
    if len(raw) > _LONGEST_PROMPT:
        raise InputError("The prompt on standard input is longer than any model takes.")
    try:
        # The end of the last line is the shell's, not the prompt's.
        return raw.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError("The prompt on standard input is not UTF-8.") from error
