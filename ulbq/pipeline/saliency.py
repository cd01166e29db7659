"""``saliency``: a model in, a score for each of its weights out, one block at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ulbq import distributed, runtime
from ulbq.artifacts import BlockScores, SaliencyLayer, SaliencyManifest, read_back
from ulbq.artifacts.disk import writing
from ulbq.artifacts.manifest import SCHEMA_VERSION
from ulbq.artifacts.store import ArtifactWriter
from ulbq.config.saliency import SaliencyRequest
from ulbq.data.calibration import CALIBRATION_FILE, Calibration, save_calibration
from ulbq.pipeline.saliency_page import page
from ulbq.pipeline.saliency_plan import NOT_IN_FINGERPRINT, SaliencyJob, SaliencyPlan, prepare
from ulbq.pipeline.samples import check_images, draw, written_samples
from ulbq.progress import Progress, Silent
from ulbq.sensitivity import Saliency, Spectrum, block_file, compute_saliency
from ulbq.sensitivity.settings import BACKWARD

__all__ = ["SaliencyPlan", "SaliencyRequest", "plan", "saliency"]

_REPORT = "report.html"


def plan(request: SaliencyRequest, progress: Progress | None = None) -> SaliencyPlan:
    """Check a request and predict its cost; nothing is written. Raises as :func:`~.saliency_plan.prepare`."""
    return prepare(request, progress or Silent(), outline=True).plan


def saliency(
    request: SaliencyRequest,
    progress: Progress | None = None,
    on_plan: Callable[[SaliencyPlan], None] = lambda plan: None,
) -> tuple[Path, SaliencyManifest]:
    """Score the weights of a model.

    Args:
        request: what to do.
        progress: told how it goes.
        on_plan: called with the plan before anything is written.

    Returns:
        The artifact's folder and its manifest.

    Raises:
        UsageError, InputError: as :func:`plan`; also where the output is taken or another run's.
        ResourceError: data, memory or disk are missing.
        NumericsError: a loss or a score is not finite. The finished blocks stay for a resumed run.
    """
    progress = progress or Silent()
    job = prepare(request, progress)
    on_plan(job.plan)
    watch = runtime.Stopwatch()
    runtime.seed_everything(job.request.seed)
    drawn = _drawn(job, watch, progress)
    name = f"{job.source.name}-saliency-{job.request.kind}"
    place: dict[str, Any] = {"force": request.force, "spare": [job.source.path]}
    with (
        runtime.deterministic(bool(request.deterministic)),
        ArtifactWriter.begin(request.out, name, _decisive(job, drawn), **place) as writer,
    ):
        writer.tell(progress, f"{sum(map(str.isdigit, writer.journal))} of {job.found.n_blocks} blocks")
        calibration = drawn
        if job.request.calibration == "self":
            with watch.phase("calibration"):
                calibration = written_samples(
                    job.request,
                    job.source,
                    job.request.samples or 0,
                    precision=job.settings.precision,
                    streamed=job.plan.reads > 0,
                    writer=writer,
                    progress=progress,
                )
        if calibration is not None:
            save_calibration(writer.path / CALIBRATION_FILE, calibration)
            writer.plan(CALIBRATION_FILE)
        with watch.phase("blocks"):
            blocks = _score(job, calibration, writer, progress)
        with watch.phase("finish"):
            manifest = distributed.on_main(_finish, job, blocks, calibration, writer)
        # Later than the last phase is timed, so that the manifest has them all.
        path = writer.finish(manifest.model_copy(update={"phases": tuple(watch.records)}))
    _warn_of_zeros(manifest.layers, progress)
    return path, read_back(path, SaliencyManifest)


def _drawn(job: SaliencyJob, watch: runtime.Stopwatch, progress: Progress) -> Calibration | None:
    """The samples, where the model does not write them; None where it does, or none are wanted."""
    if job.request.calibration in (None, "self"):
        return None
    with watch.phase("calibration"):
        drawn = draw(job.request, job.source, job.request.samples or 0, progress)
        if drawn.images is not None:
            check_images({f"kind={job.request.kind}": job.request.kind in BACKWARD})
    return drawn


def _decisive(job: SaliencyJob, drawn: Calibration | None) -> dict[str, Any]:
    """What decides the result."""
    return {
        "command": "saliency",
        "schema": SCHEMA_VERSION,
        "source": job.source.content_hash,
        "request": job.request.model_dump(mode="json", exclude=set(NOT_IN_FINGERPRINT)),
        "device": job.settings.precision.device.type,
        "precision": job.plan.precision,
        "calibration": drawn.sha256 if drawn else job.request.calibration,
    }


def _score(
    job: SaliencyJob, calibration: Calibration | None, writer: ArtifactWriter, progress: Progress
) -> tuple[BlockScores, ...]:
    def on_block(scores: BlockScores) -> None:
        writer.record(str(scores.index), scores, files=[writer.path / block_file(scores.index)])

    return compute_saliency(
        job.model,
        job.source,
        job.found,
        None if calibration is None else calibration.drawn,
        job.settings,
        writer.path,
        scratch=writer.scratch,
        progress=progress,
        done={int(key): BlockScores.model_validate(value) for key, value in writer.journal.items() if key.isdigit()},
        on_block=on_block,
    )


def _finish(
    job: SaliencyJob, blocks: Sequence[BlockScores], calibration: Calibration | None, writer: ArtifactWriter
) -> SaliencyManifest:
    """Write the summary page, and describe the whole."""
    layers = tuple(layer for block in blocks for layer in block.layers)
    manifest = SaliencyManifest(
        name=writer.name,
        request=job.request.model_dump(mode="json"),
        seed=job.request.seed,
        device=job.plan.device,
        parents=(job.source.record(),),
        score=job.request.kind,
        dtype=job.request.dtype,
        layers=layers,
        top=_overall(writer.path, layers).top(),
        rounding=max(layer.rounding for layer in layers),
        loss=blocks[0].loss,
        calibration=calibration.record() if calibration else {},
    )
    writer.plan(_REPORT)
    with writing(writer.path):
        (writer.path / _REPORT).write_text(page(manifest), encoding="utf-8")
    return manifest


def _overall(folder: Path, layers: Sequence[SaliencyLayer]) -> Spectrum:
    """The scores of all layers together, as they were stored."""
    spectrum, stored = Spectrum(), Saliency(folder, layers)
    for layer in layers:
        values = stored.row(layer.name)
        spectrum.add(values, times=layer.shape[0] // values.shape[0])
    return spectrum


def _warn_of_zeros(layers: Sequence[SaliencyLayer], progress: Progress) -> None:
    silent = [layer.name for layer in layers if layer.total == 0]
    if silent:
        progress.warn(f"{len(silent)} layers score zero, no sample calls them ({silent[0]}): take more samples.")
