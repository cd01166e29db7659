"""``quantize``: a model in, a packed artifact out, one block at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ulbq import distributed, runtime
from ulbq.artifacts.manifest import SCHEMA_VERSION, QuantizedManifest, read_back
from ulbq.artifacts.records import TemperatureRecord
from ulbq.artifacts.shards import LazyTensors
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter
from ulbq.config.quantize import NOT_IN_FINGERPRINT, QuantizeRequest
from ulbq.data.calibration import CALIBRATION_FILE, TEXT_FILE, Calibration, save_calibration
from ulbq.errors import InputError
from ulbq.kernels import solvers
from ulbq.models.selection import NEVER_CALLED
from ulbq.pipeline import layout
from ulbq.pipeline.blocks import BlockQuantizer
from ulbq.pipeline.end_to_end import train_end_to_end
from ulbq.pipeline.finish import TEMPERATURE, finish, recorded_schemes
from ulbq.pipeline.predict import heldout_samples
from ulbq.pipeline.proof import proof
from ulbq.pipeline.quantization_plan import Job, QuantizePlan, plan, prepare, replanned
from ulbq.pipeline.room import check_room
from ulbq.pipeline.samples import check_images, draw, draw_text, written_samples
from ulbq.pipeline.sensitivity import decided, score_weights, weigh_layer_outputs
from ulbq.pipeline.tables import read_tables, with_tables
from ulbq.pipeline.temperature import check_temperature, fit_temperature
from ulbq.pipeline.warned import Recording
from ulbq.progress import Progress, Silent
from ulbq.sensitivity import KINDS
from ulbq.sensitivity.settings import BACKWARD
from ulbq.tracking import Log, shifted, tracked

__all__ = ["QuantizePlan", "QuantizeRequest", "plan", "quantize"]


def quantize(
    request: QuantizeRequest,
    progress: Progress | None = None,
    on_plan: Callable[[QuantizePlan], None] = lambda plan: None,
    *,
    name: str | None = None,
    root: Path = DEFAULT_ROOT,
    shared: Path | None = None,
) -> tuple[Path, QuantizedManifest]:
    """Quantize a model.

    Args:
        request: what to do.
        progress: told how it goes.
        on_plan: called with the plan before anything is written.
        name: of the artifact where the request names no folder; None for one that tells model, method and format.
        root: the folder that it then lies in.
        shared: a folder for samples that the model wrote: other runs of the model with the same ones take them there.

    Returns:
        The artifact's folder and its manifest.

    Raises:
        UsageError, InputError: as :func:`plan`; also where the output is taken or another run's.
        ResourceError: data, memory or disk are missing, or far more memory is predicted than is free.
        NumericsError: the numbers went wrong beyond repair. The finished blocks stay for a resumed run.
    """
    progress = Recording(progress or Silent())
    job = prepare(request, progress)
    on_plan(job.plan)
    check_room(job, progress)
    watch = runtime.Stopwatch()
    runtime.seed_everything(job.request.seed)
    drawn, text = _drawn(job, watch, progress)
    name = name or f"{job.source.name}-{job.method.name}-{job.method.scheme.label}"
    place: dict[str, Any] = {"root": root, "force": request.force, "spare": [job.source.path]}
    if job.source.kind == "gguf":
        job.source.tokenizer()  # written out at the end: better missed now
    if job.method.needs.searches and job.start is None and (reason := solvers.slow_reason(job.precision.device)):
        progress.note(f"No compiled solvers ({reason}): the search for the best scales takes {solvers.SLOWER}.")
    with (
        runtime.deterministic(bool(request.deterministic)),
        ArtifactWriter.begin(request.out, name, _decisive(job, drawn, text), **place) as writer,
    ):
        writer.tell(progress, f"{sum(map(str.isdigit, writer.journal))} of {job.found.n_blocks} blocks")
        if job.calibrated and drawn is None:
            with watch.phase("calibration"):
                drawn = _written(job, job.request.drawn_samples, CALIBRATION_FILE, writer, progress, shared)
        if job.request.text is not None and text is None:
            with watch.phase("text"):
                text = _written(job, job.request.text_samples, TEXT_FILE, writer, progress, shared)
        for file, samples in ((CALIBRATION_FILE, drawn), (TEXT_FILE, text)):
            if samples is not None:
                save_calibration(writer.path / file, samples)
                writer.plan(file)
        with tracked(job.request.log_to, writer.name, job.request.record.model_dump(mode="json")) as log:
            manifest = _work(job, writer, watch, progress, drawn, text, log)
        path = writer.finish(manifest, proof(progress, job=job))
    return path, read_back(path, QuantizedManifest)


def _drawn(job: Job, watch: runtime.Stopwatch, progress: Progress) -> tuple[Calibration | None, Calibration | None]:
    """Samples for the blocks and for the whole, where no model has to write them; None where one does, or none are."""
    drawn = text = None
    if job.calibrated and job.request.calibration != "self":
        with watch.phase("calibration"):
            drawn = _draw(job, progress)
    if job.request.text not in (None, "self"):
        samples = job.request.text_samples
        with watch.phase("text"), _telling_of_others(samples):
            text = draw_text(job.request, job.source, samples + heldout_samples(samples), progress)
    return drawn, text


def _work(
    job: Job,
    writer: ArtifactWriter,
    watch: runtime.Stopwatch,
    progress: Recording,
    drawn: Calibration | None,
    text: Calibration | None,
    log: Log,
) -> QuantizedManifest:
    """All phases that make weights, one after the other; gives the manifest of what they wrote."""
    calibration = None if drawn is None else _share(drawn, job.request.samples)
    saliency = job.saliency
    if job.tables:
        with watch.phase("tables"):
            job = with_tables(job, writer, progress)
    if job.method.needs.saliency in KINDS and not job.blocks_stay:
        with watch.phase("saliency"):
            saliency = score_weights(job, writer, calibration, progress)
    if job.method.needs.output_groups and job.start is None and calibration is not None:
        with watch.phase("outputs"):
            weigh_layer_outputs(job, writer, calibration, progress)
    if job.method.needs.survey and job.start is None and calibration is not None:
        with watch.phase("survey"):
            job = decided(job, writer, calibration, saliency, progress)
    with watch.phase("copying"):
        # First: a source that is damaged here would show only after hours.
        outer = _write_outer(job, writer, None)
    with watch.phase("blocks"):
        if job.request.fit_temperature and calibration is not None:
            check_temperature(job, writer.scratch, calibration.drawn)
        run = BlockQuantizer(job, writer, progress, saliency, log)
        run.walk(calibration)
        run.warn()
    job = _as_made(job, writer)
    if job.request.fit_temperature and calibration is not None:
        with watch.phase("temperature"):
            _write_outer(job, writer, _temperature(job, writer, calibration, progress))
    tuned = None
    learnt = text or (None if drawn is None else _share(drawn, job.request.text_samples))
    if job.method.needs.end_to_end is not None and learnt is not None:
        with watch.phase("end to end"):
            # A tracker's steps go up: those of the blocks were before.
            before = job.found.n_blocks * (job.method.needs.epochs + 1)
            tuned = train_end_to_end(job, writer, learnt, progress, shifted(log, before))
    with watch.phase("finish"):
        warned = tuple(progress.warnings)
        return distributed.on_main(finish, job, writer, drawn, outer, watch, tuned, warned)


def _draw(job: Job, progress: Progress) -> Calibration:
    samples = job.request.drawn_samples
    with _telling_of_others(samples):
        drawn = draw(job.request, job.source, samples + heldout_samples(samples), progress)
    if drawn.images is not None:
        needs, request = job.method.needs, job.request
        check_images(
            {
                "end_to_end": needs.end_to_end is not None and request.text is None,
                "fit_temperature": request.fit_temperature,
                f"hessian={request.record.hessian}": bool(needs.output_groups) and job.start is None,
                f"saliency={needs.saliency}": needs.saliency in BACKWARD and not job.blocks_stay,
            }
        )
    return drawn


def _share(drawn: Calibration, samples: int) -> Calibration:
    """The first samples, which train, and of those that are held out behind them all as many as they want."""
    held = heldout_samples(samples)
    images = None if drawn.images is None else (*drawn.images[:samples], *drawn.images[-held:])
    return dataclasses.replace(drawn, tokens=torch.cat([drawn.tokens[:samples], drawn.tokens[-held:]]), images=images)


@contextmanager
def _telling_of_others(samples: int) -> Iterator[None]:
    """The data layer counts all samples alike; who asked for --samples must know about those that are held out."""
    try:
        yield
    except InputError as error:
        extra = f"Besides the {samples} that train, {heldout_samples(samples)} are drawn and held out."
        raise InputError(error.message, hint=f"{error.hint} {extra}" if error.hint else extra) from error


def _written(
    job: Job, samples: int, file: str, writer: ArtifactWriter, progress: Progress, shared: Path | None
) -> Calibration:
    """Samples of the model's own, those that are held out too."""
    count = samples + heldout_samples(samples)
    return written_samples(
        job.request,
        job.source,
        count,
        file=file,
        precision=job.precision,
        streamed=job.streamed,
        writer=writer,
        shared=shared,
        progress=progress,
    )


