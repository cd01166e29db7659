"""The kernels of this machine, and what a model's layers run on, as tables for people."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ulbq.artifacts import AnyManifest, QuantizedManifest
from ulbq.kernels import LAYOUTS
from ulbq.pipeline.kernels import ROWS, plans
from ulbq.runtime import resolve_device

from .tables import add, columns


def show_kernels(console: Console, manifest: AnyManifest) -> None:
    """Print which backends there are, and for a quantized model which of them takes which layers."""
    console.print(Group(Text("Kernels", style="bold underline"), _backends()))
    console.print()
    if isinstance(manifest, QuantizedManifest):
        console.print(Group(Text("Kernels by layer", style="bold underline"), _layers(manifest)))
        console.print()


def _backends() -> Table:
    table = columns("backend", "here", "what it is", numbers=False)
    for layout in LAYOUTS:
        missing = layout.unavailable_reason()
        here = Text("yes", style="green") if missing is None else Text(missing, style="yellow")
        add(table, layout.name, here, layout.summary)
    return table


def _layers(manifest: QuantizedManifest) -> Table:
    rows = [f"{count} row{'s' * (count > 1)}" for count in ROWS]
    table = columns("layers", "activations", *rows, "why not others", numbers=False)
    for plan in plans(manifest, resolve_device().type):
        cells = [f"{plan.layers} × {plan.label}", plan.dtype, *plan.backends.values(), "; ".join(plan.passed_over)]
        add(table, *cells)
    return table
