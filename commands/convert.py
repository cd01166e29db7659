"""``ulbq convert``: hand a model to other tools."""

from typing import Annotated, Literal

import typer

from . import console
from .options import Debug, Force, Json, Offline, Out, Quiet, Source, read_source


def convert(
    source: Source = None,
    to: Annotated[
        Literal["dense"], typer.Option("--to", help="dense: a plain model folder that transformers loads.")
    ] = "dense",
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option("--dtype", help="Of the dense tensors.")] = "bf16",
    merge_adapter: Annotated[
        bool,
        typer.Option("--merge-adapter", help="Make the adapter part of the weights; else it is copied beside them."),
    ] = False,
    offline: Offline = False,
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model in a layout that other tools load."""
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    source = read_source(source, "newest", progress)

    from ulbq.pipeline.convert import ConvertRequest, convert

    request = ConvertRequest(
        source=source, to=to, dtype=dtype, merge_adapter=merge_adapter, offline=offline, out=out, force=force
    )
    emit(*convert(request, progress))
