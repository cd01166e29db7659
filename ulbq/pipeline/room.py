"""Whether a machine has room for a run, asked before its work begins."""

from collections.abc import Iterator
from typing import Any

from ulbq import distributed, runtime
from ulbq.config.groups import TrainOptions
from ulbq.errors import ResourceError
from ulbq.pipeline.predict import Cost, RunSizes, predict
from ulbq.pipeline.quantization_plan import Job
from ulbq.progress import Progress

_SURE = 1.25
"""Predictions were up to 15 % above what runs took (``docs/guides/predictions.md``)."""
_SHORTEST, _LEAST_ACTIVATIONS = 128, 256 << 20


def check_room(job: Job, progress: Progress) -> None:
    """Refuse a run that memory has no room for, and warn of one that it may have none for.

    Of a GPU's memory the least counts that training can do with: one sample at once.

    Raises:
        ResourceError: far more is predicted than is free, in the process's memory or on the GPU; the hint names a
            setting that fits, if one does.
    """
    cost, device = job.plan.cost, job.precision.device
    free = runtime.available_memory() // distributed.neighbours()
    _compare(job, _more(job, cost), free, "memory", progress)
    if device.type == "cuda":
        least = _cost(job, **_one_by_one(job)).device_memory
        _compare(job, least, runtime.free_memory(device), runtime.describe_device(device), progress)


def _compare(job: Job, wanted: int, free: int, where: str, progress: Progress) -> None:
    if wanted <= free:
        return
    said = f"The run is predicted to take {_gib(wanted)} of {where}, and {_gib(free)} are free"
    if wanted <= _SURE * free:
        progress.note(f"{said}: it may end for lack of it.")
        return
    on_gpu = where != "memory"
    for words, changes in _smaller(job, on_gpu=on_gpu):
        cost = _cost(job, **changes)
        if (cost.device_memory if on_gpu else _more(job, cost)) <= free:
            raise ResourceError(f"{said}.", hint=f"With {words} it fits.")
    other = "a GPU with more memory, or `device=cpu`" if on_gpu else "a machine with more memory"
    raise ResourceError(f"{said}.", hint=f"Free some, or take {other}.")


def _more(job: Job, cost: Cost) -> int:
    """Bytes that this process does not have yet; pages of a mapped GGUF file count as free."""
    return cost.peak_memory - job.source.gguf_size - runtime.peak_memory()


def _smaller(job: Job, *, on_gpu: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that take less, the one that changes results least first."""
    run = job.request
    if not on_gpu and run.activation_memory > _LEAST_ACTIVATIONS:
        yield "`activation_memory=256M`", {"activation_memory": _LEAST_ACTIVATIONS}
    length = run.sequence_length // 2
    while job.calibrated and length >= _SHORTEST:
        shorter: dict[str, Any] = {"sequence_length": length}
        yield f"`sequence_length={length}`", shorter | (_one_by_one(job) if on_gpu else {})
        length //= 2


def _one_by_one(job: Job) -> dict[str, Any]:
    """What makes a step's samples run one after the other."""
    options = job.request.options
    return {"options": options.model_copy(update={"micro_batch": 1})} if isinstance(options, TrainOptions) else {}


def _cost(job: Job, **changes: Any) -> Cost:
    """What the run would take with some values changed."""
    sizes = RunSizes(
        job.request.model_copy(update=changes),
        job.method,
        job.found,
        job.model,
        job.precision,
        gguf_size=job.source.gguf_size,
        halves=job.source.halves,
        streamed=job.streamed,
        sharded=job.plan.sharded,
        tables=job.tables,
        schemes=job.schemes,
    )
    return predict(sizes, blocks_stay=job.blocks_stay)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