def _as_made(job: Job, writer: ArtifactWriter) -> Job:
    """The run with those layers alone that were quantized in it: its samples call no others."""
    entries = [writer.journal[str(index)] for index in range(job.found.n_blocks)]
    made = {name for entry in entries for name in recorded_schemes(entry, "")}
    planned = [linear.name for linear in job.found.layers]
    if made.issuperset(planned):
        return job
    selected = job.selected.without({name: NEVER_CALLED for name in planned if name not in made})
    return dataclasses.replace(job, selected=selected, plan=replanned(job, selected))


def _write_outer(job: Job, writer: ArtifactWriter, temperature: TemperatureRecord | None) -> dict[str, int]:
    """Write what is not a block, as the artifact that is gone on from has it; returns the stored bits."""
    # A temperature is that of the original's predictions: it takes the place of one that was fitted before.
    source = job.source if job.start is None or job.request.fit_temperature else job.start.source
    factors = {} if temperature is None else dict.fromkeys(temperature.vectors, temperature.factor)
    path = writer.path / layout.OUTER_SHARD
    bits = layout.write_outer(path, job.model, source, f"{job.found.blocks_prefix}.", factors, read_tables(job))
    shards = distributed.on_main(job.source.write_carried, writer.path)
    writer.plan(layout.OUTER_SHARD, *shards)
    carried = sum(LazyTensors([writer.path / shard]).total_bytes for shard in shards) * 8
    return {**bits, "other": bits["other"] + carried}


