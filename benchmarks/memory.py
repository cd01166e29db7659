"""What end-to-end training of a packed model holds in memory, against full fine-tuning; measured, and as a formula.

    python benchmarks/memory.py ARTIFACT [--length 512] [--results benchmarks/results/memory-cpu.json]

ARTIFACT is an ``affine`` artifact of the default model, from which ``ulbq quantize`` goes on without training blocks.
Each row is the largest resident memory of a process of its own, on the CPU: two optimizer steps of one sample each.
``beyond_imports_mb`` leaves out what Python and its imports take. The end-to-end row tells its parts too: the peak of
the blocks' phase, what is held before the end-to-end phase, the peak while the student is built, what is held once it
stands, and the peak of the training. Fine-tuning checkpoints its blocks as that training does. MB and GB are 10^6 and
10^9 bytes. Linux with glibc only.

The formula adds up what the phase holds at its peak, part by part; the check compares the training's peak less what
was held before the phase. ``predictions`` are its figures for Llama 2. They
leave out Python, and stand next to the 34 GB that the EfficientQAT paper reports for 70B at w2g64.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import ulbq.pipeline.end_to_end
import ulbq.pipeline.quantize
from ulbq.artifacts import QuantizedManifest, read_manifest
from ulbq.commands.app import main as command
from ulbq.finetuning.head import LOGITS_MEMORY
from ulbq.models.load import load_model
from ulbq.models.source import default_model
from ulbq.runtime import versions

PAPER_70B = 34.0


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model that looks like Llama."""

    hidden: int
    intermediate: int
    blocks: int
    vocabulary: int
    keys: int
    tied: bool = False

    @property
    def block(self) -> int:
        """Linear weights of a block; ``keys`` is the width of its keys and of its values."""
        return 2 * self.hidden**2 + 2 * self.hidden * self.keys + 3 * self.hidden * self.intermediate

    @property
    def outer(self) -> int:
        """Weights beside the blocks."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden


SMOLLM2 = Shape(576, 1536, 30, 49152, 192, tied=True)
LLAMA2 = {
    "7B": Shape(4096, 11008, 32, 32000, 4096),
    "13B": Shape(5120, 13824, 40, 32000, 5120),
    "70B": Shape(8192, 28672, 80, 32000, 1024),
}

# Bytes, as the phase works today.
SCALE = 2 + 4 + 4 + 2 * 4  # where it started, its factor, the factor's gradient and two moments
OUTER = 2  # embeddings and head, as stored
CHECKPOINT = 4  # a block's inputs
WEIGHT = 2  # of one block, in the precision of the products, until its gradients are there
UNPACKED = 1 + 4 + 2 + 4  # of the largest layer: codes, levels, and the weight's gradient as it came and as float32
HIDDEN = 44  # of one block, a token and hidden unit: what autograd keeps of norms, attention and residuals
INTERMEDIATE = 12  # of one block, a token and unit of the feed-forward layer: both inputs, their product, gradients


def formula(shape: Shape, tokens: int, *, bits: int = 2, group_size: int = 64) -> dict[str, float]:
    """Bytes by part.

    Args:
        shape: of the model.
        tokens: that run at once.
        bits: of a code.
        group_size: weights that share a scale.
    """
    linear = shape.block * shape.blocks
    return {
        "codes": linear * bits / 8,
        "zeros": linear / group_size * bits / 8,
        "scales": linear / group_size * SCALE,
        "embeddings and head": shape.outer * OUTER,
        "blocks' inputs": shape.blocks * tokens * shape.hidden * CHECKPOINT,
        "one block's weights": shape.block * WEIGHT,
        "one layer unpacked": shape.hidden * shape.intermediate * UNPACKED,
        "one block's activations": tokens * (shape.hidden * HIDDEN + shape.intermediate * INTERMEDIATE),
        "a chunk of logits": LOGITS_MEMORY,
    }


def _high_water() -> float:
    """Largest resident memory in MB since the start or the last reset; getrusage would include the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1.024e-3


def imports(options: argparse.Namespace) -> None:
    """Nothing beyond this file's imports."""


