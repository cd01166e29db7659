"""One run in several processes, one for each device, as ``torchrun`` starts them.

Every process runs the same program on its share of the samples; what is summed over samples is summed over processes
too, so that all of them decide alike. What reaches the disk is the first process's to write (:func:`on_main`). A run
that no ``torchrun`` started is a world of one: nothing here does anything then, and torch is not even imported.

Samples are dealt like cards: process ``r`` of ``n`` holds the samples ``r, r + n, r + 2n, …``, as its rows 0, 1, 2, ….
"""

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from ulbq.errors import NumericsError, ResourceError, UsageError

if TYPE_CHECKING:
    import torch


class Rows(Protocol):
    """What rows are taken out of."""

    def __getitem__(self, rows: slice, /) -> Any: ...


P = ParamSpec("P")
S = TypeVar("S", bound=Rows)
Item = TypeVar("Item")
T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILED, _CODE = "ulbq/failed", "ulbq/code"
# Others wait while the first process writes gigabytes; who dies is noticed without a clock.
_PATIENCE = timedelta(days=1)
_MEETING = timedelta(minutes=5)
_LAST_WORDS = timedelta(seconds=20)
# Values of gradients that are summed at once.
_BUCKET = 1 << 25


@dataclass
class _World:
    """The processes of a run, seen from one of them.

    Attributes:
        store: a small dictionary that all of them read and write.
        alone: the first process is doing something by itself; the others wait.
        gpu: index of this process's GPU among those that it sees.
        shared_gpu: whether another process has the same one.
        neighbours: how many of them are on this machine, this one counted.
    """

    rank: int
    size: int
    store: Any
    alone: bool = False
    gpu: int = 0
    shared_gpu: bool = False
    neighbours: int = 1


_world: _World | None = None


def processes() -> int:
    """How many processes the environment tells of; torch is not imported. Raises UsageError where it makes no sense."""
    return _environment()[1]


def rank() -> int:
    """Number of this process, from 0."""
    return 0 if _world is None else _world.rank


def size() -> int:
    """Number of processes that have joined."""
    return 1 if _world is None else _world.size


def neighbours() -> int:
    """Number of processes of the run that share this machine."""
    return 1 if _world is None else _world.neighbours


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the other processes that ``torchrun`` started, if any, while the context lasts.

    With GPUs, the process's own one becomes torch's current device, so that ``cuda`` means that one.

    Where the body fails the group stays as it is, for :func:`end_together`: to leave it in good order takes all.

    Raises:
        ResourceError: the others cannot be reached.
        UsageError: the environment's variables make no sense.
    """
    global _world
    if any(name not in os.environ for name in _VARIABLES):
        yield
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    own, count, local = _environment()
    with_gpus = torch.cuda.is_available()
    # Slurm may show each task its own GPU alone.
    gpu = 0 if torch.cuda.device_count() == 1 else local
    if with_gpus and gpu < torch.cuda.device_count():
        torch.cuda.set_device(gpu)
    backend = "cpu:gloo,cuda:nccl" if with_gpus and distributed.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", timeout=_MEETING))
        distributed.init_process_group(backend, store=store, rank=own, world_size=count, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"The {count} processes of this run cannot reach each other ({error}).",
            hint="Start them with torchrun; GLOO_SOCKET_IFNAME names the network interface.",
        ) from error
    _world = _World(own, count, store, gpu=gpu)
    # All take part, those without a GPU of their own, too.
    has_gpu = with_gpus and gpu < torch.cuda.device_count()
    uuid = str(torch.cuda.get_device_properties(gpu).uuid) if has_gpu else ""
    every = gather((socket.gethostname(), uuid))
    _world.shared_gpu = has_gpu and every.count(every[own]) > 1
    _world.neighbours = sum(host == every[own][0] for host, _ in every)
    yield
    barrier()
    _world = None
    distributed.destroy_process_group()


def end_together(code: int, speak: Callable[[], None]) -> int:
    """Of all processes that fail the first one says why, and all end with its exit code.

    Args:
        code: what this process would end with.
        speak: says why.

    Returns:
        What it shall end with.
    """
    if _world is None:
        speak()
        return code
    store = _world.store
    try:
        if store.add(_FAILED, 1) == 1:
            speak()
            store.set(_CODE, str(code))
            return code
        # Who ends while the first one still speaks would have torchrun cut it short.
        store.wait([_CODE], _LAST_WORDS)
        return int(store.get(_CODE))
    except RuntimeError:
        return code  # who kept the store is gone: it was the first


def ended_early(error: RuntimeError) -> ResourceError | None:
    """What is to be said of an error that came as torch waited for other processes; None for any other.

    A sharded model talks with them in the midst of its own work, of which errors tell of something else.
    """
    if _world is None or type(error).__name__ == "OutOfMemoryError":
        return None
    frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _left_alone() if frames[-1:] == ["torch.distributed.distributed_c10d"] else None


def check_device(device: "torch.device") -> None:
    """Refuse a device that is not this process's own. Raises UsageError, ResourceError."""
    import torch

    if size() == 1 or device.type != "cuda":
        return
    found = torch.cuda.device_count()
    if _world is None or _world.gpu >= found or _world.shared_gpu:
        raise ResourceError(
            f"There are more processes on this machine than its {found} GPUs.",
            hint="Lower --nproc-per-node, or use `device=cpu`.",
        )
    if device.index not in (None, _world.gpu):
        raise UsageError(
            f"`device={device}` would be every process's.", hint="Use `device=cuda`: each process takes its own GPU."
        )


