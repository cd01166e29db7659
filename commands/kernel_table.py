"""The kernels of this machine, and what a model's layers run on, as tables for people."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ulbq.artifacts import AnyManifest, QuantizedManifest
from ulbq.kernels import LAYOUTS
from ulbq.pipeline.kernels import ROWS, plans
from ulbq.runtime import resolve_device


def show_kernels(console: Console, manifest: AnyManifest) -> None:
    """Print which backends there are, and for a quantized model which of them takes which layers."""
    console.print(Group(Text("Kernels", style="bold underline"), _backends()))
    console.print()
    if isinstance(manifest, QuantizedManifest):
        console.print(Group(Text("Kernels by layer", style="bold underline"), _layers(manifest)))
        console.print()


def _backends() -> Table:
    table = _table("backend", "here", "what it is")
    for layout in LAYOUTS:
        missing = layout.unavailable_reason()
        here = Text("yes", style="green") if missing is None else Text(missing, style="yellow")
        table.add_row(Text(layout.name), here, Text(layout.summary))
    return table


def _layers(manifest: QuantizedManifest) -> Table:
    rows = [f"{count} row{'s' * (count > 1)}" for count in ROWS]
    table = _table("layers", "activations", *rows, "why not others")
    for plan in plans(manifest, resolve_device().type):
        cells = [f"{plan.layers} × {plan.label}", plan.dtype, *plan.backends.values(), "; ".join(plan.passed_over)]
        table.add_row(*map(Text, cells))
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    return table
