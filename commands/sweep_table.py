"""What a sweep will do, and what came of it, as tables for people."""

import shlex
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ulbq.artifacts import SweepManifest
from ulbq.evaluation.results import Results
from ulbq.evaluation.table import size
from ulbq.pipeline.sweep_plan import SweepPlan
from ulbq.pipeline.sweep_points import by_setting, front, measured
from ulbq.printable import binary

from . import console
from .progress import duration
from .tables import add, columns


def show_plan(plan: SweepPlan) -> None:
    """Say on standard error what every run will do and cost."""
    report = console.terminal()
    table = columns("run", "bits", "artifact", "peak memory")
    for run in plan.runs:
        cost = run.cost
        add(table, run.name, f"{run.bits_per_weight:.3f}", binary(cost.artifact), binary(cost.peak_memory))
    report.print(Text(f"{plan.model} on {plan.device}: {len(plan.runs)} runs"))
    report.print(table)
    for name, why in plan.left_out.items():
        report.print(Text(f"Left out: {name}. {why}", style="yellow"))


def show_sweep(path: Path, manifest: SweepManifest) -> None:
    """Say what came of a sweep, and where its page is."""
    report = console.terminal()
    report.print()
    report.print(settings_table(manifest))
    if manifest.runs:
        where = shlex.quote(str(path / "runs" / manifest.runs[0].name))
        report.print(Text(f"Every run is an artifact, as in: ulbq generate {where}"), soft_wrap=True)
    report.print(Text(f"Report: {path / 'report.html'}"), soft_wrap=True)


def settings_table(manifest: SweepManifest) -> Table:
    """A row a setting, the full-precision model first; what stands on a front in green."""
    results = Results.model_validate(manifest.results)
    points, original = by_setting(manifest.runs, results), results.models[0]
    theirs = measured(original)
    better = {name: sign for one in results.models for name, (_, sign) in measured(one).items()}
    fronts = {name: front(points, name, sign) for name, sign in better.items()} if points else {}
    table = columns("", "bits", "size", *better, "time", "memory")
    first = [f"{theirs[name][0]:.4g}" if name in theirs else "" for name in better]
    stored = size(original.weights.on_disk) if original.weights else ""
    add(table, original.subject.name, "", stored, *first, "", "", style="dim")
    for point in points:
        cells: list[str | Text] = [point.setting, f"{point.bits:.3f}", size(point.runs[0].size)]
        for name, best in fronts.items():
            least, most = point.spread(name)
            spread = f" ({least:.4g} to {most:.4g})" if most > least else ""
            cells.append(Text(f"{point.value(name):.4g}{spread}", style="bold green" if point in best else ""))
        seconds = sum(run.seconds for run in point.runs) / len(point.runs)
        part = "over " * any(run.resumed for run in point.runs)
        add(table, *cells, f"{part}{duration(seconds)}", size(max(run.peak_memory for run in point.runs)))
    return table
