"""``quantize``: a model in, a packed artifact out, one block at a time."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch import nn

from ulbq import __version__, distributed, runtime
from ulbq.artifacts.manifest import SCHEMA_VERSION, QuantizedManifest, read_back
from ulbq.artifacts.records import BlockRecord, TemperatureRecord, experts_sentence, sinks_sentence
from ulbq.artifacts.saliency import BlockScores
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter, fingerprint, free_output
from ulbq.config.quantize import NOT_IN_FINGERPRINT, QuantizeRequest
from ulbq.config.saliency import SaliencyKind
from ulbq.data.calibration import CALIBRATION_FILE, TEXT_FILE, Calibration, save_calibration
from ulbq.errors import InputError
from ulbq.kernels import solvers
from ulbq.methods.base import BlockResult, BlockStart, BlockTask, Method, SurveyingMethod, check_finite, check_range
from ulbq.methods.training import vectors_beside
from ulbq.models.blocks import load_block
from ulbq.models.selection import NEVER_CALLED
from ulbq.models.watch import watching
from ulbq.nn.quant_linear import linear_layer
from ulbq.pipeline import layout
from ulbq.pipeline.end_to_end import train_end_to_end
from ulbq.pipeline.finish import (
    TEMPERATURE,
    block_record,
    finish,
    layer_record,
    mixture_records,
    mixtures,
    recorded_schemes,
)
from ulbq.pipeline.predict import heldout_samples
from ulbq.pipeline.proof import proof
from ulbq.pipeline.quantization_plan import Job, QuantizePlan, plan, prepare, replanned
from ulbq.pipeline.samples import check_images, draw, draw_text, written_samples
from ulbq.pipeline.streams import Streams
from ulbq.pipeline.survey import survey
from ulbq.pipeline.temperature import check_temperature, fit_temperature
from ulbq.pipeline.warned import Recording, gathered
from ulbq.progress import Phase, Progress, Silent
from ulbq.sensitivity import KINDS, Saliency, SaliencySettings, block_file, compute_saliency
from ulbq.sensitivity.outputs import OutputCosts, OutputSettings, output_file, read_outputs, weigh_outputs
from ulbq.sensitivity.settings import BACKWARD
from ulbq.training.block import TrainOutcome

__all__ = ["QuantizePlan", "QuantizeRequest", "plan", "quantize"]

_SCORES = "saliency of block "
_OUTPUTS = "outputs of block "
_DECISIONS = "decisions"
# A relative error of one half per token: what comes out of the block is hardly the model's any more.
_ALARM = 0.5


def quantize(
    request: QuantizeRequest,
    progress: Progress | None = None,
    on_plan: Callable[[QuantizePlan], None] | None = None,
    *,
    name: str | None = None,
) -> tuple[Path, QuantizedManifest]:
    """Quantize a model.

    Args:
        request: what to do.
        progress: told how it goes.
        on_plan: called with the plan before anything is written.
        name: of the artifact where the request names no folder; None for one that tells model, method and format.

    Returns:
        The artifact's folder and its manifest.

    Raises:
        UsageError, InputError: as :func:`plan`; also where the output is taken or another run's.
        ResourceError: data, memory or disk are missing.
        NumericsError: the numbers went wrong beyond repair. The finished blocks stay for a resumed run.
    """
    progress = Recording(progress or Silent())
    job = prepare(request, progress)
    if on_plan is not None:
        on_plan(job.plan)
    watch = runtime.Stopwatch()
    runtime.seed_everything(job.request.seed)
    drawn, text = _drawn(job, watch, progress)
    identity = _fingerprint(job, drawn, text)
    telling = f"{job.source.name}-{job.method.name}-{job.method.scheme.label}"
    out = request.out or free_output(DEFAULT_ROOT, name or telling, identity)
    if job.source.kind == "gguf":
        job.source.tokenizer()  # written out at the end: better missed now
    if job.method.needs.searches and job.start is None and (reason := solvers.slow_reason(job.precision.device)):
        progress.note(f"No compiled solvers ({reason}): the search for the best scales takes some 40 times as long.")
    with ArtifactWriter(out, identity, force=request.force, spare=[job.source.path]) as writer:
        if writer.resumed:
            done = sum(key.isdigit() for key in writer.journal)
            progress.note(f"Resuming {out}: {done} of {job.found.n_blocks} blocks are done.")
        if job.calibrated and drawn is None:
            with watch.phase("calibration"):
                drawn = _written_samples(job, writer, progress)
        if job.request.text is not None and text is None:
            with watch.phase("text"):
                text = _written_text(job, writer, progress)
        for file, samples in ((CALIBRATION_FILE, drawn), (TEXT_FILE, text)):
            if samples is not None:
                save_calibration(writer.path / file, samples)
                writer.plan(file)
        path = writer.finish(_work(job, writer, watch, progress, drawn, text), proof(progress, job=job))
    return path, read_back(path, QuantizedManifest)


def _drawn(job: Job, watch: runtime.Stopwatch, progress: Progress) -> tuple[Calibration | None, Calibration | None]:
    """Samples for the blocks and for the whole, where no model has to write them; None where one does, or none are."""
    drawn = text = None
    if job.calibrated and job.request.calibration != "self":
        with watch.phase("calibration"):
            drawn = _draw(job, progress)
    if job.request.text not in (None, "self"):
        with watch.phase("text"):
            text = _draw_text(job, progress)
    return drawn, text


def _work(
    job: Job,
    writer: ArtifactWriter,
    watch: runtime.Stopwatch,
    progress: Recording,
    drawn: Calibration | None,
    text: Calibration | None,
) -> QuantizedManifest:
    """All phases that make weights, one after the other; gives the manifest of what they wrote."""
    calibration = None if drawn is None else _share(drawn, job.request.samples)
    saliency = job.saliency
    if job.method.needs.saliency in KINDS and not job.blocks_stay:
        with watch.phase("saliency"):
            saliency = _score(job, writer, calibration, progress)
    if job.method.needs.output_groups and job.start is None and calibration is not None:
        with watch.phase("outputs"):
            _weigh_outputs(job, writer, calibration, progress)
    if job.method.needs.survey and job.start is None and calibration is not None:
        with watch.phase("survey"):
            method = _decided(job, writer, calibration, saliency, progress)
        job = dataclasses.replace(job, method=method)
    with watch.phase("copying"):
        # First: a source that is damaged here would show only after hours.
        outer = _write_outer(job, writer, None)
    with watch.phase("blocks"):
        if job.request.fit_temperature and calibration is not None:
            check_temperature(job, writer.scratch, calibration.drawn)
        run = _Run(job, writer, progress, saliency)
        run.walk(calibration)
        run.warn()
    job = _as_made(job, writer)
    if job.request.fit_temperature and calibration is not None:
        with watch.phase("temperature"):
            _write_outer(job, writer, _temperature(job, writer, calibration, progress))
    tuned = None
    learnt = text or (None if drawn is None else _share(drawn, job.text_samples))
    if job.method.needs.end_to_end is not None and learnt is not None:
        with watch.phase("end to end"):
            tuned = train_end_to_end(job, writer, learnt, progress)
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


def _draw_text(job: Job, progress: Progress) -> Calibration:
    with _telling_of_others(job.text_samples):
        return draw_text(job.request, job.source, job.text_samples + heldout_samples(job.text_samples), progress)


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


def _written_samples(job: Job, writer: ArtifactWriter, progress: Progress) -> Calibration:
    samples = job.request.drawn_samples
    count = samples + heldout_samples(samples)
    return written_samples(job.request, job.source, count, precision=job.precision, writer=writer, progress=progress)


def _written_text(job: Job, writer: ArtifactWriter, progress: Progress) -> Calibration:
    count = job.text_samples + heldout_samples(job.text_samples)
    return written_samples(
        job.request, job.source, count, file=TEXT_FILE, precision=job.precision, writer=writer, progress=progress
    )


def _score(job: Job, writer: ArtifactWriter, calibration: Calibration | None, progress: Progress) -> Saliency:
    """Scores of the model's weights, computed into the scratch folder on the samples that train."""
    settings = SaliencySettings(
        kind=TypeAdapter(SaliencyKind).validate_python(job.method.needs.saliency),
        precision=job.precision,
        activation_memory=job.request.activation_memory,
    )
    folder = writer.scratch / "saliency"
    folder.mkdir(exist_ok=True)
    done = {
        scores.index: scores
        for key, value in writer.journal.items()
        if key.startswith(_SCORES)
        for scores in [BlockScores.model_validate(value)]
    }

    def note(scores: BlockScores) -> None:
        writer.record(f"{_SCORES}{scores.index}", scores, files=[folder / block_file(scores.index)])

    blocks = compute_saliency(
        job.model,
        job.source,
        job.found,
        None if calibration is None else calibration.drawn[: job.request.samples],
        settings,
        folder,
        scratch=writer.scratch,
        progress=progress,
        done=done,
        on_block=note,
    )
    return Saliency(folder, [layer for block in blocks for layer in block.layers])