def forward(options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Load the full-precision model and run it once."""
    model = load_model(default_model(), dtype=dtype)
    with torch.no_grad():
        model(_tokens(options), use_cache=False)


def fine_tune(options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Train all weights of the full-precision model with AdamW."""
    model = load_model(default_model(), dtype=dtype)
    model.requires_grad_(True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for _ in range(2):
        tokens = _tokens(options)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def end_to_end(options: argparse.Namespace) -> dict[str, float]:
    """``ulbq quantize ARTIFACT`` with nothing but the end-to-end phase: high-water marks of its parts."""
    found: dict[str, float] = {}

    def phase(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found["blocks_mb"] = _high_water()
        found["before_phase_mb"] = _start_anew()
        result = work(*args, **kwargs)
        found["training_mb"] = _high_water()
        return result

    def build(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = work(*args, **kwargs)
        found["building_mb"] = _high_water()
        found["built_mb"] = _start_anew()
        return result

    _wrap(ulbq.pipeline.quantize, "train_end_to_end", phase)
    _wrap(ulbq.pipeline.end_to_end, "build_student", build)
    with tempfile.TemporaryDirectory() as folder:
        size = ("--samples", "2", "--sequence-length", str(options.length), "--calibration", "wikitext2")
        training = ("--end-to-end", "ce", "--end-to-end-epochs", "1", "--gradient-accumulation", "1")
        method = ("--method", "apiq", "--no-adapter", "--epochs", "0", "--device", "cpu", "--quiet")
        words = (str(options.artifact.resolve()), *method, *size, *training, "-o", f"{folder}/out")
        _command("quantize", *words)
    return found | {"peak_mb": max(found["blocks_mb"], found["building_mb"], found["training_mb"], _high_water())}


def evaluate(options: argparse.Namespace, source: str | None) -> None:
    """``ulbq eval``: perplexity of two windows, weights and activations in bfloat16 where they are not packed."""
    with tempfile.TemporaryDirectory() as folder:
        windows = ("--perplexity", "wikitext2", "--context", str(options.length), "--limit", "2", "--batch-size", "1")
        words = (source or str(default_model().path), *windows, "--no-parent-scores", "--no-fidelity", "--quiet")
        _command("eval", *words, "--device", "cpu", "-o", f"{folder}/out")


def _command(*words: str) -> None:
    sys.argv = ["ulbq", *words]
    try:
        code = command()
    except SystemExit as end:
        code = end.code
    if code:
        raise SystemExit(f"ulbq {words[0]} ended with {code}")


def _wrap(module: ModuleType, name: str, around: Callable[..., Any]) -> None:
    setattr(module, name, partial(around, getattr(module, name)))


def _start_anew() -> float:
    """Give freed memory back, and start the high-water mark anew; returns what is held."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _high_water()


CASES: dict[str, Callable[[argparse.Namespace], dict[str, float] | None]] = {
    "imports": imports,
    "forward bf16": lambda options: forward(options, torch.bfloat16),
    "forward fp32": lambda options: forward(options, torch.float32),
    "eval, packed": lambda options: evaluate(options, str(options.artifact.resolve())),
    "eval, full precision": lambda options: evaluate(options, None),
    "end to end, packed": end_to_end,
    "fine-tuning bf16": lambda options: fine_tune(options, torch.bfloat16),
    "fine-tuning fp32": lambda options: fine_tune(options, torch.float32),
}


def _tokens(options: argparse.Namespace) -> torch.Tensor:
    return torch.randint(0, SMOLLM2.vocabulary, (1, options.length), generator=torch.Generator().manual_seed(0))


def measure(case: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one case in a process of its own."""
    words = [str(options.artifact), "--length", str(options.length), "--case", case]
    done = subprocess.run(
        [sys.executable, __file__, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def predictions() -> list[dict[str, Any]]:
    """The formula for Llama 2, in GB."""
    rows = []
    for name, shape in LLAMA2.items():
        for length in (2048, 4096):
            parts = {part: round(size / 1e9, 2) for part, size in formula(shape, length).items()}
            rows.append({"model": f"Llama 2 {name}", "tokens": length, "gb": round(sum(parts.values()), 1), **parts})
    return rows


def main() -> None:
    """Measure every case, compare the formula, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="an affine artifact of the default model")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    parser.add_argument("--case", choices=CASES, help="this one alone, in this process")
    options = parser.parse_args()
    if options.case:
        found = CASES[options.case](options) or {"peak_mb": _high_water()}
        print(json.dumps(found))
        return
    manifest = read_manifest(options.artifact)
    assert isinstance(manifest, QuantizedManifest)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        found = measure(case, options)
        row: dict[str, Any] = {"case": case, **{name: round(value, 1) for name, value in found.items()}}
        base = rows[0]["peak_mb"] if rows else row["peak_mb"]
        row["beyond_imports_mb"] = round(row["peak_mb"] - base, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    parts = {part: round(size / 1e6, 1) for part, size in formula(SMOLLM2, options.length).items()}
    phase = next(row for row in rows if "training_mb" in row)
    measured = round(phase["training_mb"] - phase["before_phase_mb"], 1)
    check = {"parts_mb": parts, "formula_mb": round(sum(parts.values()), 1), "measured_mb": measured}
    result = {"length": options.length, "rows": rows, "check": check, "predictions": predictions()}
    print(json.dumps({"check": check, "predictions": result["predictions"]}, indent=2))
    if options.results:
        result |= {"paper_70b_gb": PAPER_70B, "artifact": manifest.method, "versions": versions()}
        options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
