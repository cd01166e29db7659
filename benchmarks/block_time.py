"""What a block's training costs: seconds per token and block, and memory, against AutoRound and EfficientQAT's authors.

    python benchmarks/block_time.py [--autoround PYTHON] [--efficientqat FOLDER] [--results FILE]

The first blocks of the default model at w2g64, the same 32 samples of 512 tokens of WikiText-2 ``train`` (and the same
held-out ones), the same number of passes, the same batches, the same precision, the same number of threads. Everybody
has a process of its own and they take turns block by block, so that whatever else runs on the machine disturbs all
alike; block 0 warms up and does not count. Of the other blocks the medians are shown. ``block`` is everything that a
block takes (both streams, the search of the start, training, packing), ``training`` the steps and the held-out losses
after each pass; both are divided by the tokens that trained: samples × length × passes. ``cpu`` is the processor's
time, ``wall`` the clock's. ``times`` are theirs over ours.

``--autoround`` is the Python of an environment with ``auto-round==0.16.*`` and this torch; ``--efficientqat`` a folder
with github.com/OpenGVLab/EfficientQAT at 27474620, untouched (``workers/efficientqat.py`` says what is put around it).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ulbq.config.quantize import QuantizeRequest
from ulbq.models.load import load_model
from ulbq.models.source import default_model
from ulbq.pipeline.predict import heldout_samples
from ulbq.pipeline.samples import draw
from ulbq.progress import Silent
from ulbq.runtime import calm_threads, versions

METHOD: dict[str, Any] = {"method": "efficientqat"}
"""What is ours: fields of a request, beyond those that are the same for all; ``--ours`` adds to them."""

WORKERS = Path(__file__).parent / "workers"


class Worker:
    """One contestant, which stops before each block until it is told to go on."""

    def __init__(self, name: str, python: str, task: Path, log: Path) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []
        command = [python, str(WORKERS / f"{name}.py"), str(task)]
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._log = log
        self._listen()

    def turn(self) -> dict[str, Any]:
        """Let it do one block; returns what it reports."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._listen()
        return self.rows[-1]

    def _listen(self) -> None:
        """Read until it waits for its next turn, or has come to its end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "ready" in message:
                return
            self.rows.append(message)
        if self._process.wait():
            raise SystemExit(f"{self.name} failed:\n{self._log.read_text(encoding='utf-8')[-3000:]}")


def summary(rows: list[dict[str, Any]], tokens: int, expected: int) -> dict[str, Any]:
    """Medians over the blocks after the first, in microseconds a token.

    Args:
        rows: of one contestant.
        tokens: in a step.
        expected: steps that a block should have taken.
    """
    counted = rows[1:]
    if any(row["steps"] != expected for row in counted):
        print(f"steps differ: {[row['steps'] for row in counted]} instead of {expected}", file=sys.stderr)

    def per_token(seconds: list[float]) -> float:
        each = [s / (row["steps"] * tokens) for s, row in zip(seconds, counted, strict=True)]
        return round(float(median(each)) * 1e6, 2)

    return {
        "block_wall": per_token([row["wall"] for row in counted]),
        "block_cpu": per_token([row["cpu"] for row in counted]),
        "training_wall": per_token([row["parts"]["training"] for row in counted]),
        "seconds_a_block": round(median(row["wall"] for row in counted), 2),
        "peak_mb": max(row["peak_mb"] for row in rows),
        "imports_mb": rows[0]["imports_mb"],
    }


def main() -> None:
    """Let everybody quantize the same blocks in turns, print who took how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoround", metavar="PYTHON", help="of an environment with auto-round")
    parser.add_argument("--efficientqat", metavar="FOLDER", type=Path, help="with the authors' repository")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of everybody's products")
    parser.add_argument("--blocks", type=int, default=3, help="that count; one more comes first")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile in AutoRound, which is its default")
    parser.add_argument("--ours", nargs="*", default=[], metavar="FIELD=VALUE", help="of our request, train=rounding")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    calm_threads()
    names = {"ours": sys.executable}
    if options.autoround:
        names["autoround"] = options.autoround
    if options.efficientqat:
        names["efficientqat"] = sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        rows = race(names, options, Path(scratch))
    steps = options.passes * -(-options.samples // options.batch_size)
    found = {name: summary(row, options.batch_size * options.length, steps) for name, row in rows.items()}
    clocks = ("block_wall", "block_cpu", "training_wall", "peak_mb")
    times = {
        name: {clock: round(found[name][clock] / found["ours"][clock], 2) for clock in clocks}
        for name in found
        if name != "ours"
    }
    print(json.dumps({"medians": found, "times": times}, indent=2))
    if options.results:
        same = ("precision", "blocks", "samples", "length", "batch_size", "passes", "threads", "eager")
        result = {"settings": {name: getattr(options, name) for name in same} | {"ours": _method(options)}}
        result |= {"medians": found, "times": times, "rows": rows, "versions": versions()}
        options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _method(options: argparse.Namespace) -> dict[str, Any]:
    return METHOD | dict(field.split("=", 1) for field in options.ours)


def race(names: dict[str, str], options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by contestant, of the default model's first blocks."""
    source = default_model()
    request = QuantizeRequest(method="rtn", calibration="wikitext2", sequence_length=options.length)
    tokens = draw(request, source, options.samples + heldout_samples(options.samples), Silent()).tokens
    model = load_model(source, dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32)
    model.save_pretrained(folder / "model")
    source.tokenizer().save_pretrained(folder / "model")
    del model
    same = ("precision", "samples", "batch_size", "passes", "threads")
    return compete(
        names,
        {
            **{name: getattr(options, name) for name in same},
            "device": "cpu",
            "blocks": options.blocks + 1,
            "group_size": 64,
            "method": _method(options),
            "compile": False if options.eager else None,
            "model": str(folder / "model"),
            "source": None,
            "calibration": "wikitext2",
            "efficientqat": str(options.efficientqat),
        },
        tokens,
        folder,
    )


def compete(
    names: dict[str, str], task: dict[str, Any], tokens: torch.Tensor, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Rows by contestant.

    Args:
        names: of the contestants, and the Python that each of them runs with.
        task: what the workers read, but for their samples.
        tokens: int64 ``[samples, length]``; those beyond ``task["samples"]`` are held out.
        folder: for what passes between.
    """
    torch.save(tokens, folder / "tokens.pt")
    written = folder / "task.json"
    facts = {"bits": 2, "tokens": str(folder / "tokens.pt"), "scratch": str(folder)}
    written.write_text(json.dumps(task | facts), encoding="utf-8")
    workers = [Worker(name, python, written, folder / f"{name}.log") for name, python in names.items()]
    for _ in range(task["blocks"]):
        for worker in workers:
            row = worker.turn()
            print(json.dumps({"name": worker.name, **row}), flush=True)
    return {worker.name: worker.rows for worker in workers}


if __name__ == "__main__":
    main()
