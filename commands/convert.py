"""``ulbq convert``: hand a model to other tools."""

from itertools import groupby
from typing import Annotated, Literal

import typer

from ulbq.export.targets import TARGETS, EngineName, TargetName

from . import console
from .options import Debug, Force, Json, NoVerify, Offline, Out, Quiet, Source, check_out, read_source


def convert(
    source: Source = None,
    to: Annotated[
        TargetName | None,
        typer.Option(
            "--to",
            help="; ".join(f"{', '.join(names)}: {summary}" for summary, names in groupby(TARGETS, TARGETS.get)) + ".",
            show_default="what --for reads best, else dense",
        ),
    ] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(
            "--for", help="Check first that this engine loads it, and choose what it reads.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None,
        typer.Option(
            "--dtype",
            help="Of the tensors that are not packed.",
            show_default="bf16 for dense, fp16 for gguf, else as is",
        ),
    ] = None,
    merge_adapter: Annotated[
        bool,
        typer.Option("--merge-adapter", help="Make the adapter part of the weights; else it is copied beside them."),
    ] = False,
    offline: Offline = False,
    no_verify: NoVerify = False,
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model in a layout that other tools load."""
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(out, force=force)
    source = read_source(source, "newest", progress)

    from ulbq.pipeline.convert import ConvertRequest, convert

    request = ConvertRequest(
        source=source,
        to=to,
        engine=engine,
        dtype=dtype,
        merge_adapter=merge_adapter,
        offline=offline,
        verify=not no_verify,
        out=out,
        force=force,
    )
    emit(*convert(request, progress))
