"""The runs of a sweep: one after the other in this process, or several at a time in processes of their own."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ulbq import runtime
from ulbq.artifacts import ArtifactWriter, LayerRecord, QuantizedManifest, SweepRun, is_artifact, read_back
from ulbq.artifacts.disk import remove_tree
from ulbq.artifacts.partial import clear_up, partial_of
from ulbq.config.quantize import preset_values
from ulbq.errors import NumericsError, ResourceError
from ulbq.evaluation.table import size
from ulbq.formats import read_scheme
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.sweep_page import layers_by_block
from ulbq.pipeline.sweep_plan import Run, SweepJob
from ulbq.progress import Progress, Silent

RUNS = "runs"


def runs(job: SweepJob, writer: ArtifactWriter, progress: Progress) -> Iterator[tuple[Run, SweepRun | str]]:
    """Every run in order, with what it gave; why it gave nothing where its numbers went wrong.

    Args:
        job: the sweep; its request says how many runs go at a time.
        writer: of the sweep. What it has recorded is not made again.
        progress: told which run it is.

    Raises:
        ResourceError: a process with a run ended by itself, as where memory was short; and as
            :func:`~ulbq.pipeline.quantize.quantize`.
    """
    root = writer.path / RUNS
    open_runs = [run for run in job.runs if _key(run) not in writer.journal and not is_artifact(root / run.name)]
    made_here = {run.name for run in open_runs}
    begun = {run.name for run in open_runs if partial_of(root / run.name).exists()}
    with _making(open_runs, _at_a_time(job, open_runs, progress), writer, progress, job.device) as make:
        for number, run in enumerate(job.runs, 1):
            progress.note(f"Run {number} of {len(job.runs)}: {run.name}.")
            maker = make if run.name in made_here else None
            yield run, _made(run, writer, progress, maker, resumed=run.name in begun)


def _key(run: Run) -> str:
    return f"{run.name}: quantize"


def _at_a_time(job: SweepJob, open_runs: Sequence[Run], progress: Progress) -> int:
    """How many runs go at a time: as many as were asked for, as far as memory holds them."""
    asked = min(job.request.parallel, len(open_runs))
    names = {run.name for run in open_runs}
    costs = [run.cost for run in job.plan.runs if run.name in names]
    if asked < 2:
        return asked
    # This process measures one model meanwhile.
    free = runtime.available_memory() - runtime.LIBRARY_MEMORY - max(cost.artifact for cost in costs)
    peaks = sorted((cost.peak_memory for cost in costs), reverse=True)
    count = max([1, *(number for number in range(2, asked + 1) if sum(peaks[:number]) <= free)])
    if count < asked:
        progress.note(f"{asked} runs at a time want {size(sum(peaks[:asked]))}, and {size(free)} are free: {count} go.")
    if job.device.type == "cuda":
        most, there = max(cost.device_memory for cost in costs), runtime.free_memory(job.device)
        on_gpus = max(1, _cards(job.device) * (there // max(1, most)))
        if on_gpus < count:
            progress.note(f"A run wants {size(most)} of a GPU, and {size(there)} are free: {on_gpus} go at a time.")
            count = on_gpus
    return count


def _cards(device: torch.device) -> int:
    """How many GPUs the runs have; one that was named is that of all."""
    return 0 if device.type != "cuda" else torch.cuda.device_count() if device.index is None else 1


@contextmanager
def _making(
    open_runs: Sequence[Run], count: int, writer: ArtifactWriter, progress: Progress, device: torch.device
) -> Iterator[Callable[[Run], None]]:
    """What makes the artifact of a run, or waits for it. Raises as :func:`runs`."""
    root, shared = writer.path / RUNS, writer.scratch
    if count < 2:
        yield lambda run: _quantize(run, root, shared, progress)
        return
    # No fork: torch has threads, and CUDA forbids it.
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for number in range(count):
        places.put(number)
    threads = max(1, torch.get_num_threads() // count)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, context, _settle, (places, threads, _cards(device), warnings.filters))
    try:
        made = {run.name: pool.submit(partial(_quantize, run, root, shared, Silent())) for run in open_runs}
        yield lambda run: _awaited(made[run.name], root / run.name, progress)
    except BrokenProcessPool as error:
        raise ResourceError(
            "A process with a run was ended, as the system does it where memory is short.",
            hint="Run it again with a smaller `parallel`. A script must call it behind its main guard.",
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # What is unfinished goes on at its next block when the sweep does.
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()


def _settle(places: "SimpleQueue[int]", threads: int, cards: int, ignored: Sequence[Any]) -> None:
    """What a new process takes of the machine: some threads, and a GPU where there are several."""
    warnings.filters[:] = ignored  # type: ignore[index]
    # An interrupt is the parent's to answer; nobody waits for this process where the parent is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if cards > 1:
        # Before CUDA begins.
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible()[places.get() % cards]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _visible() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def _awaited(made: "Future[None]", folder: Path, progress: Progress) -> None:
    """Wait for another process's run, and count the blocks that it has written."""
    with progress.phase(f"Quantizing {folder.name}") as phase:
        seen = 0
        while not made.done():
            wait([made], timeout=1)
            blocks = sum(1 for _ in partial_of(folder).glob("model-block-*.safetensors"))
            if blocks > seen:
                phase.advance(blocks - seen, "blocks")
                seen = blocks
    made.result()


