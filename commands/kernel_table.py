"""The kernels of this machine, and what a model's layers run on, as tables for people."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ulbq.artifacts import QuantizedManifest
from ulbq.errors import InputError
from ulbq.kernels import LAYOUTS
from ulbq.pipeline.inspect import Inspection
from ulbq.pipeline.kernels import ROWS, plans, writers
from ulbq.runtime import resolve_device

from .tables import add, columns


def show_kernels(console: Console, inspection: Inspection) -> None:
    """Print which backends there are, and for a quantized model which of them takes which layers and its tokens."""
    tables = {"Kernels": _backends()}
    if isinstance(inspection.manifest, QuantizedManifest):
        tables |= {"Kernels by layer": _layers(inspection.manifest), "Token by token": _writers(inspection.path)}
    for title, table in tables.items():
        console.print(Group(Text(title, style="bold underline"), table))
        console.print()


def _backends() -> Table:
    table = columns("backend", "here", "what it is", numbers=False)
    for layout in LAYOUTS:
        add(table, layout.name, _here(layout.unavailable_reason()), layout.summary)
    return table


def _here(missing: str | None) -> Text:
    return Text("yes", style="green") if missing is None else Text(missing, style="yellow")


def _writers(path: str) -> Table:
    table = columns("a text is written by", "here", numbers=False)
    try:
        found = writers(path, resolve_device())
    except InputError as error:  # a part of a model, say
        add(table, "nothing", _here(str(error)))
        return table
    for name, reason in found.items():
        add(table, name, _here(reason))
    add(table, "transformers", _here(None if None not in found.values() else "not needed"))
    return table


def _layers(manifest: QuantizedManifest) -> Table:
    rows = [f"{count} row{'s' * (count > 1)}" for count in ROWS]
    table = columns("layers", "activations", *rows, "why not others", numbers=False)
    for plan in plans(manifest, resolve_device().type):
        cells = [f"{plan.layers} × {plan.label}", plan.dtype, *plan.backends.values(), "; ".join(plan.passed_over)]
        add(table, *cells)
    return table
