"""``sweep``: a model in, an artifact with it quantized by many settings out, and a page that compares them."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ulbq import runtime
from ulbq.artifacts import ArtifactWriter, LayerRecord, QuantizedManifest, SweepManifest, SweepRun, read_back
from ulbq.config.sweep import SweepRequest
from ulbq.errors import NumericsError
from ulbq.evaluation.evaluated import EvaluatedModel
from ulbq.evaluation.measurer import Measurer
from ulbq.evaluation.results import ModelScores, Results
from ulbq.models.source import resolve
from ulbq.pipeline.sweep_page import page
from ulbq.pipeline.sweep_plan import Run, SweepJob, SweepPlan, plan, prepare
from ulbq.pipeline.sweep_points import measured
from ulbq.pipeline.sweep_runs import RUNS, runs
from ulbq.pipeline.warned import Recording
from ulbq.progress import Progress, Silent

__all__ = ["SweepPlan", "SweepRequest", "plan", "sweep"]

REPORT, TABLE = "report.html", "table.csv"


def sweep(
    request: SweepRequest, progress: Progress | None = None, on_plan: Callable[[SweepPlan], None] = lambda plan: None
) -> tuple[Path, SweepManifest]:
    """Quantize a model by many settings and measure what comes of each. A stopped sweep goes on where it was.

    Args:
        request: what to do.
        progress: told how it goes.
        on_plan: called with the plan before anything is written.

    Returns:
        The artifact's folder and its manifest. A run whose numbers go wrong is left out, and has a reason there.

    Raises:
        UsageError, InputError: as :func:`~ulbq.pipeline.sweep_plan.prepare`; also where the output is taken.
        ResourceError: data, memory or disk are missing.
    """
    progress = Recording(progress or Silent())
    job = prepare(request, progress)
    for name, why in job.plan.left_out.items():
        progress.note(f"Left out: {name}. {why}")
    on_plan(job.plan)
    watch, name = runtime.Stopwatch(), f"{job.original.name}-sweep"
    place: dict[str, Any] = {"force": request.force, "spare": [job.original.source.path], "nested": RUNS}
    with ArtifactWriter.begin(request.out, name, _decisive(job), **place) as writer:
        done = sum(f"{run.name}: quantize" in writer.journal for run in job.runs)
        writer.tell(progress, f"{done} of {len(job.runs)} runs")
        measurer = Measurer(job.scoring, job.measures, writer, watch, progress, writer.scratch / "parent")
        found, scores, left_out = _measured(job, measurer, writer, progress)
        manifest = SweepManifest(
            name=writer.name,
            request=request.model_dump(mode="json"),
            seed=request.seeds[0],
            device=runtime.describe_device(job.device),
            parents=(job.original.record(),),
            phases=tuple(watch.records),
            runs=tuple(found),
            left_out=left_out,
            results=Results(protocol=job.protocol, models=tuple(scores)).model_dump(mode="json"),
            warnings=tuple(progress.warnings),
        )
        _write(manifest, writer)
        path = writer.finish(manifest)
    return path, read_back(path, SweepManifest)


def _measured(
    job: SweepJob, measurer: Measurer, writer: ArtifactWriter, progress: Progress
) -> tuple[list[SweepRun], list[ModelScores], dict[str, str]]:
    """Every run that came to scores, those after the original's, and why the others did not, by their names."""
    scores, left_out = [measurer.measure(job.original)], dict(job.plan.left_out)
    found: list[SweepRun] = []
    for run, made in runs(job, writer, progress):
        if isinstance(made, str):
            left_out[run.name] = made
            continue
        try:
            scores.append(measurer.measure(_candidate(writer, run, job.original)))
        except NumericsError as error:
            progress.warn(f"{run.name}: {error.message}")
            left_out[run.name] = error.message
            continue
        found.append(made)
    if not found:
        raise NumericsError(f"No run of this sweep came to scores. {next(iter(left_out.values()))}")
    return found, scores, left_out


def _candidate(writer: ArtifactWriter, run: Run, original: EvaluatedModel) -> EvaluatedModel:
    """A run's model, named as it will be once the sweep stands at its place."""
    source = resolve(writer.path / RUNS / run.name, offline=True)
    return EvaluatedModel(dataclasses.replace(source, given=f"{RUNS}/{run.name}"), run.name, original)


def _write(manifest: SweepManifest, writer: ArtifactWriter) -> None:
    """The page and the table."""
    results = Results.model_validate(manifest.results)
    layers = {run.name: _layers(writer.path / RUNS / run.name) for run in manifest.runs}
    (writer.path / REPORT).write_text(page(manifest, results, layers), encoding="utf-8")
    (writer.path / TABLE).write_text(table(manifest.runs, results.models), encoding="utf-8")
    writer.plan(REPORT, TABLE)


def _layers(folder: Path) -> Sequence[LayerRecord]:
    return read_back(folder, QuantizedManifest).layers


def table(made: Sequence[SweepRun], scores: Sequence[ModelScores]) -> str:
    """A row a run, as comma-separated values."""
    by_name: Mapping[str, ModelScores] = {one.subject.name: one for one in scores}
    heads = ("run", "setting", "seed", "method", "scheme", "bits", "bytes", "seconds", "peak_memory")
    values = {run.name: measured(by_name[run.name]) for run in made}
    names = list(dict.fromkeys(name for found in values.values() for name in found))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heads, *names])
    for run in made:
        told = (run.name, run.setting, run.seed, run.method, run.scheme, run.bits, run.size, run.seconds)
        scored = values[run.name]
        writer.writerow([*told, run.peak_memory, *(scored[name][0] if name in scored else "" for name in names)])
    return text.getvalue()


def _decisive(job: SweepJob) -> dict[str, Any]:
    """What decides the result."""
    skipped = {"source", "out", "force", "data_dir", "offline", "settings", "parallel"}
    return {
        "source": job.original.source.content_hash,
        "request": job.request.model_dump(mode="json", exclude=skipped),
        "runs": [[run.name, run.request.model_dump(mode="json", exclude=skipped)] for run in job.runs],
        "protocol": job.protocol,
        "texts": [job.measures.perplexity, job.measures.fidelity],
        "device": str(job.device),
    }
