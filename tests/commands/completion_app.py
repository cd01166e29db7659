"""An app with every kind of parameter, so that tests of completion do not move with the commands' own options.

As a program, ``python -m tests.commands.completion_app``, it is what the shells ask in place of ``ulbq``.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ulbq.commands import completion
from ulbq.commands.options import Quiet, Source
from ulbq.commands.sections import SectionedCommand


def _show_version(wanted: bool) -> None:
    if wanted:
        raise typer.Exit


app = typer.Typer(rich_markup_mode=None)


@app.callback()
def group(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version)] = False,
) -> None: ...


@app.command(cls=SectionedCommand)
def quantize(
    source: Source = None,
    out: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder.")] = None,
    method: Annotated[Literal["rtn", "db-llm"], typer.Option("--method", help="Recipe.")] = "rtn",
    text: Annotated[
        str, typer.Option("--text", metavar="NAME|FILE", help="Text.", autocompletion=lambda: ["wikitext2", "self"])
    ] = "self",
    sets: Annotated[
        str | None, typer.Option("--sets", metavar="NAME,…", autocompletion=lambda: ["wikitext2", "c4", "ptb"])
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--freeze", help="It's [trained], " + "and " * 30 + "more: yes. And no.")
    ] = True,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where.", autocompletion=lambda: ["auto", "cpu", "cuda"])
    ] = "auto",
    data_dir: Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Data.")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Make it small. And more words."""


@app.command()
def inspect() -> None:
    """Look at it."""


@app.command("eval")
def evaluate(sources: Annotated[list[str] | None, typer.Argument(metavar="SOURCE")] = None) -> None:
    """Measure them."""


@app.command(hidden=True)
def secret() -> None:
    """Not shown."""


if __name__ == "__main__":
    completion.answer(app)
