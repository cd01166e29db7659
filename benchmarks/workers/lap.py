"""How a worker and ``block_time.py`` talk: a worker waits before each block until it is its turn."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


class Done(Exception):
    """Every block that was asked for is done."""


class Laps:
    """Blocks under the clock. Takes the standard output for itself; what others print goes to standard error.

    Attributes:
        task: what ``block_time.py`` wrote into the file that the worker is called with.
    """

    def __init__(self) -> None:
        self.task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._block = -1
        self._imports = _peak()
        self._begun = (0.0, 0.0)
        self._parts: dict[str, float] = {}

    def start(self, block: int) -> None:
        """Wait for the turn, then start the clock. Raises Done where no block is left."""
        if block >= self.task["blocks"]:
            raise Done
        self._send({"ready": block})
        sys.stdin.readline()
        self._block, self._parts = block, {}
        self._begun = (time.perf_counter(), time.process_time())

    def add(self, part: str, seconds: float) -> None:
        """Note the wall time of a part of the block."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def finish(self, steps: int) -> None:
        """Stop the clock and report; nothing where it does not run."""
        if self._block < 0:
            return
        wall, cpu = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        memory = {"imports_mb": self._imports, "peak_mb": _peak()}
        if torch.cuda.is_initialized():
            memory["device_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        self._send({"block": self._block, "wall": wall, "cpu": cpu, "steps": steps, "parts": self._parts, **memory})
        self._block = -1

    def _send(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def _peak() -> float:
    """Largest resident memory so far, in MB (10^6 bytes). What getrusage says includes the parent's before the exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3 * 1.024, 1
    )
