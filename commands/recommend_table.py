"""What ``ulbq recommend`` found, for people."""

from rich.console import Console
from rich.text import Text

from ulbq.config.convert import ENGINES
from ulbq.evaluation.table import size
from ulbq.pipeline.recommend import Proposal, Recommendation
from ulbq.printable import binary

from .progress import duration
from .tables import add, columns, grid


def show(report: Console, told: Recommendation) -> None:
    """Print the setting, what it takes and what it is expected to lose; below it, others that would do."""
    best = told.best
    low, high = best.ratio_range
    served = f"; {ENGINES[told.engine]} takes {best.served:.2f} bits a weight" if told.engine else ""
    on = (
        "on this very model"
        if best.sure == "this model"
        else "on another model, so that yours may order them otherwise"
    )
    rows = {
        "model": f"{told.model}, within {', '.join(told.limits).replace('_', ' ')}",
        "command": best.command,
        "size": f"{size(best.weights)} of weights, {best.bits:.3f} bits a quantized weight",
        "running": f"{binary(best.running)} with its cache{served}",
        "quantizing": f"{_time(best.seconds)}, {binary(told.peak_memory)} of memory, {size(told.disk)} of disk",
        "expected": f"perplexity {best.ratio:.2f} times the full-precision model's ({low:.2f} to {high:.2f})",
        "how sure": f"measured {on}: {best.measured}",
        "next": f"ulbq convert --for {told.engine}" if told.engine else "ulbq eval",
    }
    report.print(grid(rows))
    if told.others:
        table = columns("also within the limits", "bits", "size", "running", "time", "perplexity, times", numbers=True)
        for one in told.others:
            add(table, *_cells(one))
        report.print(Text())
        report.print(table)


def _cells(one: Proposal) -> tuple[str, ...]:
    return (one.name, f"{one.bits:.3f}", size(one.weights), binary(one.running), _time(one.seconds), f"{one.ratio:.2f}")


def _time(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"about {duration(seconds)}"
