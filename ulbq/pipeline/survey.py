"""A look at all blocks before the first is quantized, for methods that share one budget among them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from ulbq import distributed
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.walk import BlockWalk
from ulbq.methods.base import BlockTask, SurveyingMethod
from ulbq.pipeline.quantization_plan import Job
from ulbq.progress import Progress
from ulbq.sensitivity.outputs import OutputCosts
from ulbq.training.objective import BlockData

Scores = Callable[[str], Callable[[str], torch.Tensor] | None]
"""Reads the saliency of a block's layers: by the block's name with the dot, then a layer's inside it."""
Outputs = Callable[[int], dict[str, OutputCosts] | None]
"""What errors at the outputs of a block's layers cost, by the block's index."""


@torch.no_grad()
def survey(
    job: Job, samples: Samples, scores: Scores, outputs: Outputs, scratch: Path, progress: Progress
) -> dict[str, torch.Tensor]:
    """Walk the full-precision model once; gives what the method decides by it.

    Args:
        job: of a method that surveys.
        samples: the held-out ones last; those that train are looked at.
        scores: where the method weighs layers by them.
        outputs: where the method's second moments weigh tokens by them.
        scratch: for activations beyond the run's ``activation_memory``.
        progress: told how it goes.
    """
    method = cast(SurveyingMethod, job.method)
    training, device = job.request.samples, job.precision.device
    walk = BlockWalk(
        job.model,
        job.source,
        distributed.own(samples[:training]),
        dtype=torch.float32,
        device=device,
        limit=job.request.activation_memory,
        directory=scratch,
    )
    hidden = walk.hidden
    found: dict[str, Any] = {}
    with progress.phase("Surveying", job.found.n_blocks) as phase:
        for index in range(job.found.n_blocks):
            prefix, linears = job.names(index)
            task = BlockTask(
                index=index,
                block=walk.load(index),
                linears=linears,
                importance={},
                data=BlockData(hidden, hidden, None, walk.block_kwargs[index], training),
                precision=job.precision,
                seed=job.request.seed + index,
                on_epoch=lambda error: None,
                saliency=scores(prefix),
                prefix=prefix,
                outputs=outputs(index),
                schemes={name: job.schemes[prefix + name] for name in linears if prefix + name in job.schemes},
            )
            found |= method.survey_block(task)
            if index + 1 < job.found.n_blocks:
                walk.advance(index, task.block, hidden, hidden, batch_size=1, context=job.precision.autocast)
                walk.add_between(index, hidden)
            phase.advance(1, f"block {index}")
    return method.decide(found)
