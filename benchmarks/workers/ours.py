"""Block training of this package, for ``block_time.py``."""

import tempfile
import time
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lap import Done, Laps

from ulbq.blockwise.samples import Samples
from ulbq.config.quantize import QuantizeRequest
from ulbq.methods.base import BlockTask
from ulbq.pipeline import layout
from ulbq.pipeline.quantization_plan import prepare
from ulbq.pipeline.streams import Streams
from ulbq.progress import Silent
from ulbq.runtime import seed_everything
from ulbq.training.block import BlockTrainer


def main() -> None:
    """Quantize the first blocks as ``ulbq quantize`` does."""
    laps = Laps()
    task = laps.task
    torch.set_num_threads(task["threads"])
    tokens = torch.load(task["tokens"])
    request = QuantizeRequest(
        **task["method"],
        source=task["source"],
        device=task["device"],
        precision=task["precision"],
        bits=task["bits"],
        group_size=task["group_size"],
        calibration=task["calibration"],
        samples=task["samples"],
        sequence_length=tokens.shape[1],
        epochs=task["passes"],
        patience=task["passes"],
        batch_size=task["batch_size"],
    )
    job = prepare(request, Silent())
    seed_everything(0)
    _time_training(laps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        streams = Streams(job, Samples(tokens), folder)
        try:
            for index in range(job.found.n_blocks):
                laps.start(index)
                laps.finish(_quantize(job, streams, index, folder))
        except Done:
            return


def _quantize(job: Any, streams: Streams, index: int, folder: Path) -> int:
    """One block; returns the steps that training took, retries included."""
    prefix, linears = job.names(index)
    block = streams.load(index)
    streams.advance_full_precision(index, block, linears)
    epochs = 0

    def on_epoch(error: float) -> None:
        nonlocal epochs
        epochs += 1

    task = BlockTask(
        index=index,
        prefix=prefix,
        block=block,
        linears=linears,
        importance=streams.importance,
        tokens=dict(streams.tokens),
        data=streams.data(index),
        precision=job.precision,
        seed=index,
        on_epoch=on_epoch,
    )
    result = job.method.quantize_block(task)
    shard = folder / layout.block_shard(index)
    layout.write_block(shard, prefix, job.source, job.model.get_submodule(prefix[:-1]), result)
    streams.advance_quantized(index, shard, dict.fromkeys(linears, job.method.scheme))
    return int(epochs * -(-job.request.samples // job.request.batch_size))


def _time_training(laps: Laps) -> None:
    train = BlockTrainer.train

    @wraps(train)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        outcome = train(*args, **kwargs)
        laps.add("training", time.perf_counter() - begun)
        return outcome

    BlockTrainer.train = timed  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