def _weigh_outputs(job: Job, writer: ArtifactWriter, calibration: Calibration, progress: Progress) -> None:
    """Write what errors at the outputs of all layers cost into the scratch folder, by the samples that train."""
    needs, folder = job.method.needs, writer.scratch
    settings = OutputSettings(
        precision=job.precision,
        activation_memory=job.request.activation_memory,
        groups=needs.output_groups,
        between=needs.between_outputs,
        # A product of two sides is taken for the Hessian of the KL divergence, for which the model's own tokens count.
        seed=job.request.seed if needs.between_outputs else None,
    )
    weigh_outputs(
        job.model,
        job.source,
        job.found,
        calibration.drawn[: job.request.samples],
        settings,
        folder,
        scratch=folder,
        progress=progress,
        done={int(key.removeprefix(_OUTPUTS)) for key in writer.journal if key.startswith(_OUTPUTS)},
        on_block=lambda index: writer.record(f"{_OUTPUTS}{index}", {}, files=[folder / output_file(index)]),
    )


def _outputs(job: Job, scratch: Path, index: int) -> dict[str, OutputCosts] | None:
    """What errors at the outputs of a block's layers cost; None where that was not asked for."""
    if not job.method.needs.output_groups or job.start is not None:
        return None
    return read_outputs(scratch, index, job.names(index)[1], job.precision.device)


