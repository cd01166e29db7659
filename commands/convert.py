"""``ulbq convert``: hand a model to other tools."""

from typing import Any

from ulbq.config.convert import ConvertRequest

from . import console
from .fields import asked, from_fields
from .options import Debug, Json, Quiet, Source, check_out, read_source


@from_fields(ConvertRequest)
def convert(
    source: Source = None, json: Json = False, quiet: Quiet = False, debug: Debug = False, **given: Any
) -> None:
    """Write a model in a layout that other tools load."""
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=given["force"])
    request = ConvertRequest(source=read_source(source, "newest", progress), **asked(given))

    from ulbq.pipeline.convert import convert

    path, manifest = convert(request, progress)
    if not quiet:
        from .results import show_converted

        show_converted(manifest)
    emit(path, manifest)
