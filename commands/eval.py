"""``ulbq eval``: how good a model is, and how far it is from the one that it was made from."""

from typing import Annotated, Any

import typer

from ulbq.config.evaluate import EvaluateRequest
from ulbq.errors import UsageError
from ulbq.progress import Progress

from . import console
from .fields import asked, from_fields
from .options import Debug, Json, Quiet, check_out, read_source
from .sections import HelpAll

_KINDS = ("quantized", "converted")


@from_fields(EvaluateRequest)
def eval(  # the command's name; nothing here evaluates expressions
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Hub id, model folder, GGUF file, artifact or smollm2-135m; '-' reads one path from standard input.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Put several SOURCEs in one table; finished evaluations too.")
    ] = False,
    help_all: HelpAll = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Measure a model: size, perplexity, fidelity to its full-precision parent, tasks, words and speed.

    Without SOURCE, the newest quantized or converted model below this folder. If no score is asked for: fidelity, and
    perplexity on WikiText-2 where that can be had. Writes results.json and report.html.
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=given["force"])
    chosen = _read_sources(sources or [], compare, progress)
    request = EvaluateRequest(sources=chosen, **asked(given))

    from ulbq.pipeline.evaluate import evaluate

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
