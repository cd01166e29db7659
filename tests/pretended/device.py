"""A GPU that is pretended: ``cuda:0`` played by the CPU. It refuses what a GPU refuses, and counts what one waits for.

A tensor on it (:class:`Far`) says ``cuda:0`` and holds its values on the CPU. Operators that get tensors of both
devices fail as they do on a GPU. What makes the host wait is counted by our line that asked for it: ``item``,
``tolist``, ``bool``, ``nonzero``, a mask as an index, and each copy to the host. It says nothing about CUDA's numerics,
memory or speed. Triton's kernels run in its interpreter where
:func:`interpret_kernels` says so, else not at all.

It changes torch for good, so it lives in a process of its own: ``load`` a guard, then import this.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.models import recorded
from ulbq.nn.quant_linear import QuantLinear

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MEMORY = 8 << 30
"""Bytes of the device, all of them free."""

WAITS: Counter[str] = Counter()
"""How often the host waited, by our ``file:function``."""
STEPS: Counter[str] = Counter()
"""The same within the steps of a training, what is measured between them left out, and within recorded steps.

What is sent to the device counts in recorded steps too: from memory that is not pinned, no graph takes it.
"""

SENT: set[str] = set()
"""What was sent to the device: our ``file:function``, and the dtype."""

_RECORDED = "models/graph_decoding.py:_run"
_STEPS = {"finetuning/trainer.py:_step", "training/block.py:_attempt", _RECORDED}
_BETWEEN = {"training/objective.py:validation_loss", "training/objective.py:validation_output"}

_ROOT = Path(__file__).resolve().parents[2] / "ulbq"
_COPIES = {"aten::copy_", "aten::_to_copy"}
_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
_tensor = torch.tensor


class MixedError(RuntimeError):
    """An operator got tensors of both devices."""


class Far(torch.Tensor):
    """A tensor on the pretended device; ``near`` holds its values."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "Far":
        made: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            layout=near.layout, device=CUDA,
        )  # fmt: skip
        made.near = near
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func is torch.Tensor.data_ptr:
            return args[0].near.data_ptr()
        if func is torch.Tensor.numpy and (kwargs.get("force") or args[1:2] == (True,)):
            return args[0].detach().cpu().numpy()
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], **{"device": args[0].device, "dtype": args[0].dtype, **kwargs})
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _listless(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _listless(index: Any) -> Any:
    """An index whose lists are tensors, as torch makes them itself before it asks any subclass."""
    if isinstance(index, tuple):
        return tuple(_listless(part) for part in index)
    return _tensor(index) if isinstance(index, list) else index


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator on the values; its results are far where its tensors are, or where its device says so."""
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else CUDA if far else CPU
    if not far and device.type != "cuda":
        return func(*args, **kwargs)
    name = func._schema.name
    near = [tensor for tensor in tensors if not isinstance(tensor, Far)]
    _check(name, args, near)
    _count(name, args, far, device)
    if device.type == "meta":
        return func(*_changed(args, lambda each: each.near.to("meta") if isinstance(each, Far) else each), **kwargs)
    values, options = _changed(args, _near), _changed(kwargs, _near)
    if asked is not None:
        options["device"] = CPU
    options.pop("pin_memory", None)
    result = func(*values, **options)
    if name == "aten::copy_":
        return args[0]
    if device.type != "cuda":
        return result
    given = {id(each.near): each for each in far}
    return _changed(result, lambda each: given[id(each)] if id(each) in given else Far(each))


def _near(tensor: torch.Tensor) -> torch.Tensor:
    """The values."""
    return tensor.near if isinstance(tensor, Far) else tensor


def _tensors(values: tuple[Any, ...] | list[Any]) -> Iterator[torch.Tensor]:
    """All tensors among what an operator gets. Torch's own walk, which knows more containers, is ten times slower."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([_changed(each, change) for each in value])
    return {name: _changed(each, change) for name, each in value.items()} if isinstance(value, dict) else value


def _check(name: str, args: tuple[Any, ...], near: list[torch.Tensor]) -> None:
    """Refuse what CUDA refuses: tensors of both devices, but for copies, numbers, and indices on the CPU."""
    if name in _COPIES or not near:
        return
    if name in _INDEXED:
        near = [each for each in (args[0], *args[2:3]) if isinstance(each, torch.Tensor) and not isinstance(each, Far)]
    if bad := [list(each.shape) for each in near if each.ndim]:
        raise MixedError(f"{name} mixes devices: {bad} on the CPU, at {' < '.join(_lines()[:6])}")


def _count(name: str, args: tuple[Any, ...], far: list[Far], device: torch.device) -> None:
    if name in _COPIES and device.type == "cuda" and not isinstance(args[name == "aten::copy_"], Far):
        lines = _lines()
        SENT.add(f"{lines[0]} {str(args[name == 'aten::copy_'].dtype).removeprefix('torch.')}")
        if _RECORDED in lines:
            STEPS[lines[0]] += 1
    masks = name in _INDEXED and any(one is not None and one.dtype == torch.bool for one in args[1])
    home = name == "aten::_to_copy" and device.type == "cpu"
    home = home or (name == "aten::copy_" and not isinstance(args[0], Far))
    if far and (name in _READS or masks or home):
        lines = _lines()
        WAITS[lines[0]] += 1
        if _STEPS & {*lines} and not _BETWEEN & {*lines}:
            STEPS[lines[0]] += 1


def _lines() -> list[str]:
    """Our functions that are at work, the innermost first."""
    found, frame = [], sys._getframe(1)
    while frame:
        if name := _own(frame.f_code.co_filename):
            found.append(f"{name}:{frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return found or ["?"]


@cache
def _own(file: str) -> str:
    """A file's path in our library; empty for others."""
    path = Path(file)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else ""


def _made(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **_: Any) -> torch.Tensor:
    """``torch.tensor``, which copies to the device below every subclass."""
    made = _tensor(data, dtype=dtype)
    made = made if device is None else made.to(device)
    return made.requires_grad_() if requires_grad else made


def pretend() -> None:
    """From now on this process has a GPU."""
    torch.tensor = _made  # type: ignore[assignment]
    # Inference mode takes operators apart below the subclasses.
    torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.amp.autocast_mode.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    facts = SimpleNamespace(
        name="pretended", total_memory=MEMORY, multi_processor_count=4, major=9, minor=0, gcnArchName="",
    )  # fmt: skip
    answers = {
        "_lazy_init": None, "empty_cache": None, "synchronize": None, "set_rng_state": None,
        "is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "is_current_stream_capturing": False, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_device_capability": (9, 0), "get_device_name": "pretended", "get_device_properties": facts,
        "mem_get_info": (MEMORY, MEMORY), "max_memory_allocated": 0, "memory_allocated": 0,
        "reset_peak_memory_stats": None, "get_rng_state": torch.zeros(1, dtype=torch.uint8),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_autocast_gpu_dtype = lambda: torch.bfloat16  # type: ignore[attr-defined]
    # Now that it finds what takes the place of inference mode.
    from ulbq.models import graph_decoding

    graph_decoding.record = recorded.record  # type: ignore[assignment]
    # A tensor is of one subclass.
    QuantLinear.weight = property(lambda layer: layer.weight_dense(layer.dtype))  # type: ignore[assignment, method-assign]
    _Pretending().__enter__()


def set_memory(size: int) -> None:
    """Say that the device has so many bytes, all of them free."""
    torch.cuda.mem_get_info = lambda *_, **__: (size, size)  # type: ignore[assignment]


def interpret_kernels(wanted: bool) -> None:
    """Whether products are Triton's, in its interpreter, on the values; else torch's."""
    from triton.runtime.interpreter import GridExecutor

    from ulbq.kernels import trellis_launch, triton_launch

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = _changed(args, _near), _changed(kwargs, _near)
        with _disable_current_modes():
            _plain_start()(self, *args, **kwargs)

    _plain_start()
    reason = None if wanted else "a pretended GPU runs no kernels"
    for launch in (triton_launch, trellis_launch):
        launch.unavailable_reason = lambda: reason  # type: ignore[attr-defined]
    GridExecutor.__call__ = start


@cache
def _plain_start() -> Any:
    from triton.runtime.interpreter import GridExecutor

    return GridExecutor.__call__
