"""``ulbq list``: which artifacts there are."""

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import Debug
from .streams import write


def list(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Where to look, also below.", show_default="./artifacts")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output, not a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show the artifacts under a folder, with bits, size, scores and ancestry.

    The oldest come first. Scores are those of evaluations under the same folder.
    """
    progress, _ = console.session(debug=debug)

    from ulbq.artifacts.store import DEFAULT_ROOT
    from ulbq.pipeline.listing import artifacts

    root = folder or Path(DEFAULT_ROOT)
    found = artifacts(root)
    if not found:
        progress.note(f"There is no artifact under '{root}'.")
    if json:
        from json import dumps

        write(dumps([one.model_dump(mode="json") for one in found], indent=2))
        return

    if found:
        from .listing import show

        show(console.output(), found)
