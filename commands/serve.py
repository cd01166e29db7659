"""``ulbq serve``: a model behind an address that OpenAI's clients take."""

from typing import Any

import typer

from ulbq.config.generate import ServeRequest

from . import console
from .fields import asked, from_fields
from .options import Debug, Quiet, Source, read_source
from .streams import write


@from_fields(ServeRequest)
def serve(source: Source = None, *, quiet: Quiet = False, debug: Debug = False, **given: Any) -> None:
    """Let a model answer over HTTP, by OpenAI's API.

    Chats, texts and the list of the one model. Without SOURCE, the newest quantized or converted model below
    this folder. Standard output carries the address, once requests are taken; a line for each answer goes to standard
    error. Ctrl-C ends it.
    """
    progress, _ = console.session(quiet=quiet, debug=debug)
    chosen = read_source(source, "newest", progress, ("quantized", "converted"))

    from ulbq.pipeline.serve import serve

    try:
        serve(ServeRequest(source=chosen, **asked(given)), write, progress)
    except KeyboardInterrupt:
        # The way to end it: nothing is lost, and there is nothing to go on with.
        raise typer.Exit(130) from None
