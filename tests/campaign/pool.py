"""Zygotes, as many as there are cores, and trials handed to whichever is free."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SHIM = Path(__file__).with_name("calls.c")
_NAMESPACES = (
    ("unshare", "--mount"),
    ("unshare", "--user", "--map-root-user", "--mount"),
)


class BrokenError(AssertionError):
    """A trial that found a fault, or could not be done."""


class Pool:
    """Processes that trials are forked from.

    Args:
        folder: for what they need themselves; each trial is done in a folder of its zygote.
        size: how many; None for the cores of this machine.

    Attributes:
        mounts: whether trials can mount small disks.
    """

    def __init__(self, folder: Path, size: int | None = None) -> None:
        shim = folder / "calls.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", shim, _SHIM, "-ldl"], check=True)
        namespace = next((words for words in _NAMESPACES if _can_mount(words, folder)), ())
        self.mounts = bool(namespace)
        self._free: Queue[tuple[subprocess.Popen[str], Path]] = Queue()
        self._all = []
        for number in range(size or len(os.sched_getaffinity(0))):
            own = folder / f"zygote-{number}"
            own.mkdir()
            self._all.append((_start(namespace, shim, own), own))
        for process, own in self._all:
            threads = _answer(process)
            if threads != 1:
                raise BrokenError(f"a zygote has {threads} threads, and forks of it would lack all but one")
            self._free.put((process, own))

    def ask(self, scenario: str, **arguments: Any) -> Any:
        """Do one trial: ``module:function`` of :mod:`tests.campaign`, with a ``folder`` that is the zygote's own."""
        process, own = self._free.get()
        try:
            asked = {"scenario": f"tests.campaign.{scenario}", "arguments": {"folder": str(own), **arguments}}
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return _answer(process)
        finally:
            self._free.put((process, own))

    def each(self, scenario: str, trials: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Do many, as many at once as there are zygotes; a failing one gives its error instead of a result."""
        given = list(trials)

        def one(arguments: Mapping[str, Any]) -> Any:
            try:
                return self.ask(scenario, **arguments)
            except BrokenError as error:
                return error

        with ThreadPoolExecutor(len(self._all)) as threads:
            yield from zip(given, threads.map(one, given), strict=True)

    def close(self) -> None:
        """End them all."""
        for process, own in self._all:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            shutil.rmtree(own, ignore_errors=True)


def _start(namespace: tuple[str, ...], shim: Path, own: Path) -> subprocess.Popen[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("ULBQ_", "HF_", "XDG_"))}
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "TRITON_INTERPRET"):
        plain.pop(variable, None)
    known = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    known |= {"HF_HOME": str(own / "hub"), "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)}
    # Kernels are compiled once, and kept where they always are.
    kept = os.environ.get("XDG_CACHE_HOME")
    return subprocess.Popen(
        [*namespace, sys.executable, "-m", "tests.campaign.zygote"],
        cwd=ROOT,
        env=plain | known | ({"XDG_CACHE_HOME": kept} if kept else {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BrokenError(f"the zygote ended with {process.wait()}")
    answer = json.loads(line)
    if "failure" in answer:
        raise BrokenError(answer["failure"])
    return answer["result"]


def _can_mount(namespace: tuple[str, ...], folder: Path) -> bool:
    place = folder / "mount"
    place.mkdir(exist_ok=True)
    words = [*namespace, "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
