"""Triton's kernels compiled for GPUs that are not here: next to nothing spills, and shared memory is what they have."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.ahead import CASES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

# Bytes of shared memory that a program can have: A100; RTX 3090 and A6000; RTX 4090 and L40S; H100 and H200; B200;
# RTX 5090 (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
SPILLED = 64
"""Bytes of stack a thread, of some thousand instructions."""
KNOWN = {"STATE_BITS=16, LENGTH": 512}
"""What may spill more: of the search over 16-bit states, whose 64 costs and as many values a thread do not fit."""
QUICK = {
    86: ["affine 2 float32", "transforms"],
    90: ["affine 3 bfloat16"],
    120: ["solvers"],
}


def check(capability: int, names: list[str]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead", str(capability), *names],
        capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert len(rows) >= len(names)
    bad = [
        row
        for row in rows
        if row["shared"] > SHARED[capability]
        or row["stack"] > next((most for name, most in KNOWN.items() if name in row["kernel"]), SPILLED)
    ]
    assert not bad, json.dumps(bad, indent=1)


@pytest.mark.parametrize("capability", QUICK)
def test_some_of_them(capability: int) -> None:
    check(capability, QUICK[capability])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", SHARED)
def test_all_of_them(capability: int) -> None:
    check(capability, [*CASES])