def _quantize(run: Run, root: Path, shared: Path, progress: Progress) -> None:
    runtime.forget_peak_memory()
    quantize(run.request, progress, name=run.name, root=root, shared=shared)


def _made(
    run: Run, writer: ArtifactWriter, progress: Progress, make: Callable[[Run], None] | None, *, resumed: bool
) -> SweepRun | str:
    """What a run gave, now or before this sweep was stopped; why it gave nothing where its numbers went wrong."""
    key = _key(run)
    if key in writer.journal:
        recorded = writer.journal[key]
        return recorded if isinstance(recorded, str) else SweepRun.model_validate(recorded)
    folder = writer.path / RUNS / run.name
    if make is not None:
        try:
            make(run)
        except NumericsError as error:
            progress.warn(f"{run.name}: {error.message}")
            remove_tree(partial_of(folder))
            writer.record(key, error.message)
            return error.message
    clear_up(folder)
    manifest = read_back(folder, QuantizedManifest)
    for warning in manifest.warnings:  # of a process of its own
        progress.warn(warning)
    record = SweepRun(
        name=run.name,
        setting=run.setting,
        seed=run.request.seed,
        options=_options(run, manifest),
        method=manifest.method,
        scheme=read_scheme(manifest.scheme).label,
        bits=manifest.bits.bits_per_weight,
        weights=manifest.bits.weights,
        size=round(sum(manifest.bits.parts.values()) / 8),
        seconds=round(sum(phase.seconds for phase in manifest.phases), 1),
        peak_memory=max((phase.peak_memory for phase in manifest.phases), default=0),
        resumed=resumed,
        errors=_errors(manifest.layers),
    )
    writer.record(key, record, files=sorted(path for path in folder.rglob("*") if path.is_file()))
    return record


def _options(run: Run, manifest: QuantizedManifest) -> dict[str, Any]:
    """What was asked of a run, with what its preset came to."""
    preset = {name: manifest.request[name] for name in preset_values(run.request, "quick")}
    return {name: value for name, value in {**run.options, **preset}.items() if name not in ("seed", "preset")}


def _errors(layers: Sequence[LayerRecord]) -> tuple[float, ...]:
    """Mean error of each block's layers, up to the last one that has any."""
    found = layers_by_block(layers)
    return tuple(mean(found.get(block, [0.0])) for block in range(max(found, default=-1) + 1))
