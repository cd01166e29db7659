"""``ulbq doctor``: what runs here."""

from typing import Annotated

import typer

from . import console
from .options import Debug
from .streams import write

_STYLES = {"ok": "green", "slow": "yellow", "missing": "red", "absent": "dim"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output, not a table.")] = False,
    debug: Debug = False,
) -> None:
    """Show what runs on this machine, and what to install for the rest.

    Device, compiled kernels, data, optional packages, and the engines in this environment.
    """
    console.session(debug=debug)

    from ulbq.pipeline.doctor import checks

    found = checks()
    if json:
        from json import dumps

        write(dumps([one.model_dump(mode="json") for one in found], indent=2))
        return

    from rich.text import Text

    from .tables import add, columns

    report = console.output()
    table = columns("", "", "state", "", "to do", numbers=False)
    section = ""
    for one in found:
        name = Text(one.section if one.section != section else "", style="bold")
        add(table, name, one.name, Text(one.state, style=_STYLES[one.state]), one.found, one.advice)
        section = one.section
    report.print(table)
