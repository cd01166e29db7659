"""``ulbq recommend``: the command to type for a model and a limit."""

from typing import Annotated, Any

import typer

from ulbq.config.recommend import RecommendRequest

from . import console
from .fields import asked, from_fields
from .options import Debug, Quiet, Source, check_out, read_source
from .streams import write


@from_fields(RecommendRequest)
def recommend(
    source: Source = None,
    run: Annotated[
        bool, typer.Option("--run", help="Type it for me: quantize, and write the artifact's path.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output, not the command.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Find the setting that is expected to lose least within your limits, and show the command to type.

    Size and memory follow from the model's shapes. What is lost and how long it takes was measured: on the default
    model, and by every 'ulbq sweep' under ./artifacts, best of the same model. Without a limit, the memory of this
    machine is one.
    """
    progress, emit = console.session(json=json, quiet=quiet, debug=debug)
    check_out(given["out"], force=given["force"])
    request = RecommendRequest.model_validate(asked(given))
    request = request.model_copy(update={"source": read_source(source, "model", progress)})

    from ulbq.pipeline.recommend import recommend

    told, wanted = recommend(request, progress)
    if not quiet:
        from .recommend_table import show

        show(console.terminal(), told)
    if run:
        from ulbq.pipeline.quantize import quantize

        emit(*quantize(wanted, progress))
    else:
        write(told.model_dump_json(indent=2) if json else told.best.command)
