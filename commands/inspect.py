"""``ulbq inspect``: what an artifact is, whether it is intact, and what it was made from."""

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import Debug, Json, Quiet, read_source

_KINDS = ("quantized", "evaluation", "converted", "saliency")


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
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Which kernels run its layers on this machine, and why not others.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show an artifact: where its bits went, its errors by block and layer, its ancestry.

    Without SOURCE, the newest under ./artifacts. The path goes to standard output, on to the next command of a pipe.
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    # None would stand for the default model, which "newest" never takes.
    path = Path(read_source(source, "newest", progress, _KINDS) or "")

    from ulbq.pipeline.inspect import inspect as look

    inspection = look(path, verify=verify, progress=progress)
    if not quiet:
        from .inspection import show

        show(console.terminal(), inspection, layers=layers)
        if kernels:
            from .kernel_table import show_kernels

            show_kernels(console.terminal(), inspection.manifest)
    emit(path, inspection.manifest)
