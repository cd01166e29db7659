"""Facts of the running process: device, seed, memory, versions."""

import ctypes
import os
import random
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from ulbq import distributed, limits
from ulbq.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1
"""Beyond it torch's generators take none; the seeds of blocks are counted on from a run's."""

LIBRARY_MEMORY = 70 << 20
"""Bytes that libraries take after a run was planned: what is imported late, kernels, pools of threads."""

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_COLLAPSE = 25  # Linux' MADV_COLLAPSE, since 6.1
_PAGE, _GAP = 2 << 20, 64 << 10  # of large pages, and bytes between tensors that belong together

_LOGITS_SHARE = 32  # of a GPU's memory, which the logits of a chunk may take a part of: 750 MB of 24 GB
_PACKAGES = ("torch", "transformers", "safetensors", "datasets", "lm-eval", "gguf", "numpy")


def calm_threads() -> None:
    """Let OpenMP spin for a moment only while it waits, and oneDNN keep few of the products that it compiles.

    On shared cores spinning costs up to fifty-fold.

    No spinning at all costs as well: a thread that sleeps must be woken for each of the many short operations. A step
    of end-to-end training takes 15 % longer then on two idle cores. On two busy ones 2,000 turns cost 3 %, 10,000 cost
    15 %.

    Each length that attention looks back over is a product of its own to oneDNN, which keeps the last 1,024: half a
    megabyte each, for products that a text which grows never asks for again.

    Only works before torch is imported; a variable that the user set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def resolve_device(name: str = "auto") -> "torch.device":
    """``auto`` is the first CUDA device, else the CPU; of several processes each has its own.

    Raises:
        ResourceError: the named device is missing, or there are fewer than processes.
        UsageError: one GPU was named for several processes, or several devices.
    """
    import torch

    if "," in name:
        raise UsageError(
            f"`device={name}`: this computes on one device.", hint="Several are for `generate`, `serve` and `eval`."
        )
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # the meta device has no values
        except (RuntimeError, AssertionError) as error:
            raise ResourceError(
                f"Device '{name}' cannot be used here: {_why_not(name)}.", hint="Take auto, cpu, cuda or cuda:N."
            ) from error
    distributed.check_device(device)
    return device


def resolve_devices(name: str = "auto") -> "tuple[torch.device, ...]":
    """Where a model may lie: devices with commas between them; ``auto`` and ``cuda`` are all GPUs, or a process's own.

    Raises:
        ResourceError, UsageError: as :func:`resolve_device`; or several processes have several devices each.
    """
    import torch

    names = name.split(",")
    if len(names) > 1:
        if distributed.size() > 1:
            raise UsageError(f"`device={name}` would be every process's.", hint="Each process takes its own GPU.")
        found = tuple(resolve_device(one.strip()) for one in names)
        # `cuda` is the first GPU.
        different = {(device.type, device.index or 0) for device in found}
        if len(different) < len(found) or any(device.type == "cpu" for device in found[:-1]):
            raise UsageError(
                f"`device={name}`: each device once, and the CPU last.", hint="As in `cuda:0,cuda:1` or `cuda:0,cpu`."
            )
        return found
    device = resolve_device(name)
    if device.type != "cuda" or device.index is not None or distributed.size() > 1:
        return (device,)
    return (device, *(torch.device("cuda", index) for index in range(1, torch.cuda.device_count())))


def _why_not(name: str) -> str:
    """Why a device cannot be used."""
    import torch

    kind, _, number = name.partition(":")
    if kind != "cuda":
        return "torch has no device of that name" if kind != "meta" else "it holds no values"
    if not torch.cuda.is_available():
        return "this torch finds no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    return f"there are {torch.cuda.device_count()} CUDA devices, from 0 on" if number else "it does not respond"


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While it lasts, torch takes algorithms that repeat themselves, and warns where it has none; if that is wanted.

    It must be entered before the first product on a GPU: cuBLAS reads its variable then.
    """
    if not wanted:
        yield
        return
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Gradients of these two kinds of attention are added up by atomics; the others' are not, in this mode.
    attention, memory = torch.backends.cuda, cast(Any, torch.utils.deterministic)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        attention.mem_efficient_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
    )
    _determine(True, True, False, False, False)
    try:
        yield
    finally:
        _determine(*before)