def own(items: S) -> S:
    """This process's share of some samples: every ``size()``-th element or row."""
    return cast(S, items[rank() :: size()])


def rows(indices: "torch.Tensor") -> "torch.Tensor":
    """Where this process holds those of some samples, int64 ``[n]``, that are its own: int64 ``[m]``, in that order."""
    return indices[indices % size() == rank()] // size()


def barrier() -> None:
    """Wait for all."""
    if _world is not None:
        gather(None)


def sum_(*tensors: "torch.Tensor") -> None:
    """Add up tensors over all processes, in place."""
    if _world is None:
        return
    from torch import distributed

    with _talking():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def mean(values: "torch.Tensor") -> "torch.Tensor":
    """Mean of the values of all processes, a scalar; some may have none."""
    if _world is None:
        return values.mean()
    import torch

    sums = torch.stack([values.detach().double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
    sum_(sums)
    return (sums[0] / sums[1]).to(values.dtype)


def total(*numbers: float) -> tuple[float, ...]:
    """Sums of numbers over all processes, in double precision."""
    if _world is None:
        return numbers
    import torch

    sums = torch.tensor(numbers, dtype=torch.float64)
    sum_(sums)
    return tuple(sums.tolist())


def sum_gradients(parameters: Iterable["torch.Tensor"]) -> None:
    """Add up gradients over all processes; one that nobody has stays None."""
    if _world is None:
        return
    import torch

    bucket: list[torch.Tensor] = []
    held = 0
    for parameter in parameters:
        bucket.append(parameter)
        held += parameter.numel()
        if held >= _BUCKET:
            _sum_bucket(bucket)
            bucket, held = [], 0
    _sum_bucket(bucket)


def _sum_bucket(parameters: Sequence["torch.Tensor"]) -> None:
    import torch

    if not parameters:
        return
    # Behind the gradients, how many processes have each: an optimizer treats none otherwise than one of zeros.
    known = parameters[0].new_tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), known])
    sum_(flat)
    sizes = [p.numel() for p in parameters]
    *sums, known = flat.split([*sizes, len(sizes)])
    for parameter, values, anybody in zip(parameters, sums, known.tolist(), strict=True):
        parameter.grad = values.view_as(parameter).to(parameter.dtype) if anybody else None


