"""A look at all blocks before the first is quantized, for methods that share one budget among them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from ulbq import distributed
from ulbq.methods.base import BlockTask, SurveyingMethod
from ulbq.models.blocks import load_block
from ulbq.models.stream import BlockStream, run_block
from ulbq.pipeline.quantization_plan import Job
from ulbq.progress import Progress
from ulbq.training.objective import BlockData

Scores = Callable[[str, tuple[str, ...]], dict[str, torch.Tensor] | None]
"""Saliency of a block's layers, by the block's name with the dot and the layers' names inside it."""


@torch.no_grad()
def survey(
    job: Job, tokens: torch.Tensor, scores: Scores, scratch: Path, progress: Progress
) -> dict[str, torch.Tensor]:
    """Walk the full-precision model once; gives what the method decides by it.

    Args:
        job: of a method that surveys.
        tokens: int64 ``[samples, length]``, the held-out samples last; those that train are looked at.
        scores: where the method weighs layers by them.
        scratch: for activations beyond the run's ``activation_memory``.
        progress: told how it goes.
    """
    method = cast(SurveyingMethod, job.method)
    training, device = job.request.samples, job.precision.device
    stream = BlockStream(
        job.model,
        job.source,
        distributed.own(tokens[:training]),
        dtype=torch.float32,
        device=device,
        limit=job.request.activation_memory,
        directory=scratch,
    )
    hidden = stream.hidden
    found: dict[str, Any] = {}
    with progress.phase("Surveying", job.found.n_blocks) as phase:
        for index in range(job.found.n_blocks):
            prefix, linears = job.names(index)
            task = BlockTask(
                index=index,
                block=load_block(job.model, job.source, index, torch.float32, device),
                linears=linears,
                importance={},
                data=BlockData(hidden, hidden, None, stream.block_kwargs[index], training),
                precision=job.precision,
                seed=job.request.seed + index,
                on_epoch=lambda error: None,
                saliency=scores(prefix, linears),
                prefix=prefix,
            )
            found |= method.survey_block(task)
            for start in range(len(hidden) if index + 1 < job.found.n_blocks else 0):
                inputs = hidden.get(slice(start, start + 1)).to(device)
                with job.precision.autocast():
                    hidden.set(start, run_block(task.block, inputs, stream.block_kwargs[index]).float())
            phase.advance(1, f"block {index}")
    return method.decide(found)
