"""Commands and methods on a pretended GPU (:mod:`tests.pretended`): nothing mixes devices, no step waits for one.

It needs a C++ compiler and the headers that torch brings. Each group of cases is a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretended.cases import CASES, GROUPS
from ulbq.kernels.build import find_compiler

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]

# What the steps of a training may wait for, all cases with four samples and two steps.
AT_MOST = {
    "training/block.py:_attempt": 7,  # whether all losses were finite, once a training: of a block, or of each layer
    "finetuning/trainer.py:_step": 2,  # loss and norm of the gradients, once a step
    "finetuning/teacher.py:run": 4,  # transformers looks for packed sequences in each pass, of student and teacher
}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that lets torch say "cuda"."""
    made = tmp_path_factory.mktemp("guard") / "guard.so"
    compiler, source = find_compiler(), ROOT / "tests/pretended/guard.cpp"
    libraries = f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"
    flags = "-O0", "-w", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}"
    subprocess.run([str(compiler), *flags, str(source), "-o", str(made), *libraries], check=True, timeout=300)
    return made


def told(guard: Path, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """What a process says of these cases."""
    result = folder / "told.json"
    work = folder / "work"
    work.mkdir()
    subprocess.run(
        [sys.executable, "-m", "tests.pretended.cases", str(guard), str(result), *names],
        check=True, cwd=work, timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = json.loads(result.read_text("utf-8"))
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_mixes_devices_and_no_step_waits(group: str, guard: Path, tmp_path: Path) -> None:
    found = told(guard, tmp_path, GROUPS[group])
    failed = {name: case["said"][-1500:] for name, case in found.items() if case["code"]}
    assert not failed, "\n\n".join(f"{name}: {said}" for name, said in failed.items())
    # Blocks travel as they are stored, and are widened on the device.
    sent = [what for what in found["rtn"]["sent"] if what.startswith("models/blocks.py:_sent")]
    assert sent == ["models/blocks.py:_sent bfloat16"]
    # So do activations, from pinned memory.
    moved = {what for case in found.values() for what in case["sent"]}
    assert "blockwise/activations.py:get float32" in moved
    assert not [what for what in moved if what.startswith("training/objective.py")]
    waited = {name: case["steps"] for name, case in found.items()}
    assert all(count <= AT_MOST.get(where, 0) for steps in waited.values() for where, count in steps.items()), waited


def test_every_case_is_in_a_group() -> None:
    assert {name for names in GROUPS.values() for name in names} == {*CASES}
