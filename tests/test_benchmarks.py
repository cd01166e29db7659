"""The benchmarks open: what they import is there, and no file of theirs hides a package of the same name."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_is_imported():
    # As `python benchmarks/X.py` does, with the folder first: a file `kernels.py` was once taken for the Hub's package.
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from transformers import LlamaConfig\n"
    code += "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(names) > 10
    assert done.returncode == 0, done.stderr
