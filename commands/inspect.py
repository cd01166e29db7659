"""``ulbq inspect``: what an artifact is, whether it is intact, and what it was made from."""

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import Debug, Json, Quiet, read_source

_KINDS = ("quantized", "evaluation", "converted", "saliency", "sweep")


def inspect(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="Artifact; '-' reads its path from standard input.", show_default=False),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file again, and the model that it was made from.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Every layer with its bits and error, or its scores.")
    ] = False,
    reseal: Annotated[
        bool,
        typer.Option("--reseal", help="Take small files that you changed, a chat template for one, into the manifest."),
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Which kernels run its layers on this machine, and why not others.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show an artifact: where its bits went, its errors by block and layer, its ancestry.

    Without SOURCE, the newest below this folder. The report goes to standard output; with --quiet it is the path, on to
    the next command of a pipe.
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    # None would stand for the default model, which "newest" never takes.
    path = Path(read_source(source, "newest", progress, _KINDS) or "")

    from ulbq.pipeline.inspect import inspect as look

    if reseal:
        from ulbq.pipeline.reseal import reseal as take_over

        changed = take_over(path)[1]
        progress.note(f"Taken into the manifest as they are: {', '.join(changed)}." if changed else "Nothing changed.")
    inspection = look(path, verify=verify, progress=progress)
    if not quiet and not json:
        from .inspection import show

        report = console.output()
        show(report, inspection, layers=layers)
        if kernels:
            from .kernel_table import show_kernels

            show_kernels(report, inspection)
        return
    emit(path, inspection.manifest)
