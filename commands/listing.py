"""What ``ulbq list`` prints."""

from collections.abc import Sequence

from rich.console import Console

from ulbq.evaluation.table import size
from ulbq.pipeline.listing import Listed

from .tables import add, columns

_STYLES = {"damaged": "red", "unfinished": "yellow", "evaluation": "dim", "saliency": "dim"}


def show(report: Console, found: Sequence[Listed]) -> None:
    """Print a row for each artifact."""
    table = columns("artifact", "kind", "what", "bits", "size", "scores", "made from", "created", numbers=False)
    for one in found:
        bits = "" if one.bits is None else f"{one.bits:.3f}"
        scores = ", ".join(f"{name} {value:.4g}" for name, value in one.scores.items())
        made = "" if one.kind == "evaluation" else ", ".join(one.parents)
        when = one.created[:16].replace("T", " ")
        cells = (one.path, one.kind, one.what, bits, size(one.size) if one.size else "", scores, made, when)
        add(table, *cells, style=_STYLES.get(one.kind, ""))
    report.print(table)