def _temperature(job: Job, writer: ArtifactWriter, calibration: Calibration, progress: Progress) -> TemperatureRecord:
    """What was fitted, now or by the run that this one resumes."""
    if TEMPERATURE not in writer.journal:
        held = calibration.drawn[job.request.samples :]
        record = fit_temperature(job, writer.path, writer.scratch, writer.journal, held, progress)
        writer.record(TEMPERATURE, record)
    return TemperatureRecord.model_validate(writer.journal[TEMPERATURE])


def _decisive(job: Job, drawn: Calibration | None, text: Calibration | None) -> dict[str, Any]:
    """What decides the result."""
    return {
        "schema": SCHEMA_VERSION,
        "source": job.source.content_hash,
        "request": job.request.record.model_dump(mode="json", exclude=set(NOT_IN_FINGERPRINT)),
        "device": job.precision.device.type,
        "precision": job.plan.precision,
        "calibration": drawn.sha256 if drawn else job.request.calibration,
        "text": text.sha256 if text else job.request.text,
        "schemes": {name: scheme.model_dump(mode="json") for name, scheme in job.schemes.items()},
        "layers": [linear.name for linear in job.found.layers] if job.request.plan else [],
        "start": job.start.source.content_hash if job.start else None,
        "saliency": job.saliency.digest if job.saliency else job.method.needs.saliency,
    }
