"""The walk that quantizes: block by block, each written and noted before the next."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ulbq import distributed, runtime
from ulbq.artifacts.records import BlockRecord, experts_sentence, sinks_sentence
from ulbq.artifacts.store import ArtifactWriter
from ulbq.data.calibration import Calibration
from ulbq.methods.base import BlockResult, BlockStart, BlockTask, check_finite, check_range, set_aside
from ulbq.methods.training import vectors_beside
from ulbq.models.blocks import load_block
from ulbq.models.selection import NEVER_CALLED
from ulbq.models.watch import watching
from ulbq.nn.quant_linear import linear_layer
from ulbq.pipeline import layout
from ulbq.pipeline.finish import block_record, layer_record, mixture_records, mixtures, recorded_schemes
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.sensitivity import layer_scores, output_costs
from ulbq.pipeline.streams import Streams
from ulbq.pipeline.warned import gathered
from ulbq.progress import Phase, Progress
from ulbq.sensitivity import Saliency
from ulbq.tracking import Log, nowhere
from ulbq.training.block import TrainOutcome

# A relative error of one half per token: what comes out of the block is hardly the model's any more.
_ALARM = 0.5


class BlockQuantizer:
    """Quantizes the blocks of a model one after the other.

    Args:
        job: the run.
        writer: of the artifact; its journal says which blocks are done.
        progress: told how it goes.
        saliency: scores of all weights; None where the method weighs nothing by them.
        log: told the errors of blocks that train.
    """

    def __init__(
        self, job: Job, writer: ArtifactWriter, progress: Progress, saliency: Saliency | None, log: Log = nowhere
    ) -> None:
        self._job = job
        self._log = log
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
        most, epochs = job.method.needs.epochs, 0
        originals = {linear: linear_layer(block, linear).weight.detach() for linear in linears}
        for linear, weight in originals.items():
            check_range(prefix + linear, weight)
        if job.method.needs.trains:
            originals = {linear: set_aside(weight) for linear, weight in originals.items()}

        def on_epoch(error: float) -> None:
            nonlocal epochs
            epochs += 1
            # Retries repeat epochs that were counted already.
            phase.advance(int(epochs <= most), f"block {index}, error {error:.4f}")
            self._log(index * (most + 1) + min(epochs, most), {"blocks/validation_error": error})

        task = self._task(index, block, originals, streams, on_epoch)
        result = _as_it_is(task.start) if job.blocks_stay and task.start else self._by_method(task, streams)
        if distributed.size() > 1:  # sums of different orders round otherwise: one process's result is everyone's
            result = distributed.of_main(result.on_host())
        check_finite(index, result)
        block.to_empty(device="meta")  # all that is wanted of it now is in the result and in the originals
        shard = self._writer.path / layout.block_shard(index)
        layout.write_block(shard, prefix, job.source, job.model.get_submodule(prefix[:-1]), result)
        layers = []
        for name, weight in originals.items():
            original = weight.to(job.precision.device, torch.float32)
            layers.append(layer_record(job, prefix + name, original, result.packed[name], result.schemes.get(name)))
        records: dict[str, Any] = {"layers": layers}
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
        phase.advance(1 + most - min(epochs, most), f"block {index}")

    def _task(
        self,
        index: int,
        block: nn.Module,
        originals: dict[str, torch.Tensor],
        streams: Streams | None,
        on_epoch: Callable[[float], None],
    ) -> BlockTask:
        job, prefix, linears = self._job, self._job.names(index)[0], tuple(originals)
        return BlockTask(
            index=index,
            block=block,
            linears=linears,
            importance={} if streams is None else streams.importance,
            data=None if streams is None else streams.data(index),
            precision=job.precision,
            seed=job.request.seed + index,
            on_epoch=on_epoch,
            saliency=layer_scores(self._saliency, job.precision.device, prefix),
            start=self._start(block, prefix, linears),
            prefix=prefix,
            tokens={} if streams is None else dict(streams.tokens),
            outputs=output_costs(job, self._writer.scratch, index),
            schemes={name: job.schemes[prefix + name] for name in linears if prefix + name in job.schemes},
            originals=originals,
            sharded=job.plan.sharded,
        )

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
        ends = {"blocks/start_error": outcome.start_error, "blocks/end_error": outcome.end_error}
        self._log((index + 1) * (self._job.method.needs.epochs + 1), ends)
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
    if outcome.at_once:
        found.append(("", f"trained {outcome.at_once} samples at a time: the device had no room for more."))
    if outcome.end_error > _ALARM:
        found.append(("", f"ended at a relative error of {outcome.end_error:.2f}: expect the worst."))
    return found


def _as_it_is(start: BlockStart) -> BlockResult:
    """A block of an artifact, unchanged."""
    return BlockResult(dict(start.packed), dict(start.vectors), adapters=dict(start.adapters), schemes=start.schemes)
