"""One command as a process of its own, forked from one that has imported everything, with a fault if wanted."""

import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

OFF, COUNT, KILL, TEAR, FAIL, FULL, STOP = range(7)
"""As in ``calls.c``."""

_ADDRESSES = 6 << 30
_PAGE = resource.getpagesize()


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the calls that change files below a folder.

    Attributes:
        mode: what is done.
        at: number of the call, from 0 on.
        error: errno of a call that fails.
    """

    mode: int
    at: int = -1
    error: int = 0


@dataclass(frozen=True)
class Told:
    """What a command did.

    Attributes:
        code: exit code; minus the signal's number where one ended it.
        out: standard output.
        err: standard error.
        seconds: processor time; wall time says more of what else the machine does.
        memory: most bytes that it held.
        calls: kind and path, relative to the folder, of the calls that changed files there; where they were counted,
            or the command was stopped at them.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory: int
    calls: tuple[tuple[str, str], ...] = ()

    @property
    def timed_out(self) -> bool:
        return self.code == -signal.SIGALRM


def command(
    words: Sequence[object],
    folder: Path,
    fault: Fault | None = None,
    *,
    seconds: float = 60,
    given: bytes = b"",
    output: str | None = None,
    working: Path | None = None,
    stopped: Callable[[], None] | None = None,
) -> Told:
    """Run one command to its end.

    Args:
        words: after ``ulbq``.
        folder: where calls are counted and go wrong; streams are kept beside it.
        fault: what goes wrong; None for nothing.
        seconds: after which the command is ended by SIGALRM.
        given: standard input.
        output: a file to have as standard output instead.
        working: working folder; None for ``folder``.
        stopped: called before each call that changes files, the command standing still; for a fault of ``STOP``.
    """
    streams = {name: folder.with_name(f"{folder.name}.{name}") for name in ("in", "out", "err", "calls")}
    streams["in"].write_bytes(given)
    streams["calls"].unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _live([str(word) for word in words], folder, fault, seconds, streams, output, working or folder)
    _, status, usage = os.wait4(child, os.WUNTRACED)
    while os.WIFSTOPPED(status):
        if stopped is not None:
            stopped()
        os.kill(child, signal.SIGCONT)
        _, status, usage = os.wait4(child, os.WUNTRACED)
    shown = {
        name: streams[name].read_bytes().decode("utf-8", "replace") if streams[name].exists() else ""
        for name in ("out", "err", "calls")
    }
    for stream in streams.values():
        stream.unlink(missing_ok=True)
    calls = tuple((kind, path) for kind, _, path in (line.partition(" ") for line in shown["calls"].splitlines()))
    taken, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Told(os.waitstatus_to_exitcode(status), shown["out"], shown["err"], taken, memory, calls)


def _live(
    words: list[str],
    folder: Path,
    fault: Fault | None,
    seconds: float,
    streams: dict[str, Path],
    output: str | None,
    working: Path,
) -> None:
    """The child's whole life."""
    code = 1
    try:
        writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        log = os.open(streams["calls"], writing, 0o600) if fault and fault.mode in (COUNT, STOP) else -1
        opened = (
            os.open(streams["in"], os.O_RDONLY),
            os.open(output or streams["out"], writing, 0o600),
            os.open(streams["err"], writing, 0o600),
        )
        for number, descriptor in enumerate(opened):
            os.dup2(descriptor, number)
            os.close(descriptor)
        # fdopen, for these live as long as the process.
        sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
        os.chdir(working)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
        resource.setrlimit(resource.RLIMIT_AS, (size + _ADDRESSES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from ulbq.commands.start import main

        if fault is not None:
            library = ctypes.CDLL(None)
            library.campaign_arm(fault.mode, ctypes.c_long(fault.at), fault.error, os.fsencode(folder), log)
        code = main(words)
        try:
            sys.stdout.flush()
        except OSError:
            code = code or 120  # as Python ends
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
