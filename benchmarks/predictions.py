"""What the plans of runs predict, beside what the runs take: peak memory, disk, artifact and time left.

    python benchmarks/predictions.py [--models tiny default block] [--cases rtn gptq …] [--results FILE] [--again]

Three models: a tiny one, whose memory is that of the libraries; the default model; and two blocks of Llama 2 7B's
shape with random weights, between embeddings and a head. Every command that predicts something runs on each of them,
as typed in a shell, in a process of its own. ``memory`` is the largest resident set that the system counted for that
process (``ru_maxrss``; a small process starts it, for a large one would hand on its own peak), beside what the plan
said before the work began. ``disk`` is the most that lay in the run's folder, and in files without a name that it had
mapped, looked at five times a second; ``artifact`` are the weights of the finished folder. ``time`` is what the
progress line said was left, a quarter and half through the longest phase, beside what it then took; only runs of more
than a minute are long enough to tell. Ratios are predicted over measured.

``--again`` runs nothing that FILE has measured: what was measured stays, and stands beside what plans say today.

Needs a mirror of WikiText-2 in ``ULBQ_DATA_DIR``.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from ulbq.artifacts.manifest import is_artifact, read_manifest
from ulbq.models.source import default_model
from ulbq.runtime import calm_threads, describe_device, versions

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_PREDICTED = re.compile(r"(peak memory|disk|artifact) ([\d.,]+) ([KMG]?i?B)")
_PACE = re.compile(r"(?P<name>[^:]+): (?P<done>\d+)/(?P<total>\d+), .*passed, (?P<left>[\d.:]+)(?P<unit> s)? left")

SMALL = ("--samples", "8", "--sequence-length", "128")
MANY = ("--samples", "24", "--sequence-length", "128")
"""Tokens enough for second moments of 11,008 columns."""
QUICK = (*SMALL, "--epochs", "1")
TEXT = ("--calibration", "wikitext2")
TAUGHT = (*TEXT, *QUICK, "--end-to-end", "kl")
"""Enough for every part of a run to come about; how long it trains makes no difference to what it takes."""

TUNED = ("--samples", "8", "--epochs", "1", "--sequence-length", "256")

FULL = ("--target-inputs", "full")

MADE = "@"
"""Stands for the artifact of the case that is named behind it, which runs first."""

CASES: dict[str, tuple[str, ...]] = {
    "rtn": ("quantize", "--method", "rtn"),
    "rtn, rotated": ("quantize", "--method", "rtn", "--rotate"),
    "gptq, full inputs": ("quantize", "--method", "gptq", *FULL, *TEXT, *SMALL),
    "claq, full inputs": ("quantize", "--method", "claq", *FULL, *TEXT, *SMALL),
    "trellis, full inputs": ("quantize", "--method", "trellis", *FULL, *TEXT, *SMALL),
    "gptq": ("quantize", "--method", "gptq", *TEXT, *SMALL),
    "gptq, many tokens": ("quantize", "--method", "gptq", *TEXT, *MANY),
    "gptq, one pass": ("quantize", "--method", "gptq", "--one-pass", *TEXT, *SMALL),
    "claq": ("quantize", "--method", "claq", *TEXT, *SMALL),
    "claq, layers": ("quantize", "--method", "claq", "--target-bits", "3", *TEXT, *SMALL),
    "claq, global": (
        *("quantize", "--method", "claq", "--target-bits", "3", "--allocation", "global"),
        *("--saliency", "fisher", *TEXT, *SMALL),
    ),
    "efficientqat": ("quantize", "--method", "efficientqat", *TEXT, *QUICK),
    "efficientqat, gptq": ("quantize", "--method", "efficientqat", "--start", "gptq", *TEXT, *QUICK),
    "efficientqat, grid": ("quantize", "--method", "efficientqat", "--train", "grid", *TEXT, *QUICK),
    "efficientqat, sign": (
        *("quantize", "--method", "efficientqat", "--train", "rounding", "--optimizer", "sign"),
        *(*TEXT, *QUICK),
    ),
    "efficientqat, scales end to end": ("quantize", "--method", "efficientqat", *TAUGHT),
    "efficientqat, all end to end": ("quantize", "--method", "efficientqat", *TAUGHT, "--end-to-end-train", "all"),
    "efficientqat, cached teacher": ("quantize", "--method", "efficientqat", *TAUGHT, "--teacher", "cached"),
    "apiq": ("quantize", "--method", "apiq", *TEXT, *QUICK),
    "apiq, layers": ("quantize", "--method", "apiq", "--granularity", "layer", *TEXT, *QUICK),
    "ulb-sapr": ("quantize", "--method", "ulb-sapr", *TEXT, *QUICK),
    "db-llm": ("quantize", "--method", "db-llm", *TEXT, *QUICK),
    "db-llm, temperature": ("quantize", "--method", "db-llm", "--fit-temperature", *TEXT, *QUICK),
    "db-llm, own text": ("quantize", "--method", "db-llm", "--calibration", "self", *QUICK),
    "binary-mos": ("quantize", "--method", "binary-mos", *TEXT, *QUICK),
    "trellis": ("quantize", "--method", "trellis", *TEXT, *MANY),
    "trellis, trained": ("quantize", "--method", "trellis", "--epochs", "1", *TEXT, *MANY),
    "trellis, budget": ("quantize", "--method", "trellis", "--target-bits", "2.3", *TEXT, *MANY),
    "trellis, end to end": ("quantize", "--method", "trellis", "--end-to-end", "kl", *TEXT, *SMALL),
    "artifact, end to end": (
        *("quantize", f"{MADE}efficientqat", "--method", "efficientqat", "--epochs", "0"),
        *("--end-to-end", "ce", *TEXT, *SMALL),
    ),
    "fisher": ("saliency", *TEXT, *SMALL),
    "hessian": ("saliency", "--kind", "hessian", *TEXT, *SMALL),
    "wanda": ("saliency", "--kind", "wanda", *TEXT, *SMALL),
    "magnitude": ("saliency", "--kind", "magnitude"),
    "finetune": ("finetune", f"{MADE}rtn", "--task", "gsm8k", *TUNED),
    "finetune, scales": ("finetune", f"{MADE}rtn", "--task", "gsm8k", "--train", "adapter-scales", *TUNED),
    "finetune, checkpointing": ("finetune", f"{MADE}rtn", "--task", "gsm8k", "--checkpointing", *TUNED),
    "finetune, end to end": (
        *("finetune", f"{MADE}db-llm", "--task", "end-to-end", "--loss", "ce", "--data", "wikitext2", *SMALL),
    ),
}


_STARTED_BY = """
import os, sys
child = os.fork()
if not child:
    os.execv(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
open(sys.argv[1], "w").write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Says in a file what the largest resident set of a command was, in KiB."""


@dataclass
class Seen:
    """What a run was seen to do.

    Attributes:
        text: its standard error.
        peak_memory: bytes.
        disk: most bytes in its folder at once.
        paces: of its progress lines: when, which phase, steps done and all, seconds left.
    """

    text: str = ""
    peak_memory: int = 0
    seconds: float = 0.0
    disk: int = 0
    paces: list[tuple[float, str, int, int, float]] = field(default_factory=list)


def run(words: list[str], out: Path) -> Seen:
    """Run ``ulbq`` with some words, and look at it."""
    seen, started = Seen(), time.monotonic()
    counted = out.parent / "peak"
    out.parent.mkdir(parents=True, exist_ok=True)
    starter = [sys.executable, "-I", "-S", "-c", _STARTED_BY, str(counted)]
    process = subprocess.Popen(
        [*starter, sys.executable, "-m", "ulbq", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            away = sum(map(_mapped_away, _children(process.pid)))
            seen.disk = max(seen.disk, _lying(out) + away)

    looker = threading.Thread(target=look)
    looker.start()
    assert process.stderr is not None
    for line in process.stderr:
        seen.text += line
        if found := _PACE.match(line):
            left = _seconds(found["left"])
            seen.paces.append(
                (time.monotonic() - started, found["name"], int(found["done"]), int(found["total"]), left)
            )
        elif done := re.match(r"([^:]+): (\d+) ?/?(\d*) done in|([^:]+): (\d+)/(\d+) done in", line):
            name, total = (done[1] or done[4]), int(done[3] or done[6] or done[2] or 0)
            seen.paces.append((time.monotonic() - started, name, total, total, 0.0))
    status = process.wait()
    ended.set()
    looker.join()
    seen.peak_memory, seen.seconds = int(counted.read_text()) * 1024, time.monotonic() - started
    if status:
        raise SystemExit(f"ulbq {' '.join(words)} ended with {status}:\n{seen.text[-3000:]}")
    return seen


def _lying(out: Path) -> int:
    """Bytes of files in the run's folder, finished or not."""
    total = 0
    for folder in (out, out.with_name(f"{out.name}.partial")):
        for place, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(place, name)).st_size
                except FileNotFoundError:  # gone since
                    continue
    return total


