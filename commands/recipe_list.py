"""The shipped recipes on the command line: their names for completion, and the table of ``--list-recipes``."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer


def complete_recipe() -> list[str]:
    """Names of the shipped recipes, without importing what reads them."""
    from importlib import resources

    return _names(resources.files("ulbq") / "recipes")


def complete_task() -> list[str]:
    """Names of what 'ulbq finetune' teaches, without importing what reads them."""
    from importlib import resources

    return ["end-to-end", *_names(resources.files("ulbq") / "recipes" / "finetune")]


def _names(folder: Any) -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def show_recipes(wanted: bool) -> None:
    """Print the table to standard output and end the command, where it was asked for."""
    if not wanted:
        return
    from ulbq.pipeline.recipes import shipped

    _print(
        ("name", "method", "bits", "source", "description"),
        [(r.name, r.options["method"], r.options["bits"], r.source, r.description) for r in shipped()],
    )
    raise typer.Exit


def show_tasks(wanted: bool) -> None:
    """The same for the tasks of 'ulbq finetune'."""
    if not wanted:
        return
    from ulbq.pipeline.tasks import load_task, task_names

    tasks = [load_task(name) for name in task_names()]
    _print(
        ("name", "epochs", "batch", "rate", "source", "description"),
        [
            (t.name, *(t.options[key] for key in ("epochs", "batch_size", "adapter_lr")), t.source, t.description)
            for t in tasks
        ],
    )
    raise typer.Exit


def _print(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .printing import PrintableConsole

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=heading not in {"source", "description"})
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    # One line a recipe where a program reads it.
    PrintableConsole(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 300).print(table)
