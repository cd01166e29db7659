"""The temperature of a quantized model's predictions, which goes into the norm before its head.

What quantization does to the hidden states is noise to the head: its logits come out too large or too small for how
often they are right (Guo et al., 2017, https://arxiv.org/abs/1706.04599, fit the one number that this is about). Here
it is fitted to the full-precision model's predictions, on samples that trained nothing.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from ulbq import distributed
from ulbq.artifacts.records import TemperatureRecord
from ulbq.blockwise.activations import ActivationStore
from ulbq.blockwise.samples import Samples
from ulbq.errors import InputError
from ulbq.pipeline import layout
from ulbq.pipeline.finish import recorded_schemes
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.streams import Streams
from ulbq.progress import Progress
from ulbq.sensitivity.head import LossHead

_LEAST, _MOST = 0.25, 4.0
_STEPS, _CLOSE = 12, 1e-4
_TRIED = 16
"""Positions on which it is looked up which vectors scale the logits."""


def fit_temperature(
    job: Job, folder: Path, scratch: Path, journal: dict[str, object], samples: Samples, progress: Progress
) -> TemperatureRecord:
    """Find the factor of the logits that brings the quantized model's predictions closest to the original's.

    Args:
        job: the run, with all blocks written.
        folder: of the blocks' shards.
        scratch: of the adapters' shards, and for activations.
        journal: the blocks' records.
        samples: that trained nothing.
        progress: told how far it is.

    Raises:
        InputError: nothing scales this model's logits.
    """
    streams, count = Streams(job, samples, scratch), job.found.n_blocks
    with progress.phase("Fitting the temperature", count) as phase:
        for index in range(count):
            streams.advance_full_precision(index, streams.load(index))
            schemes = recorded_schemes(journal[str(index)], job.names(index)[0])  # type: ignore[arg-type]
            streams.advance_quantized(index, folder / layout.block_shard(index), schemes)
            phase.advance(1)
    head, names = _head(job, streams)
    ours = head if job.embedded is None else LossHead(job.model, job.embedded, job.precision, extras=streams.extras)
    factor, start_error, end_error = _fit(job, (head, ours), *streams.ends())
    return TemperatureRecord(factor=factor, vectors=names, start_error=start_error, end_error=end_error)


def check_temperature(job: Job, scratch: Path, samples: Samples) -> None:
    """Refuse a model whose logits nothing scales, before its blocks take hours. Raises InputError.

    Args:
        job: the run.
        scratch: for activations.
        samples: any.
    """
    streams = Streams(job, samples[:1], scratch)
    streams.advance_full_precision(0, streams.load(0))
    _head(job, streams)


def _head(job: Job, streams: Streams) -> tuple[LossHead, tuple[str, ...]]:
    """The end of the model, and the vectors that scale its logits."""
    head = LossHead(job.model, job.source, job.precision, extras=streams.extras)
    # The first sample is the first process's.
    names = distributed.on_main(lambda: head.gains(_states(streams.ends()[0], 0, job)[:_TRIED]))
    if not names:
        raise InputError(
            f"Nothing but the head scales the logits of the model type '{job.model.config.model_type}'.",
            hint="Leave out `fit_temperature`.",
        )
    return head, names


def _fit(
    job: Job, heads: tuple[LossHead, LossHead], full: ActivationStore, quantized: ActivationStore
) -> tuple[float, float, float]:
    """Newton's method on the mean divergence, convex in the factor; returns it and the errors before and with it.

    With predictions ``p`` of the original and logits ``l``, the divergence at a factor ``β`` is
    ``Σ p log p − β Σ p l + log Σ exp(β l)``: of the original two numbers are wanted, and once. The ``heads`` are its
    and the quantized model's.
    """
    negentropy, agreement = _agreement(job, heads, full, quantized)
    head = heads[1]
    factor = 1.0
    partition, mean, variance = _partition(job, head, quantized, factor)
    start_error = error = negentropy - agreement + partition
    for _ in range(_STEPS):
        to = min(_MOST, max(_LEAST, factor - (mean - agreement) / max(variance, 1e-12)))
        if abs(to - factor) < _CLOSE:
            break
        factor = to
        partition, mean, variance = _partition(job, head, quantized, factor)
        error = negentropy - factor * agreement + partition
    return (factor, start_error, error) if error < start_error else (1.0, start_error, start_error)


@torch.no_grad()
def _agreement(
    job: Job, heads: tuple[LossHead, LossHead], full: ActivationStore, quantized: ActivationStore
) -> tuple[float, float]:
    """Means over tokens of ``Σ p log p`` and ``Σ p l``, of the original's predictions and the quantized logits."""
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for ours, theirs in zip(_chunks(job, heads[1], quantized), _chunks(job, heads[0], full), strict=True):
        expected = theirs.log_softmax(-1)
        chances = expected.exp()
        sums += torch.stack([(chances * values).sum(-1).double().sum() for values in (expected, ours)]).cpu()
        count += len(ours)
    distributed.sum_(sums)
    negentropy, agreement = (sums / distributed.total(count)[0]).tolist()
    return negentropy, agreement


@torch.no_grad()
def _partition(job: Job, head: LossHead, quantized: ActivationStore, factor: float) -> tuple[float, float, float]:
    """Means over tokens of ``log Σ exp(β l)``, and of its two derivatives by ``β``: mean and variance of the logits."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for ours in _chunks(job, head, quantized):
        guesses = (factor * ours).softmax(-1)
        mean = (guesses * ours).sum(-1)
        variance = (guesses * ours.square()).sum(-1) - mean.square()
        logs = (factor * ours).logsumexp(-1)
        sums += torch.stack([values.double().sum() for values in (logs, mean, variance)]).cpu()
        count += len(ours)
    distributed.sum_(sums)
    partition, mean_, variance_ = (sums / distributed.total(count)[0]).tolist()
    return partition, mean_, variance_


def _chunks(job: Job, head: LossHead, store: ActivationStore) -> Iterator[torch.Tensor]:
    """Logits ``[n, vocabulary]`` float32, a few positions at a time."""
    for row in range(len(store)):
        # The head counts its own copies of a chunk's logits; a dozen live together here.
        for states in _states(store, row, job).split(max(1, head.chunk // 3)):
            yield head.logits(states)


def _states(store: ActivationStore, row: int, job: Job) -> torch.Tensor:
    """Hidden states ``[length, hidden]`` of a sample."""
    return store.get(slice(row, row + 1), job.precision.device)[0]
