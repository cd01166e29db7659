"""The scores of an evaluation, and what its models wrote, for people."""

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ulbq.artifacts import EvaluationManifest
from ulbq.evaluation.results import Results
from ulbq.evaluation.table import footnotes, rows
from ulbq.evaluation.words import by_prompt, silence
from ulbq.printable import one_line

from .tables import columns


def show(console: Console, manifest: EvaluationManifest, report: Path) -> None:
    """Print every score, one column a model, what the models wrote, and where the report is."""
    results = Results.model_validate(manifest.results)
    console.print()
    console.print(table(results))
    console.print()
    for line in lines(results):
        # A terminal breaks lines between words; in a log none is broken, so that it can be searched.
        console.print(line, soft_wrap=not console.is_terminal)
    console.print(Text(f"Report: {report}"), soft_wrap=True)


def table(results: Results) -> Table:
    """Every score, one column a model."""
    found = columns("", *(model.subject.name for model in results.models), header="bold")
    for section, members in groupby(rows(results), key=lambda row: row.section):
        found.add_row(Text(section, style="dim"))
        for row in members:
            cells = [
                Text(cell, style="bold green" if place in row.best else "") for place, cell in enumerate(row.cells)
            ]
            found.add_row(Text(f"  {row.label}"), *cells)
    return found


def lines(results: Results) -> list[Text]:
    """What stands below the scores: what each model wrote on from each prompt, and what a reader must know."""
    found = []
    for prompt, written in by_prompt(results).items():
        found.append(Text.assemble(("Prompt: ", "dim"), one_line(prompt)))
        found += [
            Text.assemble((f"  {name}: ", "bold"), silence(one) or one_line(one.text)) for name, one in written.items()
        ]
        found.append(Text())
    return [*found, *(Text(note, style="dim") for note in footnotes(results))]
