"""The temperature of a quantized model's predictions, which goes into the norm before its head.

What quantization does to the hidden states is noise to the head: its logits come out too large or too small for how
often they are right (Guo et al., 2017, https://arxiv.org/abs/1706.04599, fit the one number that this is about). Here
it is fitted to the full-precision model's predictions, on samples that trained nothing.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from ulbq.artifacts.records import TemperatureRecord
from ulbq.errors import InputError
from ulbq.models.stream import ActivationStore
from ulbq.pipeline import layout
from ulbq.pipeline.finish import recorded_schemes
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.streams import Streams
from ulbq.progress import Progress
from ulbq.saliency.head import LossHead

_LEAST, _MOST = 0.25, 4.0
_STEPS, _CLOSE = 12, 1e-4
_TRIED = 16
"""Positions on which it is looked up which vectors scale the logits."""


def fit_temperature(
    job: Job, folder: Path, scratch: Path, journal: dict[str, object], tokens: torch.Tensor, progress: Progress
) -> TemperatureRecord:
    """Find the factor of the logits that brings the quantized model's predictions closest to the original's.

    Args:
        job: the run, with all blocks written.
        folder: of the blocks' shards.
        scratch: of the adapters' shards, and for activations.
        journal: the blocks' records.
        tokens: int64 ``[samples, length]`` that trained nothing.
        progress: told how far it is.

    Raises:
        InputError: nothing scales this model's logits.
    """
    streams, count = Streams(job, tokens, scratch), job.found.n_blocks
    with progress.phase("Fitting the temperature", count) as phase:
        for index in range(count):
            streams.advance_full_precision(index, watch=False)
            schemes = recorded_schemes(journal[str(index)], job.names(index)[0])  # type: ignore[arg-type]
            streams.advance_quantized(index, folder / layout.block_shard(index), schemes)
            phase.advance(1)
    head = LossHead(job.model, job.source, job.precision, extras=streams.extras)
    full, quantized = streams.ends()
    names = head.gains(_states(full, slice(0, 1), job)[:_TRIED])
    if not names:
        raise InputError(
            f"Nothing but the head scales the logits of the model type '{job.model.config.model_type}'.",
            hint="Leave out --fit-temperature.",
        )
    factor, start_error, end_error = _fit(job, head, full, quantized)
    return TemperatureRecord(factor=factor, vectors=names, start_error=start_error, end_error=end_error)


def _fit(job: Job, head: LossHead, full: ActivationStore, quantized: ActivationStore) -> tuple[float, float, float]:
    """Newton's method on the mean divergence, convex in the factor; returns it and the errors before and with it."""
    factor = 1.0
    start_error, slope, curvature = _divergence(job, head, full, quantized, factor)
    error = start_error
    for _ in range(_STEPS):
        to = min(_MOST, max(_LEAST, factor - slope / max(curvature, 1e-12)))
        if abs(to - factor) < _CLOSE:
            break
        factor = to
        error, slope, curvature = _divergence(job, head, full, quantized, factor)
    return (factor, start_error, error) if error < start_error else (1.0, start_error, start_error)


@torch.no_grad()
def _divergence(
    job: Job, head: LossHead, full: ActivationStore, quantized: ActivationStore, factor: float
) -> tuple[float, float, float]:
    """Mean KL divergence of the original's predictions from those at a factor, nats a token; two derivatives by it."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for ours, theirs in zip(_chunks(job, head, quantized), _chunks(job, head, full), strict=True):
        expected = theirs.log_softmax(-1)
        predicted = (factor * ours).log_softmax(-1)
        chances, guesses = expected.exp(), predicted.exp()
        mean = (guesses * ours).sum(-1)
        sums[0] += (chances * (expected - predicted)).sum(-1).double().sum().cpu()
        sums[1] += (mean - (chances * ours).sum(-1)).double().sum().cpu()
        sums[2] += ((guesses * ours.square()).sum(-1) - mean.square()).double().sum().cpu()
        count += len(ours)
    error, slope, curvature = (sums / count).tolist()
    return error, slope, curvature


def _chunks(job: Job, head: LossHead, store: ActivationStore) -> Iterator[torch.Tensor]:
    """Logits ``[n, vocabulary]`` float32, a few positions at a time."""
    for row in range(len(store)):
        # The head counts its own copies of a chunk's logits; a dozen live together here.
        for states in _states(store, slice(row, row + 1), job).split(max(1, head.chunk // 3)):
            yield head.logits(states)


def _states(store: ActivationStore, rows: slice, job: Job) -> torch.Tensor:
    return store.get(rows)[0].to(job.precision.device)
