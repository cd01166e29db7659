"""``quantize``: a model in, a packed artifact out, one block at a time."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ulbq import __version__, formats, runtime
from ulbq.artifacts.manifest import SCHEMA_VERSION, QuantizedManifest, read_back
from ulbq.artifacts.records import BlockRecord, LayerRecord
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter, fingerprint, free_output
from ulbq.data.calibration import Calibration, calibration_samples, load_calibration, save_calibration
from ulbq.data.generate import self_samples
from ulbq.errors import InputError, NumericsError
from ulbq.formats import dual_binary
from ulbq.formats.bits import stored_bits
from ulbq.methods.base import BlockResult, BlockTask
from ulbq.models.blocks import load_block
from ulbq.models.load import load_model
from ulbq.nn.quant_linear import linear_layer
from ulbq.pipeline import layout
from ulbq.pipeline.predict import heldout_samples
from ulbq.pipeline.quantization_plan import Job, QuantizePlan, plan, prepare
from ulbq.pipeline.request import NOT_IN_FINGERPRINT, QuantizeRequest
from ulbq.pipeline.streams import Streams
from ulbq.progress import Phase, Progress, Silent
from ulbq.training.block import TrainOutcome

__all__ = ["QuantizePlan", "QuantizeRequest", "plan", "quantize"]

_CALIBRATION = "calibration.safetensors"
# A relative error of one half per token: what comes out of the block is hardly the model's any more.
_ALARM = 0.5


def quantize(
    request: QuantizeRequest, progress: Progress | None = None, on_plan: Callable[[QuantizePlan], None] | None = None
) -> tuple[Path, QuantizedManifest]:
    """Quantize a model.

    Args:
        request: what to do.
        progress: told how it goes.
        on_plan: called with the plan before anything is written.

    Returns:
        The artifact's folder and its manifest.

    Raises:
        UsageError, InputError: as :func:`plan`; also where the output is taken or another run's.
        ResourceError: data, memory or disk are missing.
        NumericsError: the numbers went wrong beyond repair. The finished blocks stay for a resumed run.
    """
    progress = progress or Silent()
    job = prepare(request, progress)
    if on_plan is not None:
        on_plan(job.plan)
    watch = runtime.Stopwatch()
    runtime.seed_everything(job.request.seed)
    drawn = None
    if job.method.calibrated and job.request.calibration != "self":
        with watch.phase("calibration"):
            drawn = _draw(job)
    identity = _fingerprint(job, drawn)
    out = request.out or free_output(
        DEFAULT_ROOT, f"{job.source.name}-{job.method.name}-{job.method.scheme.label}", identity
    )
    if job.source.kind == "gguf":
        job.source.tokenizer()  # written out at the end: better missed now
    with ArtifactWriter(out, identity, force=request.force, spare=[job.source.path]) as writer:
        if writer.resumed:
            progress.note(f"Resuming {out}: {len(writer.journal)} of {job.found.n_blocks} blocks are done.")
        calibration = drawn
        if job.method.calibrated and calibration is None:
            with watch.phase("calibration"):
                calibration = _written_samples(job, writer, progress)
        if calibration is not None:
            save_calibration(writer.path / _CALIBRATION, calibration)
        with watch.phase("blocks"):
            # First: a source that is damaged here would show only after hours.
            outer = layout.write_outer(
                writer.path / layout.OUTER_SHARD, job.model, job.source, f"{job.found.blocks_prefix}."
            )
            _Run(job, writer, progress).walk(calibration)
        with watch.phase("finish"):
            manifest = _finish(job, writer, calibration, outer, watch)
        path = writer.finish(manifest)
    return path, read_back(path, QuantizedManifest)


def _draw(job: Job) -> Calibration:
    request = job.request
    samples = request.samples or 0
    held_out = heldout_samples(samples)
    try:
        return calibration_samples(
            str(request.calibration),
            job.source.tokenizer(),
            samples=samples + held_out,
            length=request.sequence_length or 0,
            seed=request.seed,
            data_dir=request.data_dir,
            offline=request.offline,
        )
    except InputError as error:
        # The data layer counts all samples alike; who asked for --samples must know about the others.
        extra = f"Besides --samples {samples}, {held_out} are drawn and held out."
        raise InputError(error.message, hint=f"{error.hint} {extra}" if error.hint else extra) from error


def _written_samples(job: Job, writer: ArtifactWriter, progress: Progress) -> Calibration:
    """Samples of the model's own, or those that the interrupted run wrote: they follow from the seed."""
    saved = writer.path / _CALIBRATION
    if writer.resumed and saved.exists():
        return load_calibration(saved)
    request, precision = job.request, job.precision
    samples = request.samples or 0
    model = load_model(job.source, dtype=precision.dtype, device=precision.device)
    return self_samples(
        model,
        job.source.tokenizer(),
        samples=samples + heldout_samples(samples),
        length=request.sequence_length or 0,
        seed=request.seed,
        progress=progress,
    )


def _fingerprint(job: Job, drawn: Calibration | None) -> str:
    return fingerprint(
        {
            "ulbq": __version__,
            "schema": SCHEMA_VERSION,
            "source": job.source.content_hash,
            "request": job.request.model_dump(mode="json", exclude=set(NOT_IN_FINGERPRINT)),
            "device": job.precision.device.type,
            "precision": job.plan.precision,
            "calibration": drawn.sha256 if drawn else job.request.calibration,
        }
    )


