"""Tables for people. Cells are Text, not markup: a module may be called experts[a]."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text


def grid(rows: Mapping[str, str]) -> Table:
    """Names in bold, and what there is to say of each."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text))
    return table


def columns(*names: str, numbers: bool = True, header: str = "dim") -> Table:
    """A table whose first column is text and whose others are numbers, or text too."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=header, pad_edge=False)
    for index, name in enumerate(names):
        # Names are folded where there is no room, never cut: gate, up and down begin alike.
        table.add_column(Text(name), justify="right" if numbers and index else "left", overflow="fold")
    return table


def add(table: Table, *cells: str | Text, style: str = "") -> None:
    """Add a row."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)
