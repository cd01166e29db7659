"""``ulbq eval``: how good a model is, and how far it is from the one that it was made from."""

from typing import Annotated, Literal

import typer

from ulbq.errors import UsageError
from ulbq.progress import Progress

from . import console
from .options import DataDir, Debug, Device, Force, Json, NoVerify, Offline, Out, Quiet, Seed, check_out, read_source

_MEASURES = "What to measure"
_PROTOCOL = "How"
_KINDS = ("quantized", "converted")


def _task_names() -> list[str]:
    from ulbq.evaluation.written_tasks import WRITTEN_NAMES

    return ["piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "social_iqa", *WRITTEN_NAMES]


def eval(  # the command's name; nothing here evaluates expressions
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Hub id, model folder, GGUF file or artifact; '-' reads one path from standard input.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Put several SOURCEs in one table; finished evaluations too.")
    ] = False,
    perplexity: Annotated[
        str | None,
        typer.Option(
            "--perplexity",
            metavar="NAME,…",
            help="Text sets: wikitext2, c4, ptb.",
            show_default="wikitext2 if nothing else is asked",
            autocompletion=lambda: ["wikitext2", "c4", "ptb"],
            rich_help_panel=_MEASURES,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,…",
            help="lm-eval tasks, as in piqa,arc_easy,'mmlu_*', and tasks with written answers: "
            "gsm8k-cot, svamp, mawps, aqua, commonsense.",
            autocompletion=_task_names,
            rich_help_panel=_MEASURES,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Let every model and its full-precision parent go on from this text, beside the scores, and time it; "
            "can be given more than once.",
            show_default=False,
            rich_help_panel=_MEASURES,
        ),
    ] = None,
    template: Annotated[
        Literal["chat", "alpaca", "gsm8k"] | None,
        typer.Option(
            "--template",
            help="How questions that want a written answer, and prompts, are laid out.",
            show_default="questions as the model was fine-tuned, else alpaca; prompts as bare text",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            metavar="N",
            help="Longest written answer, or text after a prompt.",
            show_default="256, commonsense and --prompt 32",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    fidelity: Annotated[
        bool | None,
        typer.Option(
            "--fidelity/--no-fidelity",
            help="Compare predictions with the full-precision parent's.",
            show_default="if nothing else is asked",
            rich_help_panel=_MEASURES,
        ),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter/--no-adapter",
            help="Score an artifact with the adapter that it has, or its base alone.",
            rich_help_panel=_MEASURES,
        ),
    ] = True,
    parent: Annotated[
        str | None,
        typer.Option(
            "--parent",
            metavar="SOURCE",
            help="The full-precision parent.",
            show_default="the one on record",
            rich_help_panel=_MEASURES,
        ),
    ] = None,
    parent_scores: Annotated[
        bool | None,
        typer.Option(
            "--parent-scores/--no-parent-scores",
            help="Score the parent too.",
            show_default="its perplexity, not its tasks",
            rich_help_panel=_MEASURES,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            metavar="N",
            help="Tokens a window of text.",
            show_default="1024",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=0,
            metavar="N",
            help="Windows a text and documents a task; 0 for all.",
            show_default="all; 32 on a CPU if nothing is asked",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(
            "--fewshot",
            min=0,
            metavar="N",
            help="Examples in a task's prompt.",
            show_default="as the task says",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            metavar="N",
            help="Sequences at once.",
            show_default="as many as memory takes",
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"],
        typer.Option("--dtype", help="What the models compute in.", rich_help_panel=_PROTOCOL),
    ] = "bf16",
    prefill_cache: Annotated[
        bool,
        typer.Option(
            "--prefill-cache",
            help="Keep dense copies of packed weights: faster, and as much memory as a dense model.",
            rich_help_panel=_PROTOCOL,
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    offline: Offline = False,
    no_verify: NoVerify = False,
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model: size, perplexity, fidelity to its full-precision parent, benchmark tasks, words and speed.

    Without SOURCE, the newest quantized or converted model under ./artifacts. If no score is asked for: fidelity, and
    perplexity on WikiText-2 where that can be had. Writes results.json and report.html.
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(out, force=force)
    chosen = _read_sources(sources or [], compare, progress)

    from ulbq.pipeline.evaluate import EvaluateRequest, evaluate

    request = EvaluateRequest(
        sources=chosen,
        perplexity=_names("--perplexity", perplexity),
        tasks=_names("--tasks", tasks),
        prompts=tuple(prompt or ()),
        template=template,
        max_new_tokens=max_new_tokens,
        fidelity=fidelity,
        parent=parent,
        adapter=adapter,
        prefill_cache=prefill_cache,
        parent_scores=parent_scores,
        context=context,
        limit=limit,
        fewshot=fewshot,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        seed=seed,
        data_dir=data_dir,
        offline=offline,
        verify=not no_verify,
        out=out,
        force=force,
    )
    path, manifest = evaluate(request, progress)
    if not quiet:
        from .scores import show

        show(console.terminal(), manifest, path / "report.html")
    emit(path, manifest)


def _read_sources(sources: list[str], compare: bool, progress: Progress) -> tuple[str, ...]:
    """The models to evaluate; more than one only with ``--compare``, and with it at least two."""
    if compare and len(sources) < 2:
        raise UsageError(
            "--compare needs two SOURCEs or more.", hint="As in: ulbq eval --compare artifacts/a artifacts/b"
        )
    if not compare and len(sources) > 1:
        raise UsageError("More than one SOURCE.", hint="Put --compare before them to have them in one table.")
    first = read_source(sources[0] if sources else None, "newest", progress, _KINDS)
    return tuple(read for read in [first, *(_read(source) for source in sources[1:])] if read is not None)


def _read(source: str) -> str:
    if source == "-":
        raise UsageError("Only the first SOURCE can be '-'.", hint="Put it first.")
    return source


def _names(option: str, text: str | None) -> tuple[str, ...]:
    """The names in a list with commas; an option that is given must name something."""
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    if text is not None and not names:
        raise UsageError(f"{option} names nothing.", hint=f"As in: {option} a,b")
    return names