class _Run:
    """The walk over the blocks."""

    def __init__(self, job: Job, writer: ArtifactWriter, progress: Progress) -> None:
        self._job = job
        self._writer = writer
        self._progress = progress

    def walk(self, calibration: Calibration | None) -> None:
        """Quantize every block that the journal does not hold yet; the others are replayed from their shards."""
        job = self._job
        streams = None if calibration is None else Streams(job, calibration.tokens, self._writer.scratch)
        steps = job.found.n_blocks * (job.method.epochs + 1)
        with self._progress.phase("Quantizing", steps) as phase:
            for index in range(job.found.n_blocks):
                if streams is not None:
                    streams.advance_full_precision(index)
                if str(index) in self._writer.journal:
                    phase.advance(job.method.epochs + 1, f"block {index} was done")
                else:
                    self._quantize(index, streams, phase)
                if streams is not None and index + 1 < job.found.n_blocks:
                    streams.advance_quantized(index, self._writer.path / layout.block_shard(index))

    def _quantize(self, index: int, streams: Streams | None, phase: Phase) -> None:
        job, started = self._job, time.monotonic()
        prefix, linears = job.names(index)
        block = load_block(job.model, job.source, index, torch.float32, job.precision.device)
        originals = {linear: linear_layer(block, linear).weight.detach() for linear in linears}
        epochs = 0

        def on_epoch(error: float) -> None:
            nonlocal epochs
            epochs += 1
            # Retries repeat epochs that were counted already.
            phase.advance(int(epochs <= job.method.epochs), f"block {index}, error {error:.4f}")

        task = BlockTask(
            index=index,
            block=block,
            linears=linears,
            importance={} if streams is None else streams.importance,
            data=None if streams is None else streams.data(index),
            precision=job.precision,
            seed=job.request.seed + index,
            on_epoch=on_epoch,
        )
        result = job.method.quantize_block(task)
        _check_finite(index, result)
        shard = self._writer.path / layout.block_shard(index)
        layout.write_block(shard, prefix, job.source, job.model.get_submodule(prefix[:-1]), result)
        records: dict[str, Any] = {
            "layers": [_layer(job, prefix + name, originals[name], result.packed[name]) for name in linears]
        }
        if result.outcome is not None:
            records["block"] = _block(index, result.outcome, time.monotonic() - started)
            self._report(index, result.outcome)
        self._writer.record(str(index), records, files=[shard])
        phase.advance(1 + job.method.epochs - min(epochs, job.method.epochs), f"block {index}")

    def _report(self, index: int, outcome: TrainOutcome) -> None:
        if outcome.fallback:
            why = "diverged" if outcome.diverged else "did not improve"
            self._progress.warn(f"Block {index} {why} in training: it keeps its closed-form start.")
        elif outcome.retries:
            self._progress.note(f"Block {index} was rolled back {outcome.retries} times and trained at lower rates.")
        if outcome.end_error > _ALARM:
            self._progress.warn(f"Block {index} ends at a relative error of {outcome.end_error:.2f}: expect the worst.")


def _check_finite(index: int, result: BlockResult) -> None:
    tensors = [t for packed in result.packed.values() for t in packed.values()] + list(result.dense.values())
    if not all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()):
        raise NumericsError(
            f"Block {index} has scales or norms that are not finite.", hint="Try --precision fp32, or lower rates."
        )


def _layer(job: Job, name: str, original: torch.Tensor, packed: dict[str, torch.Tensor]) -> LayerRecord:
    scheme, shape = job.method.scheme, (original.shape[0], original.shape[1])
    dense = formats.dequantize(scheme, packed, shape[1])
    error = ((dense - original).square().sum() / original.square().sum().clamp_min(1e-30)).item()
    sparsity = dual_binary.sparsity(packed, shape[1]) if scheme.format == "dual_binary" else None
    bits = {str(role): count for role, count in stored_bits(scheme.tensors(*shape)).items()}
    return LayerRecord(name=name, shape=shape, scheme=scheme.model_dump(), bits=bits, error=error, sparsity=sparsity)


def _block(index: int, outcome: TrainOutcome, seconds: float) -> BlockRecord:
    return BlockRecord(
        index=index,
        start_error=outcome.start_error,
        end_error=outcome.end_error,
        steps=outcome.steps,
        retries=outcome.retries,
        fallback=outcome.fallback,
        seconds=round(seconds, 3),
    )


def _finish(
    job: Job,
    writer: ArtifactWriter,
    calibration: Calibration | None,
    outer: Mapping[str, int],
    watch: runtime.Stopwatch,
) -> QuantizedManifest:
    """Write everything beside the tensors, and describe the whole; ``outer`` are the bits outside the blocks."""
    folder, source = writer.path, job.source
    entries = [writer.journal[str(index)] for index in range(job.found.n_blocks)]
    layers = [LayerRecord.model_validate(layer) for entry in entries for layer in entry["layers"]]
    shards = [folder / layout.block_shard(index) for index in range(job.found.n_blocks)]
    bits = layout.bits_report(layers, shards, outer)
    layout.write_folder(folder, source, job.method.scheme, job.method.name, bits)
    return QuantizedManifest(
        name=writer.out.name,
        request=job.request.model_dump(mode="json"),
        seed=job.request.seed,
        device=job.plan.device,
        parents=(source.record(),),
        phases=tuple(watch.records),
        method=job.method.name,
        scheme=job.method.scheme.model_dump(),
        bits=bits,
        layers=tuple(layers),
        blocks=tuple(BlockRecord.model_validate(entry["block"]) for entry in entries if "block" in entry),
        skipped=job.found.skipped,
        calibration=calibration.record() if calibration else {},
    )
