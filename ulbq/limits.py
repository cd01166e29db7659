"""How much of this machine a file may ask for: sizes, depths and counts, time and memory, all in this one place.

Files come from strangers. What is read whole has a largest size; what a file lets us compute (a template, a pattern, a
normalizer) has a share of processor time and memory. Far above what any published model needs, and low enough that
every command says no within ten seconds and a gigabyte.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ulbq.errors import InputError

MIB = 1 << 20

MANIFEST_SIZE = 32 * MIB
CONFIG_SIZE = 8 * MIB
INDEX_SIZE = 32 * MIB
SETTINGS_SIZE = 16 * MIB
"""Of JSON files and templates beside a model's weights, but the tokenizer's vocabulary."""
TOKENIZER_SIZE = 256 * MIB
CARD_SIZE = 4 * MIB
CARD_HEAD_SIZE = 128 << 10
RECIPE_SIZE = 64 << 10

JSON_DEPTH = 64
YAML_DEPTH = 32
YAML_NODES = 20_000
"""Of a document with its aliases written out."""
YAML_SCALAR = 20_000
"""Characters of one value."""

LAYERS = 1024
EXPERTS = 8192
WIDTH = 1 << 20
VOCABULARY = 1 << 26
PARENTS = 1000
ANCESTORS = 1000
COUNT = 1 << 62
"""Of bits, bytes, weights and steps."""

LONGEST = 1e12
"""Seconds that anything took."""

OPTION = 1e9
"""Of learning rates and other factors; optimizers compute with their squares, in float32."""

TOKENS_PER_BYTE = 16
"""That a tokenizer may make of plain text."""

SECONDS = 5.0
"""Of processor time for what a file lets us compute."""
MEMORY = 768 * MIB
"""Beyond what the process holds already."""

_CHECK = 0.05  # seconds of processor time between two looks at the memory


class _TooMuchError(BaseException):
    """Ends work that is beyond its bounds; no ``except Exception`` on the way may take it for its own."""


@contextlib.contextmanager
def bounded(what: str, *, hint: str = "", seconds: float | None = None, address_space: bool = False) -> Iterator[None]:
    """Bound what a file lets us compute in this process; without effect outside the main thread.

    Args:
        what: names the work as the subject of a sentence.
        hint: what to do about it.
        seconds: of processor time; None for :data:`SECONDS`.
        address_space: refuse the memory beforehand as well, instead of noticing it afterwards. Not for work that
            reserves memory which it never touches, as torch does.

    Raises:
        InputError: it took longer, or more memory than :data:`MEMORY`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = SECONDS if seconds is None else seconds
    start, before, left = time.process_time(), _resident(), False

    def look(number: int, frame: FrameType | None) -> None:
        # Nothing may be raised while the bounds are being taken down.
        if left:
            return
        if time.process_time() - start > seconds:
            raise _TooMuchError("time")
        if _resident() - before > MEMORY:
            raise _TooMuchError("memory")

    def ignore(unraisable: Any) -> None:
        # What ends the work may come while some object is taken down, which no exception leaves: the next look ends it.
        nonlocal left
        was, left = left, True
        try:
            if not isinstance(unraisable.exc_value, _TooMuchError | RecursionError | MemoryError):
                hook(unraisable)
        finally:
            left = was

    former = signal.signal(signal.SIGPROF, look)
    hook, sys.unraisablehook = sys.unraisablehook, ignore
    signal.setitimer(signal.ITIMER_PROF, _CHECK, _CHECK)
    try:
        with _address_space() if address_space else contextlib.nullcontext(True) as ours:
            try:
                yield
            except MemoryError as error:
                if not ours:
                    raise
                raise _beyond(what, "memory", hint) from error
    except _TooMuchError as error:
        raise _beyond(what, str(error), hint) from None
    finally:
        left = True
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
        sys.unraisablehook = hook


def apart(work: Callable[[], Any], what: str, *, hint: str = "", seconds: float | None = None) -> Any:
    """Do work in a process of its own, which may crash, loop or ask for all memory; returns what JSON can say of it.

    For what no exception ends: code in other languages. The child says nothing on any stream.

    Raises:
        InputError: it crashed or went beyond its bounds.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work_and_leave(work, reading, writing, SECONDS if seconds is None else seconds)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return json.loads(told)
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        raise _beyond(what, "time", hint)
    raise InputError(f"{what} cannot be read: the library that reads it fails.", hint=hint)


def _work_and_leave(work: Callable[[], Any], reading: int, writing: int, seconds: float) -> None:
    """The child's whole life; ends the process whatever happens."""
    status = 1
    try:
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nowhere, number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        whole = -(-int(seconds * 100) // 100)
        resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if size := _virtual():
            _limit_address_space(size + MEMORY)
        with open(writing, "wb") as pipe:
            pipe.write(json.dumps(work()).encode())
        status = 0
    finally:
        _leave(status)


# The child must not run what its parent's interpreter does at its end; by another name, for this ends no command.
_leave = os._exit


def _beyond(what: str, which: str, hint: str) -> InputError:
    share = f"{SECONDS:g} s" if which == "time" else f"{MEMORY // MIB} MiB of memory"
    return InputError(f"{what} takes more than {share}.", hint=hint)


@contextlib.contextmanager
def _address_space() -> Iterator[bool]:
    """Limit what this process may map beyond what it has; gives whether the limit is ours and not one from outside."""
    former = resource.getrlimit(resource.RLIMIT_AS)
    size = _virtual()
    ours = bool(size) and _limit_address_space(size + MEMORY)
    try:
        yield ours
    finally:
        if ours:
            resource.setrlimit(resource.RLIMIT_AS, former)


def _limit_address_space(size: int) -> bool:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft <= size:
        return False
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    return True


def _virtual() -> int:
    """Bytes that this process has mapped; 0 where the system does not say."""
    return _pages(0)


def _resident() -> int:
    """Bytes that this process holds in memory; 0 where the system does not say."""
    return _pages(1)


def _pages(column: int) -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[column]) * resource.getpagesize()
    except OSError:
        return 0