def _decided(
    job: Job, writer: ArtifactWriter, calibration: Calibration, saliency: Saliency | None, progress: Progress
) -> Method:
    """The method, once it has looked at all blocks; a resumed run goes by what the first one decided."""
    shard = writer.scratch / "decisions.safetensors"
    if _DECISIONS not in writer.journal:
        scores, outputs = partial(_scores, saliency, job.precision.device), partial(_outputs, job, writer.scratch)
        write_shard(shard, survey(job, calibration.drawn, scores, outputs, writer.scratch, progress))
        writer.record(_DECISIONS, {}, files=[shard])
    stored = LazyTensors([shard])
    return cast(SurveyingMethod, job.method).decided({name: stored.read(name) for name in stored.names})


def _as_made(job: Job, writer: ArtifactWriter) -> Job:
    """The run with those layers alone that were quantized in it: its samples call no others."""
    entries = [writer.journal[str(index)] for index in range(job.found.n_blocks)]
    made = {name for entry in entries for name in recorded_schemes(entry, "")}
    planned = [linear.name for block in job.found.linears for linear in block]
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
    bits = layout.write_outer(path, job.model, source, f"{job.found.blocks_prefix}.", factors)
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


def _fingerprint(job: Job, drawn: Calibration | None, text: Calibration | None) -> str:
    return fingerprint(
        {
            "ulbq": __version__,
            "schema": SCHEMA_VERSION,
            "source": job.source.content_hash,
            "request": job.request.record.model_dump(mode="json", exclude=set(NOT_IN_FINGERPRINT)),
            "device": job.precision.device.type,
            "precision": job.plan.precision,
            "calibration": drawn.sha256 if drawn else job.request.calibration,
            "text": text.sha256 if text else job.request.text,
            "start": job.start.source.content_hash if job.start else None,
            "saliency": job.saliency.digest if job.saliency else job.method.needs.saliency,
        }
    )