def _determine(wanted: bool, warn_only: bool, fill: bool, efficient: bool, cudnn: bool) -> None:
    import torch

    torch.use_deterministic_algorithms(wanted, warn_only=warn_only)
    cast(Any, torch.utils.deterministic).fill_uninitialized_memory = fill
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        # What Linux counts for getrusage holds the peak of the process that started this one, too.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory() -> None:
    """Have :func:`peak_memory` count from now on; without effect where the system cannot."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_back_memory() -> None:
    """Hand what was freed back to the system, where the C library keeps it: the next phase wants other sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def use_large_pages(tensors: Iterable["torch.Tensor"]) -> None:
    """Have Linux move tensors on the CPU to pages of 2 MiB, as far as they lie side by side and fill some.

    What reads all weights for every token is up to twice as fast then. Where the system does not, nothing changes.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    spans = list[list[int]]()
    for begin, size in sorted({(tensor.data_ptr(), tensor.nbytes) for tensor in tensors}):
        if spans and begin - spans[-1][1] < _GAP:
            spans[-1][1] = max(spans[-1][1], begin + size)
        else:
            spans.append([begin, begin + size])
    for begin, end in spans:
        first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if advise is not None and first < last:
            advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _COLLAPSE)


def map_large_blocks() -> None:
    """Have the C library map every block of 16 MiB and more by itself, so that it goes back whole as it is freed.

    Left alone it keeps freed blocks of up to 32 MiB in its heap. Where their sizes change from step to step, as those
    of logits of texts of many lengths do, none fits the next, and the heap grows to several times what lives in it.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if option is not None:
        option(_MMAP_THRESHOLD, 16 << 20)


def user_cache() -> Path:
    """``ulbq`` under the user's cache; a relative ``XDG_CACHE_HOME`` counts for nothing, as its rules say.

    Raises:
        RuntimeError: this user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ulbq"


def available_memory() -> int:
    """Memory that this machine can give to processes now, in bytes; where it does not say, all that it has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: "torch.device") -> int:
    """Bytes that this process can take on a device now; on the CPU its share of what is free for all processes."""
    import torch

    if device.type == "cuda":
        # What torch holds for tensors that are gone is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_memory() // distributed.neighbours()


def logits_room(device: "torch.device", on_cpu: int) -> int:
    """Bytes that one chunk of logits may take on a device: on the CPU those given, on a GPU a share of its memory.

    A head is read once for each chunk, and a GPU's products want many rows. Of a GPU that is not here nothing is known.
    """
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return on_cpu
    return max(on_cpu, int(torch.cuda.get_device_properties(device).total_memory) // _LOGITS_SHARE)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers, where installed."""
    found = {package: version for package in _PACKAGES if (version := _version(package))}
    return {"python": ".".join(map(str, sys.version_info[:3]))} | found


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_device(device: "torch.device") -> str:
    """The device's name as results should quote it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class PhaseRecord(BaseModel):
    """Wall time and peak resident memory of one phase of a run.

    Attributes:
        seconds: wall time.
        peak_memory: largest resident memory of the process up to the phase's end, in bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seconds: float = Field(ge=0, le=limits.LONGEST)
    peak_memory: int = Field(ge=0, le=limits.COUNT)


class Stopwatch:
    """Collects a :class:`PhaseRecord` for every ``with stopwatch.phase(name)``."""

    def __init__(self) -> None:
        self.records: list[PhaseRecord] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body; recorded only if it ends without an error. What it leaves free goes back to the system."""
        start = time.monotonic()
        yield
        give_back_memory()
        self.records.append(
            PhaseRecord(name=name, seconds=round(time.monotonic() - start, 3), peak_memory=peak_memory())
        )
