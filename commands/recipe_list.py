"""The shipped recipes on the command line: their names for completion, and the table of ``--list-recipes``."""

import sys

import typer


def complete_recipe() -> list[str]:
    """Names of the shipped recipes, without importing what reads them."""
    from importlib import resources

    return sorted(entry.name.partition(".")[0] for entry in (resources.files("ulbq") / "recipes").iterdir())


def show_recipes(wanted: bool) -> None:
    """Print the table to standard output and end the command, where it was asked for."""
    if not wanted:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ulbq.pipeline.recipes import shipped

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("name", "method", "bits", "source", "description"):
        table.add_column(heading, no_wrap=heading in {"name", "method", "bits"})
    for recipe in shipped():
        cells = (recipe.name, recipe.options["method"], recipe.options["bits"], recipe.source, recipe.description)
        table.add_row(*(Text(str(cell)) for cell in cells))
    # One line a recipe where a program reads it.
    Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 300).print(table)
    raise typer.Exit