class _Run:
    """The walk over the blocks."""

    def __init__(self, job: Job, writer: ArtifactWriter, progress: Progress, saliency: Saliency | None) -> None:
        self._job = job
        self._saliency = saliency
        self._writer = writer
        self._progress = progress
        # An artifact is gone on from by training, whatever its method does in a first run.
        self._full_precision = job.method.needs.full_precision or job.start is not None

    def walk(self, calibration: Calibration | None) -> None:
        """Quantize every block that the journal does not hold yet; the others are replayed from their shards."""
        job = self._job
        if all(str(index) in self._writer.journal for index in range(job.found.n_blocks)):
            return
        streams = None
        if calibration is not None and not job.blocks_stay:
            streams = Streams(job, calibration.drawn, self._writer.scratch)
        steps = job.found.n_blocks * (job.method.needs.epochs + 1)
        with self._progress.phase("Quantizing", steps, rounds=job.found.n_blocks) as phase:
            for index in range(job.found.n_blocks):
                self._pass(index, streams, phase)
                runtime.give_back_memory()
                if streams is not None and index + 1 < job.found.n_blocks:
                    schemes = recorded_schemes(self._writer.journal[str(index)], job.names(index)[0])
                    streams.advance_quantized(index, self._writer.path / layout.block_shard(index), schemes)
        records = [self._writer.journal[str(index)].get("block") for index in range(job.found.n_blocks)]
        if sinks := sinks_sentence([BlockRecord.model_validate(record) for record in records if record]):
            self._progress.note(sinks)
        if unseen := experts_sentence(mixtures(self._writer.journal, job.found.n_blocks)):
            self._progress.note(unseen)

    def _pass(self, index: int, streams: Streams | None, phase: Phase) -> None:
        """Run ``x_fp`` through a block, where it is wanted, and quantize the block, where that is to be done."""
        job, done = self._job, str(index) in self._writer.journal
        passing = streams if self._full_precision else None
        if done:
            phase.advance(job.method.needs.epochs + 1, f"block {index} was done")
            if passing is None:
                return
        # Read once: what its full-precision activations ran through is quantized then.
        if streams is not None:
            block = streams.load(index)
        else:
            block = load_block(job.model, job.source, index, torch.float32, job.precision.device)
        linears: tuple[str, ...] = ()
        if not done:
            linears = job.names(index)[1] if streams is None else streams.called(index, block)
        if passing is not None:
            passing.advance_full_precision(index, block, linears)
        if not done:
            self._quantize(index, block, linears, streams, phase)

    def _quantize(
        self, index: int, block: nn.Module, linears: tuple[str, ...], streams: Streams | None, phase: Phase
    ) -> None:
        job, started = self._job, time.monotonic()
        prefix, planned = job.names(index)
        originals = {linear: linear_layer(block, linear).weight.detach() for linear in linears}
        for linear, weight in originals.items():
            check_range(prefix + linear, weight)
        epochs = 0

        def on_epoch(error: float) -> None:
            nonlocal epochs
            epochs += 1
            # Retries repeat epochs that were counted already.
            phase.advance(int(epochs <= job.method.needs.epochs), f"block {index}, error {error:.4f}")

        task = BlockTask(
            index=index,
            block=block,
            linears=linears,
            importance={} if streams is None else streams.importance,
            data=None if streams is None else streams.data(index),
            precision=job.precision,
            seed=job.request.seed + index,
            on_epoch=on_epoch,
            saliency=_scores(self._saliency, job.precision.device, prefix, linears),
            start=self._start(block, prefix, linears),
            prefix=prefix,
            tokens={} if streams is None else dict(streams.tokens),
            outputs=_outputs(job, self._writer.scratch, index),
        )
        result = _as_it_is(task.start) if job.blocks_stay and task.start else self._by_method(task, streams)
        check_finite(index, result)
        distributed.check_agreement(result.tensors, f"block {index}")
        shard = self._writer.path / layout.block_shard(index)
        layout.write_block(shard, prefix, job.source, job.model.get_submodule(prefix[:-1]), result)
        records: dict[str, Any] = {
            "layers": [
                layer_record(job, prefix + name, originals[name], result.packed[name], result.schemes.get(name))
                for name in linears
            ]
        }
        if result.outcome is not None:
            records["block"] = block_record(index, result.outcome, time.monotonic() - started)
            self._report(index, result.outcome)
        if experts := mixture_records(task):
            records["experts"] = experts
        said = [(linear, f"{NEVER_CALLED}. It stays in full precision.") for linear in planned if linear not in linears]
        said += [*result.notes, *([] if result.outcome is None else _outcome_notes(result.outcome))]
        if said:
            records["warnings"] = said
        files = [shard]
        if job.method.needs.adapter is not None:
            files.append(self._writer.scratch / layout.adapter_shard(index))
            layout.write_adapters(files[-1], prefix, result.adapters)
        self._writer.record(str(index), records, files=files)
        phase.advance(1 + job.method.needs.epochs - min(epochs, job.method.needs.epochs), f"block {index}")

    def _by_method(self, task: BlockTask, streams: Streams | None) -> BlockResult:
        """What the method makes of a block; where no full-precision stream has called its layers, the method has to."""
        method = self._job.method
        if not task.linears:
            return BlockResult({})
        if streams is None or self._full_precision:
            return method.quantize_block(task)
        called: set[str] = set()
        layers = {linear: task.block.get_submodule(linear) for linear in task.linears}
        with watching(layers, lambda linear, _: called.add(linear)):
            result = method.quantize_block(task)
        streams.check_called(task.index, task.block, task.linears, called)
        return result

    def _start(self, block: nn.Module, prefix: str, linears: tuple[str, ...]) -> BlockStart | None:
        start = self._job.start
        if start is None:
            return None
        vectors = {name: start.source.read(prefix + name) for name in vectors_beside(block, linears)}
        return dataclasses.replace(start.block(prefix, linears), vectors=vectors)

    def _report(self, index: int, outcome: TrainOutcome) -> None:
        if outcome.retries and not outcome.fallback:
            self._progress.note(f"Block {index} was rolled back {outcome.retries} times and trained at lower rates.")

    def warn(self) -> None:
        """Say what was to be said of all blocks, those of a resumed run too; each thing once."""
        journal = self._writer.journal
        said = {index: journal[str(index)].get("warnings", ()) for index in range(self._job.found.n_blocks)}
        for sentence in gathered(said):
            self._progress.warn(sentence)


def _outcome_notes(outcome: TrainOutcome) -> list[tuple[str, str]]:
    """What a person must read of how a block trained."""
    found = []
    if outcome.fallback:
        why = "diverged" if outcome.diverged else "did not improve"
        found.append(("", f"{why} in training and kept the closed-form start."))
    if outcome.end_error > _ALARM:
        found.append(("", f"ended at a relative error of {outcome.end_error:.2f}: expect the worst."))
    return found


def _as_it_is(start: BlockStart) -> BlockResult:
    """A block of an artifact, unchanged."""
    return BlockResult(dict(start.packed), dict(start.vectors), adapters=dict(start.adapters), schemes=start.schemes)


def _scores(
    saliency: Saliency | None, device: torch.device, prefix: str, linears: tuple[str, ...]
) -> dict[str, torch.Tensor] | None:
    """Scores of a block's layers, by name inside the block; None where there are none."""
    if saliency is None:
        return None
    return {linear: saliency.score(prefix + linear).to(device) for linear in linears}
