"""Triton's kernels compiled for GPUs that are not here: next to nothing spills, and shared memory is what they have."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


LOOP = 1200
"""Instructions for 64 columns of four outputs of 3 bits and one row of bfloat16 on an H100: 4.2 a weight. With codes
freed of what lies in front of them in a mantissa, and activations loaded one by one, they are 5.8."""


def check(asked: dict[int, list[str]]) -> list[dict[str, Any]]:
    """What the cases that are asked for take, by capability of the GPU; fails the test where that is too much."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead", json.dumps(asked)],
        capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    for capability, names in asked.items():
        assert sum(row["capability"] == capability for row in rows) >= len(names)
    bad = [
        row
        for row in rows
        if row["shared"] > SHARED[row["capability"]]
        or row["stack"] > next((most for name, most in KNOWN.items() if name in row["kernel"]), SPILLED)
    ]
    assert not bad, json.dumps(bad, indent=1)
    return rows


def test_some_of_them() -> None:
    rows = check(QUICK)
    vectors = [
        row
        for row in rows
        if row["capability"] == 90 and "vector_kernel" in row["kernel"] and "ROWS=1," in row["kernel"]
    ]
    assert [row["loop"] <= LOOP for row in vectors] == [True], vectors


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", SHARED)
def test_all_of_them(capability: int) -> None:
    check({capability: [*CASES]})
