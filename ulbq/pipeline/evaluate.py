"""``evaluate``: models in, their scores out, beside those of the full-precision models that they were made from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ulbq import distributed, runtime
from ulbq.artifacts import ArtifactWriter, EvaluationManifest, Parent, QuantizedManifest, read_back
from ulbq.artifacts.names import local_path
from ulbq.config.evaluate import EvaluateRequest
from ulbq.evaluation.generative import Sample
from ulbq.evaluation.measurer import Measurer
from ulbq.evaluation.report import report
from ulbq.evaluation.results import Results
from ulbq.pipeline.evaluation_plan import EvaluationJob, prepare
from ulbq.pipeline.recorded import merge
from ulbq.pipeline.warned import Recording
from ulbq.progress import Progress, Silent

__all__ = ["EvaluateRequest", "evaluate"]

RESULTS, REPORT, SAMPLES = "results.json", "report.html", "samples.jsonl"
"""Files of an evaluation: the numbers, the page, and some of the answers that models wrote."""


def evaluate(request: EvaluateRequest, progress: Progress | None = None) -> tuple[Path, EvaluationManifest]:
    """Measure models and write an evaluation: ``results.json``, ``report.html`` and the manifest.

    Where models wrote answers, some of them stand in ``samples.jsonl``.

    Args:
        request: what to do.
        progress: told how it goes.

    Returns:
        The artifact's folder and its manifest.

    Raises:
        UsageError: options, tasks or text sets that do not exist, or do not go together.
        InputError: a source that cannot be evaluated, or an output that is taken.
        ResourceError: data, memory, disk or lm-eval are missing; nothing can be measured here.
        NumericsError: a model's logits are not finite. The finished measurements stay for a resumed run.
    """
    progress = Recording(progress or Silent())
    job = prepare(request, progress)
    runtime.seed_everything(request.seed)
    watch = runtime.Stopwatch()
    used = [one.source.path for one in [*job.candidates, *job.parents]] + [local_path(one.path) for one in job.recorded]
    with ArtifactWriter.begin(request.out, _stem(job), _decisive(job), force=request.force, spare=used) as writer:
        writer.tell(progress, f"{len(writer.journal)} measurements")
        measurer = Measurer(request, job.measures, writer, watch, progress) if job.measures else None
        results = _measure(job, measurer)
        manifest = EvaluationManifest(
            name=writer.name,
            request=request.model_dump(mode="json"),
            seed=request.seed,
            device=runtime.describe_device(job.device),
            parents=_ancestors(job),
            phases=tuple(watch.records),
            results=results.model_dump(mode="json"),
            warnings=tuple(progress.warnings),
        )
        samples = measurer.samples if measurer else []
        distributed.on_main(_write, job, results, manifest, samples, writer.path)
        writer.plan(RESULTS, REPORT, *([SAMPLES] if samples else []))
        path = writer.finish(manifest)
    return path, read_back(path, EvaluationManifest)


def _write(
    job: EvaluationJob,
    results: Results,
    manifest: EvaluationManifest,
    samples: Sequence[tuple[str, Sample]],
    folder: Path,
) -> None:
    text = json.dumps(manifest.results, indent=2, ensure_ascii=False) + "\n"
    (folder / RESULTS).write_text(text, encoding="utf-8")
    title = job.candidates[0].name if len(job.candidates) == 1 and not job.recorded else "Comparison"
    created = f"{manifest.created[:16].replace('T', ' ')} UTC"
    page = report(title, results, _quantized(job), created=created)
    (folder / REPORT).write_text(page, encoding="utf-8")
    if samples:  # for people to look at
        lines = (json.dumps({"model": name, **sample.model_dump()}, ensure_ascii=False) for name, sample in samples)
        (folder / SAMPLES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _measure(job: EvaluationJob, measurer: Measurer | None) -> Results:
    """Measure parents first, then their compressed children; then add what was measured before."""
    scores = []
    if measurer is not None:
        parents = job.parents
        measured = [measurer.measure(one, parent=one not in job.candidates) for one in parents]
        scores = [found for found in measured if found.scored]
        scores += [measurer.measure(candidate) for candidate in job.candidates if candidate not in parents]
    return Results(protocol=job.protocol, models=merge(scores, job.recorded))


def _decisive(job: EvaluationJob) -> dict[str, Any]:
    """What decides the result."""
    request = job.request.model_dump(
        mode="json",
        exclude={"out", "force", "sources", "parent", "data_dir", "offline", "verify", "score_cache", "stream"},
    )
    measured = job.measures
    return {
        "request": request,
        "protocol": job.protocol,
        "texts": [measured.perplexity, measured.fidelity] if measured else [],
        "models": {one.name: one.source.content_hash for one in [*job.candidates, *job.parents]},
        "recorded": [one.manifest.digest for one in job.recorded],
        "device": str(job.device),
    }


def _ancestors(job: EvaluationJob) -> tuple[Parent, ...]:
    """What the evaluation was made from; the recorded parents of these are theirs to name."""
    named = job.parents if job.request.parent is not None else []
    models = [*job.candidates, *(parent for parent in named if parent not in job.candidates)]
    return (*(one.record() for one in models), *(one.record() for one in job.recorded))


def _quantized(job: EvaluationJob) -> dict[str, QuantizedManifest]:
    """Manifests of the quantized models in the results, by name."""
    found = {name: manifest for one in job.recorded for name, manifest in one.quantized().items()}
    for candidate in job.candidates:
        if (manifest := candidate.quantized) is not None:
            found[candidate.name] = manifest
    return found


def _stem(job: EvaluationJob) -> str:
    """Name of the artifact: the model's own where there is one model."""
    return f"{job.candidates[0].source.name}-eval" if len(job.request.sources) == 1 and job.candidates else "comparison"
