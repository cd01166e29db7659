"""The kernels of this machine, and what a model's layers run on, as tables for people."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ulbq.artifacts import AnyManifest, QuantizedManifest
from ulbq.pipeline.kernels import ROWS, available, plans
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
    for backend in available():
        here = Text(backend.missing, style="yellow") if backend.missing else Text("yes", style="green")
        table.add_row(Text(backend.name), here, Text(backend.summary))
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
