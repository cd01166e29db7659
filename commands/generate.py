"""``ulbq generate``: let a model speak."""

import sys
from typing import Annotated, Literal

import typer

from ulbq.errors import InputError, UsageError

from . import console
from .options import Debug, Device, NoVerify, Offline, Quiet, Seed, Source, read_source
from .streams import write

_TEXT, _SAMPLING, _HOW = "What to say", "Sampling", "How"
_KINDS = ("quantized", "converted")
_LONGEST_PROMPT = 64 << 20  # bytes

Prompt = Annotated[
    str,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="Go on from this text; '-' reads standard input.", rich_help_panel=_TEXT
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="The prompt is a message: answer it, by the model's chat template.", rich_help_panel=_TEXT
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", "-n", min=1, metavar="N", help="Write at most so many tokens.", rich_help_panel=_TEXT
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0,
        metavar="X",
        help="Draw tokens; 0 takes the likeliest every time.",
        show_default="0; 1 with --top-p",
        rich_help_panel=_SAMPLING,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="X",
        help="Draw from the likeliest tokens that hold this share of the probability.",
        show_default="1",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Above 1, what was said already is less likely to be said again.",
        show_default="1.1 with --chat, else 1",
        rich_help_panel=_SAMPLING,
    ),
]
Adapter = Annotated[
    bool,
    typer.Option(
        "--adapter/--no-adapter", help="With the adapter of the artifact, or its base alone.", rich_help_panel=_HOW
    ),
]
PrefillCache = Annotated[
    bool,
    typer.Option(
        "--prefill-cache",
        help="Keep dense copies of packed weights: faster on long prompts, and as much memory as a dense model.",
        rich_help_panel=_HOW,
    ),
]
Dtype = Annotated[
    Literal["bf16", "fp16", "fp32"],
    typer.Option("--dtype", help="What the model computes in.", rich_help_panel=_HOW),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Write text and figures as JSON once all is written, instead of the text as it comes.",
        rich_help_panel="Terminal",
    ),
]


def generate(
    source: Source = None,
    *,
    prompt: Prompt,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    adapter: Adapter = True,
    prefill_cache: PrefillCache = False,
    dtype: Dtype = "bf16",
    device: Device = "auto",
    offline: Offline = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Let a model go on from a prompt, and tell its speed and memory.

    Without SOURCE, the newest quantized or converted model under ./artifacts. Standard output carries the new text
    alone, as it comes; the figures go to standard error.
    """
    progress, _ = console.session(quiet=quiet, debug=debug)
    typed = prompt != "-"
    if not typed and source == "-":
        raise UsageError("Standard input is either the SOURCE or the prompt.", hint="Name the SOURCE.")
    # Where standard input is the prompt's, a SOURCE left out is the newest artifact, even behind a pipe.
    chosen = read_source(source, "newest", progress, _KINDS, piped=typed)

    from ulbq.pipeline.generate import GenerateRequest, generate

    from .figures import summary

    request = GenerateRequest(
        source=chosen,
        prompt=prompt if typed else _read_prompt(),
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        dtype=dtype,
        device=device,
        adapter=adapter,
        prefill_cache=prefill_cache,
        offline=offline,
        verify=not no_verify,
    )
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
        progress.warn(_nothing_said(done.new_tokens, chat=chat))
    for line in summary(done):
        progress.note(line)


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
