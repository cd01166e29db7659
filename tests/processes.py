"""Work in processes of their own, which are children of this one: they have all libraries imported."""

import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch

from tests.told import Told
from ulbq.commands.app import main

SECONDS = 300

Work = Callable[[], int]


def shell(line: str, folder: Path) -> Told:
    """Run ``ulbq`` commands and the pipes between them in a folder, as a shell with ``pipefail``."""
    words = shlex.split(line)
    return run([ulbq(*part) for pipe, part in groupby(words, "|".__eq__) if not pipe], folder)


def ulbq(name: str, *words: str) -> Work:
    """The work of one command."""
    if name != "ulbq":
        raise ValueError(f"{name} is no ulbq")
    return partial(main, words)


def run(works: Sequence[Work], folder: Path) -> Told:
    """Run works side by side, each one's standard output the next one's input; returns what came of all."""
    with TemporaryFile() as out, TemporaryFile() as err:
        started, source = [], os.open(os.devnull, os.O_RDONLY)
        for work in works:
            following, end = os.pipe() if work is not works[-1] else (-1, os.dup(out.fileno()))
            started.append(start(work, folder, (source, end, err.fileno())))
            os.close(source)
            os.close(end)
            source = following
        codes = [wait(process) for process in started]
        return Told(next((code for code in reversed(codes) if code), 0), _read(out), _read(err))


def start(work: Work, folder: Path, streams: tuple[int, int, int]) -> int:
    """Start one work with these standard streams; returns the process."""
    if process := os.fork():
        return process
    code = 70
    try:
        torch.set_num_threads(torch.get_num_threads())  # else threads of the child race to make torch's pool anew
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # ends of pipes, above all
        sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
        for handler in [reference() for reference in logging._handlerList]:
            if "stream" in vars(handler):
                handler.stream = sys.stderr  # theirs are closed, and their numbers other files' soon
        os.chdir(folder)
        code = work()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a process, less than 0 for a signal; one that nobody waits for any more is killed."""
    try:
        for _ in range(10 * SECONDS):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        raise TimeoutError(f"A process was not through after {SECONDS} s.")
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise


def _read(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode()