def sum_of_own(values: "torch.Tensor") -> "torch.Tensor":
    """This process's stretch ``[n]`` of the sum over all processes of vectors ``[n · processes]``."""
    from torch import distributed

    found = values.new_empty(len(values) // size())
    with _talking():
        distributed.reduce_scatter_tensor(found, values)
    return found


def join_own(values: "torch.Tensor", into: "torch.Tensor") -> None:
    """Have a vector ``[n · processes]`` hold the stretches ``[n]`` of all processes, in their order."""
    from torch import distributed

    with _talking():
        distributed.all_gather_into_tensor(into, values)


def gather(value: T) -> list[T]:
    """What every process has, in their order."""
    if _world is None:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * _world.size
    with _talking():
        distributed.all_gather_object(found, value)
    return found


def shared(items: Sequence[Item], work: Callable[[Item], T], device: "torch.device") -> list[T]:
    """What some work makes of items, each by one of the processes; then all hold all of it, in the items' order.

    Tensors in it, in tuples, lists and dictionaries too, come to ``device`` from whichever process made them.
    """
    if size() == 1 or (_world is not None and _world.alone):
        return [work(item) for item in items]
    import torch
    from torch.utils._pytree import tree_map_only

    made = [work(item) for item in items[rank() :: size()]]
    every = gather(tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), made))
    found = [every[index % size()][index // size()] for index in range(len(items))]
    moved: list[T] = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), found)
    return moved


def on_main(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Have the first process do something, while the others wait for what it returns or raises.

    What it does may call for this again, and may not for anything else that takes all processes.
    """
    world = _world
    if world is None or world.size == 1 or world.alone:
        return work(*args, **kwargs)
    if world.rank:
        received = _from_main(None)
        if isinstance(received, _Raised):
            raise received.error
        result: T = received
        return result
    world.alone = True
    try:
        result = work(*args, **kwargs)
    except Exception as error:
        _from_main(_Raised(error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")))
        raise
    finally:
        world.alone = False
    _from_main(result)
    return result


def check_agreement(tensors: Iterable["torch.Tensor"], what: str) -> None:
    """Compare a checksum of tensors that all processes should hold alike. Raises NumericsError naming ``what``."""
    if _world is None:
        return
    sums = [tensor.detach().double().sum().item() for tensor in tensors]
    # As bytes: what is not a number is equal to nothing, itself included.
    found = gather(pickle.dumps(sums))
    if any(other != found[0] for other in found):
        raise NumericsError(
            f"The processes of this run do not agree about {what} any more.",
            hint="They must run on devices of one kind, with the same versions of everything.",
        )


@dataclass(frozen=True)
class _Raised:
    """What the first process raised instead of returning."""

    error: Exception


def of_main(value: T) -> T:
    """What the first process has, on all of them; tensors should be the host's."""
    return value if _world is None or _world.alone else _from_main(value)


def _from_main(value: Any) -> Any:
    from torch import distributed

    box = [value]
    with _talking():
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def _travels(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except (TypeError, AttributeError, pickle.PickleError):
        return False


@contextmanager
def _talking() -> Iterator[None]:
    """While this process waits for the others."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise _left_alone() from error


def _left_alone() -> ResourceError:
    return ResourceError(
        "Another process of this run ended early.", hint="torchrun's summary names it and its exit code."
    )


def _environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as the environment has them."""
    if any(name not in os.environ for name in _VARIABLES):
        return 0, 1, 0
    try:
        own_rank, count, local = (int(os.environ[name]) for name in _VARIABLES[:3])
    except ValueError:
        own_rank, count, local = 0, 0, 0
    if not 0 <= own_rank < count:
        raise UsageError(
            "RANK, WORLD_SIZE and LOCAL_RANK in the environment make no sense together.",
            hint="Start several processes with torchrun, or unset them.",
        )
    return own_rank, count, local
