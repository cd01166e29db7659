"""Kernels for several matrices compiled for GPUs that are not here: they compile, and spill next to nothing."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed"),
]

POINTERS = {
    "table": "*i64", "jobs": "*i64", "places": "*i64", "words": "*i32", "scales": "*fp16", "zeros": "*u8", "x": "*bf16",
    "partial": "*fp32", "result": "*bf16",
}  # fmt: skip
NO_ZEROS = {"zeros": None}
SPILLED = 64
"""Bytes a thread, of some thousand instructions."""
# A kernel of each kind as the default block sizes start it: what is compiled in, types that differ, warps and stages.
CASES: list[tuple[str, str, dict[str, Any], dict[str, str], tuple[int, int]]] = [
    (module, kernel, constants | more, types, start)
    for module, constants, types in (
        ("triton_kernels", {"CENTRE": 0.0, "BITS": 3, "PARTS": 1, "HAS_ZEROS": True, "SPAN": 64}, {}),
        ("triton_kernels", {"CENTRE": 0.0, "BITS": 1, "PARTS": 2, "HAS_ZEROS": False, "SPAN": 64} | NO_ZEROS, {}),
        (
            "triton_trellis",
            {"MULTIPLIER": 0xD0DBC74D, "SCALE": 0.00676727294921875, "SHIFT": -10.3828125, "BITS": 2, "STATE_BITS": 12},
            {},
        ),
    )
    for kernel, more, start in (
        (
            ("vectors_each_kernel", {"EVEN": True, "ROWS": 1, "BLOCK_N": 512}, (4, 2)),
            ("matrix_each_kernel", {"BLOCK_M": 16, "BLOCK_N": 64}, (4, 4)),
            ("matrix_each_kernel", {"BLOCK_M": 64, "BLOCK_N": 128}, (8, 3)),
        )
        if module == "triton_kernels"
        else (
            ("vectors_each_kernel", {"ROWS": 1, "TILES": 8}, (4, 2)),
            ("matrix_each_kernel", {"DEEP": 4, "BLOCK_M": 16, "TILES": 4}, (4, 4)),
            ("matrix_each_kernel", {"DEEP": 4, "BLOCK_M": 64, "TILES": 8}, (8, 3)),
        )
    )
]


def compile_all(capability: int) -> None:
    """In a process whose Triton compiles: print registers and stack of every case, as cuobjdump tells them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for module, name, constants, types, (warps, stages) in CASES:
        kernel = getattr(importlib.import_module(f"ulbq.kernels.{module}"), name)
        known = dict.fromkeys(kernel.arg_names, "i32") | POINTERS | types
        signature = {name: "constexpr" if name in constants else known[name] for name in kernel.arg_names}
        even = [at for at, kind in enumerate(signature.values()) if kind.startswith("*")]
        even += [at for at, one in enumerate(signature) if one in ("columns", "outs", "group")]
        source = ASTSource(kernel, signature, constants, {(at,): [["tt.divisibility", 16]] for at in even})
        made = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            told = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        print(module, name, re.findall(r"(?:REG|STACK):\d+", told.stdout + told.stderr))


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_they_compile_and_spill_next_to_nothing(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = f"from tests.kernels.test_word_banks_ahead import compile_all; compile_all({capability})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES)
    stacks = [int(found) for line in lines for found in re.findall(r"STACK:(\d+)", line)]
    assert len(stacks) == len(CASES)
    assert max(stacks) <= SPILLED, done.stdout
