"""Whether training holds on any draw of samples: the worst block of default runs and recipes, over seeds.

    python benchmarks/robustness.py [NAME ...] [--folder DIR] [--results benchmarks/results/robustness-cpu.json]

Every run quantizes the default model as a user would, in a process of its own: ``db-llm`` and ``efficientqat`` with
their defaults and seeds 0 to 4, the other methods that train blocks with seed 0, each from samples that the model
writes itself (``self``) and from WikiText-2 ``train`` (``text``); and the shipped recipes of 2 bits and more that train
blocks, on WikiText-2, with 16 × 256 tokens and 2 epochs, since what they are published with takes days here.
``efficientqat-w2`` moves weights by 2e-5 a step, and 16 steps leave its start as it is: it has 2,048 samples of 32
tokens, which is half of the published steps, and does without the phase behind the blocks. An error
is that of a block's output on samples that were held out, relative to what it gives in full precision; a run warns
from 0.5 on. With ``--folder`` the artifacts stay, and what is finished there is not made again.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from quality import ulbq

from ulbq.artifacts import QuantizedManifest, read_manifest
from ulbq.runtime import describe_device, versions

TEXTS = {"self": "self", "text": "wikitext2"}
SEEDS = {"db-llm": 5, "efficientqat": 5, "apiq": 1, "ulb-sapr": 1, "claq": 1}
TRAINED = {"claq": ("--epochs", "2")}
"""What a method that does not train blocks by itself is asked for."""

RECIPES = (
    *("apiq-w2", "apiq-w3", "apiq-w4", "apiq-w2-small-cpu", "db-llm", "db-llm-small-cpu"),
    *("efficientqat-w2", "efficientqat-w3", "efficientqat-w4", "efficientqat-w2-small-cpu"),
    *("ulb-sapr-w2", "ulb-sapr-mixed", "ulb-sapr-w2-small-cpu"),
)
_FEW = ("--calibration", "wikitext2", "--samples", "16", "--sequence-length", "256")
_STAGED = ("ulb-sapr-w2", "ulb-sapr-mixed")
"""Recipes whose stages have epochs of their own."""
_STEPS = ("--calibration", "wikitext2", "--samples", "2048", "--sequence-length", "32", "--end-to-end", "none")

RUNS: dict[str, tuple[str, ...]] = {
    f"{method}-{text}-{seed}": (
        *("--method", method, "--calibration", calibration, "--seed", str(seed)),
        *TRAINED.get(method, ()),
    )
    for method, seeds in SEEDS.items()
    for text, calibration in TEXTS.items()
    for seed in range(seeds)
}
_EPOCHS = {name: () if name in _STAGED else ("--epochs", "2") for name in RECIPES}
RUNS |= {f"recipe-{name}": ("--recipe", name, *_FEW, *_EPOCHS[name]) for name in RECIPES}
RUNS |= {"recipe-efficientqat-w2": ("--recipe", "efficientqat-w2", *_STEPS)}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Quantize, unless it is done, and say how the blocks ended."""
    if not (folder / name).is_dir():
        ulbq("quantize", *RUNS[name], "-o", name, folder=folder)
    made = read_manifest(folder / name)
    assert isinstance(made, QuantizedManifest)
    worst = max(made.blocks, key=lambda block: block.end_error)
    return {
        "run": name,
        "options": " ".join(RUNS[name]),
        "worst": round(worst.end_error, 4),
        "block": worst.index,
        "mean": round(sum(block.end_error for block in made.blocks) / len(made.blocks), 4),
        "fallbacks": sum(block.fallback for block in made.blocks),
        "retries": sum(block.retries for block in made.blocks),
        "sinks": max(block.spurious_sinks for block in made.blocks),
    }


def main() -> None:
    """Run what was asked for, print a row for each, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []], metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--folder", type=Path, help="keep the artifacts here, and take over what is finished")
    parser.add_argument("--results", type=Path, help="write the rows as JSON; those of other runs stay")
    options = parser.parse_args()
    known = json.loads(options.results.read_text())["rows"] if options.results and options.results.is_file() else []
    rows = {row["run"]: row for row in known}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.names or RUNS:
            rows[name] = measure(name, folder)
            print(json.dumps(rows[name]), flush=True)
            if options.results:
                ordered = [rows[run] for run in RUNS if run in rows]
                result = {"device": describe_device(torch.device("cpu")), "versions": versions(), "rows": ordered}
                options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
