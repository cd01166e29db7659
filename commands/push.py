"""``ulbq push``: an artifact to the Hugging Face Hub."""

from typing import Annotated, Any

import typer

from ulbq.config.push import PushRequest

from . import console
from .fields import asked, from_fields
from .options import Debug, DryRun, Quiet, read_source
from .streams import write


@from_fields(PushRequest)
def push(
    source: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="Its folder; '-' reads one path from standard input.")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; a new one is made.")],
    dry_run: DryRun = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Upload an artifact with its model card to the Hugging Face Hub.

    Weights that the repository held before are removed. Standard output carries the address.
    """
    progress, _ = console.session(quiet=quiet, debug=debug)
    request = PushRequest(source=read_source(source, "newest", progress) or source, repo=repo, **asked(given))

    from ulbq.pipeline.push import plan, push

    if not dry_run:
        write(push(request, progress))
        return

    from ulbq.evaluation.table import size

    planned = plan(request)
    for name, count in planned.files.items():
        write(f"{size(count):>9}  {name}")
    write(f"{size(planned.size):>9}  in {len(planned.files)} files, to {planned.repo}, revision {planned.revision}")
