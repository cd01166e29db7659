"""The scores of an evaluation as a table for people."""

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulbq.artifacts import EvaluationManifest
from ulbq.evaluation.results import Results
from ulbq.evaluation.table import footnotes, rows


def show(console: Console, manifest: EvaluationManifest, report: Path) -> None:
    """Print every score, one column a model, and where the report is."""
    results = Results.model_validate(manifest.results)
    console.print()
    console.print(score_table(results))
    console.print()
    for note in footnotes(results):
        console.print(Text(note, style="dim"), soft_wrap=True)
    console.print(Text(f"Report: {report}"), soft_wrap=True)


def score_table(results: Results) -> Table:
    """Every score, one column a model."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("")
    for scores in results.models:
        # As Text, not as markup: a model may be called model[a].
        table.add_column(Text(scores.subject.name), justify="right", overflow="fold")
    for section, members in groupby(rows(results), key=lambda row: row.section):
        table.add_row(Text(section, style="dim"))
        for row in members:
            cells = [
                Text(cell, style="bold green" if place in row.best else "") for place, cell in enumerate(row.cells)
            ]
            table.add_row(Text(f"  {row.label}"), *cells)
    return table