def _children(process: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # ended since
        return []


def _mapped_away(process: int) -> int:
    """Bytes of a process's mapped files that have no name any more."""
    total = 0
    try:
        with open(f"/proc/{process}/maps", encoding="utf-8") as maps:
            for line in maps:
                if line.rstrip().endswith("(deleted)") and ".scratch" in line:
                    first, last = line.split(maxsplit=1)[0].split("-")
                    total += int(last, 16) - int(first, 16)
    except (FileNotFoundError, ProcessLookupError):  # ended since
        return 0
    return total


def _seconds(text: str) -> float:
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def _predictions(text: str) -> dict[str, int]:
    """The plan's own words in bytes."""
    line = next((line for line in text.splitlines() if line.startswith("predicted")), "")
    return {
        what.replace("peak ", ""): round(float(number.replace(",", "")) * _UNITS[unit])
        for what, number, unit in _PREDICTED.findall(line)
    }


def _times(seen: Seen) -> dict[str, float]:
    """Said over true of the time left, a quarter and half through the longest phase."""
    ends = {name: at for at, name, done, total, _ in seen.paces if done == total}
    longest = max(ends, key=lambda name: ends[name], default=None)
    found = {}
    for share in (0.25, 0.5):
        for at, name, done, total, left in seen.paces:
            if name == longest and share <= done / total < share + 0.25 and ends[name] - at > 5:
                found[f"time at {share:.0%}"] = round(left / (ends[name] - at), 2)
                break
    return found


def _weights(out: Path) -> int:
    return sum(
        file.stat().st_size
        for file in out.rglob("*.safetensors")
        if file.name not in ("calibration.safetensors", "end-to-end.safetensors")
    )


def _words(case: str, source: Path, folder: Path) -> list[str]:
    """The command line of a case; what it starts from is made where it is not there."""
    words = list(CASES[case])
    if words[1].startswith(MADE):
        made = folder / words.pop(1).removeprefix(MADE)
        if not is_artifact(made):
            run([*_words(made.name, source, folder), "-o", str(made)], made)
        source = made
    return [words[0], str(source), *words[1:], "--device", "cpu", "--offline", "--force"]


def measure(case: str, source: Path, folder: Path) -> dict[str, Any]:
    """Run one case on a model."""
    out = folder / case
    shutil.rmtree(out, ignore_errors=True)  # what an earlier run left would count
    seen = run([*_words(case, source, folder), "-o", str(out)], out)
    took = {"memory": seen.peak_memory, "disk": seen.disk, "artifact": _weights(out)}
    row: dict[str, Any] = {"case": case, "seconds": round(seen.seconds, 1)}
    row |= {f"{what} took": took[what] for what in _predictions(seen.text)}
    row["phases"] = {phase.name: round(phase.peak_memory / 2**20) for phase in read_manifest(out).phases}
    return _compared(row | _times(seen), seen.text)


def again(row: dict[str, Any], source: Path, folder: Path) -> dict[str, Any]:
    """A row that was measured, beside what the plan of its run says now."""
    seen = run([*_words(row["case"], source, folder), "--dry-run"], folder / "none")
    return _compared(row, seen.text)


def _compared(row: dict[str, Any], plan: str) -> dict[str, Any]:
    """A row with what a plan said, and what that is of what was measured."""
    said = _predictions(plan)
    ratios = {what: round(size / row[f"{what} took"], 3) for what, size in said.items()}
    return row | {f"{what} said": size for what, size in said.items()} | ratios


def write_model(folder: Path, *, hidden: int, inside: int, heads: int, blocks: int) -> Path:
    """A random Llama with the default model's tokenizer, a file a block, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    default = default_model(offline=True)
    vocabulary = default.config.vocab_size
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inside,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    default.tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    files = {
        "model-0.safetensors": {
            "model.embed_tokens.weight": matrix(vocabulary, hidden),
            "model.norm.weight": norm(),
            "lm_head.weight": matrix(vocabulary, hidden),
        }
    }
    index: dict[str, str] = {}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        files[f"model-{block + 1}.safetensors"] = {
            **{f"{prefix}{name}_layernorm.weight": norm() for name in ("input", "post_attention")},
            **{f"{prefix}self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"},
            **{f"{prefix}mlp.{name}_proj.weight": matrix(inside, hidden) for name in ("gate", "up")},
            f"{prefix}mlp.down_proj.weight": matrix(hidden, inside),
        }
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def models(folder: Path, names: list[str], blocks: int = 2) -> dict[str, Path]:
    """The models of some names, written where they are not; ``block`` with so many blocks."""
    shapes: dict[str, dict[str, int]] = {
        "tiny": {"hidden": 64, "inside": 192, "heads": 4, "blocks": 3},
        "block": {"hidden": 4096, "inside": 11008, "heads": 32, "blocks": blocks},
    }
    found = {}
    for name in names:
        if name == "default":
            found[name] = default_model(offline=True).path
        else:
            path = folder / name
            found[name] = path if (path / "config.json").is_file() else write_model(path, **shapes[name])
    return found


def main() -> None:
    """Run, print a row for each case, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=("tiny", "default", "block"), default=["tiny", "default", "block"]
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, help="for models and artifacts; a temporary one without")
    parser.add_argument("--results", type=Path, help="write the rows as JSON; those of other models and cases stay")
    parser.add_argument("--again", action="store_true", help="predict anew what the results have measured")
    options = parser.parse_args()
    known = json.loads(options.results.read_text())["rows"] if options.results and options.results.is_file() else []
    measured = {(row["model"], row["case"]): row for row in known} if options.again else {}
    calm_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows = []
        for model, source in models(folder / "models", options.models).items():
            for case in options.cases:
                if row := measured.get((model, case)):
                    row = again(row, source, folder / model)
                else:
                    row = {"model": model, **measure(case, source, folder / model)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.results:
        fresh = {(row["model"], row["case"]) for row in rows}
        rows = [row for row in known if (row["model"], row["case"]) not in fresh] + rows
        result = {"device": describe_device(torch.device("cpu")), "versions": versions(), "rows": rows}
        options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
