"""What quantizing takes: this tree, an earlier one and llm-compressor, on the same work, in turns.

    python benchmarks/quantize_time.py [--earlier CHECKOUT] [--llmcompressor PYTHON] [--works NAME …] [--rounds 3]

``block`` works are one decoder block of Llama 2 7B's shape with random weights, 8 × 256 tokens; ``default`` is the
default model, GPTQ from 32 × 512 tokens; ``six blocks`` are the first of it, trained on 32 × 256. Everybody runs in a
process of its own with the same samples (WikiText-2 ``train``), 2 bits in groups of 64 and the same threads; they take
turns, round by round, and the medians are shown. Of ulbq the whole command counts, from its start to its exit, opening,
writing and reading back included; of llm-compressor the quantization alone. ``blocks`` are the seconds of the blocks
alone, as the run itself noted them, and ``copying`` those of what is no block, which earlier trees counted among the
blocks. ``cpu`` is processor time, which other programs disturb least. An earlier tree is a checkout that runs with this
environment's packages; ``gptq`` runs beside llm-compressor, everything else beside the earlier tree. ``start`` says how
long a command takes to open the model (``--dry-run``).

At 8 × 256 tokens ``gptq`` rounds ``down_proj`` to nearest: 2,048 tokens say too little about 11,008 columns.
llm-compressor solves it all the same. ``gptq, block, all solved`` has 48 × 256 tokens, and both solve every layer.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from predictions import models
from safetensors.torch import save_file
from speed import write_original
from transformers import AutoModelForCausalLM, AutoTokenizer

from ulbq.config.quantize import QuantizeRequest
from ulbq.models.source import default_model
from ulbq.pipeline.predict import heldout_samples
from ulbq.pipeline.samples import draw
from ulbq.progress import Silent
from ulbq.runtime import calm_threads, describe_device, versions


class Work(NamedTuple):
    """What everybody does: on which model, from how many samples, and the words of the command."""

    model: str
    samples: int
    length: int
    words: tuple[str, ...]


WORKS = {
    "rtn, block": Work("block", 0, 0, ("--method", "rtn")),
    "rtn, block, no search": Work("block", 0, 0, ("--method", "rtn", "--no-search")),
    "gptq, block": Work("block", 8, 256, ("--method", "gptq")),
    "gptq, block, all solved": Work("block", 48, 256, ("--method", "gptq")),
    "efficientqat, block": Work("block", 8, 256, ("--method", "efficientqat", "--epochs", "1")),
    "db-llm, block": Work("block", 8, 256, ("--method", "db-llm", "--epochs", "1")),
    "gptq, default": Work("default", 32, 512, ("--method", "gptq")),
    **{
        f"{method}, six blocks": Work("six blocks", 32, 256, ("--method", method, "--epochs", "1"))
        for method in ("efficientqat", "db-llm", "apiq", "ulb-sapr", "binary-mos")
    },
    "start": Work("default", 0, 0, ("--method", "rtn", "--dry-run")),
}
# A checkout's command line, whatever is installed: ``ulbq.commands`` lies beside ``ulbq`` there.
_COMMAND = """
import importlib.util, sys
tree = sys.argv.pop(1)
sys.path.insert(0, tree)
import ulbq
spec = importlib.util.spec_from_file_location("ulbq.commands", f"{tree}/commands/__init__.py")
sys.modules["ulbq.commands"] = ulbq.commands = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ulbq.commands)
from ulbq.commands.app import main
assert ulbq.__file__.startswith(tree)
sys.exit(main())
"""
_NO_BITS = ("db-llm", "binary-mos")
_CUT = "six blocks"


def timed(words: list[str], environment: dict[str, str]) -> tuple[dict[str, float], str]:
    """Run a command; wall and processor seconds of it, and its standard output. SystemExit where it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu}, done.stdout


class Race:
    """Runs contestants on the works.

    Args:
        options: of the command line.
        folder: for models, samples and artifacts.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        names = sorted({WORKS[name].model for name in options.works})
        self._models = models(folder / "models", [name for name in names if name != _CUT], blocks=1)
        if _CUT in names:
            self._models[_CUT] = _cut(self._folder_of("default"), folder / "cut")

    def run(self, name: str, who: str) -> dict[str, float]:
        """One contestant's seconds on a work."""
        work = WORKS[name]
        tokens = self._tokens(work)
        if who == "llm-compressor":
            asked = {
                **{"model": str(self._folder_of(work.model)), "samples": work.samples, "bits": 2, "group_size": 64},
                **{"tokens": f"{tokens}.pt", "threads": self._options.threads},
            }
            worker = Path(__file__).parent / "workers" / "llmcompressor_gptq.py"
            _, said = timed([self._options.llmcompressor, str(worker), json.dumps(asked)], {})
            found: dict[str, float] = json.loads(said.splitlines()[-1])
            return found
        out = self._folder / "out"
        tree = self._options.earlier if who == "earlier" else Path(__file__).parent.parent
        words = [sys.executable, "-c", _COMMAND, str(tree.resolve()), "quantize", str(self._models[work.model])]
        words += work.words
        if not any(method in work.words for method in _NO_BITS):
            words += ["--bits", "2"]
        if tokens is not None:
            words += ["--calibration", f"{tokens}.safetensors", "--samples", str(work.samples)]
            words += ["--sequence-length", str(work.length)]
        words += ["-o", str(out), "--force", "--quiet", "--device", "cpu", "--offline"]
        found, _ = timed(words, {"OMP_NUM_THREADS": str(self._options.threads)})
        if (out / "manifest.json").is_file():
            phases = json.loads((out / "manifest.json").read_text())["phases"]
            for name in ("copying", "blocks"):
                seconds = [phase["seconds"] for phase in phases if phase["name"] == name]
                found |= {name: sum(seconds)} if seconds else {}
            shutil.rmtree(out)
        return found

    def _tokens(self, work: Work) -> Path | None:
        """Samples of a work, for ulbq and for others, named without their ending."""
        if not work.samples:
            return None
        path = self._folder / f"tokens-{work.samples}-{work.length}"
        if not path.with_suffix(".pt").exists():
            request = QuantizeRequest(method="gptq", calibration="wikitext2", sequence_length=work.length)
            # Those that are held out stand behind the others.
            tokens = draw(
                request, default_model(offline=True), work.samples + heldout_samples(work.samples), Silent()
            ).tokens
            save_file({"tokens": tokens.to(torch.int32)}, path.with_suffix(".safetensors"))
            torch.save(tokens, path.with_suffix(".pt"))
        return path

    def _folder_of(self, model: str) -> Path:
        """A model as a folder in bfloat16, for those who read no GGUF file."""
        if model != "default":
            return self._models[model]
        dense = self._folder / "dense"
        if not dense.is_dir():
            write_original(str(default_model(offline=True).path), str(dense))
        return dense


def _cut(whole: Path, folder: Path) -> Path:
    """The first blocks of a model."""
    model = AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=6, dtype="auto")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


def main() -> None:
    """Run, print each round and the medians, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--earlier", metavar="CHECKOUT", type=Path, help="of an earlier version")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="of an environment with llmcompressor")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="write the rows as JSON; those of other works stay")
    options = parser.parse_args()
    calm_threads()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        race = Race(options, Path(temporary))
        for name in options.works:
            other = "llm-compressor" if "gptq" in name else "earlier"
            there = {"llm-compressor": options.llmcompressor, "earlier": options.earlier}[other]
            contestants = ["ulbq", other] if there else ["ulbq"]
            seconds: dict[str, list[dict[str, float]]] = {who: [] for who in contestants}
            for _ in range(options.rounds):
                for who in contestants:
                    seconds[who].append(race.run(name, who))
                    print(json.dumps({"work": name, "who": who, **seconds[who][-1]}), flush=True)
            row: dict[str, Any] = {"work": name, "rounds": options.rounds}
            for who in contestants:
                row[who] = {clock: round(median(each[clock] for each in seconds[who]), 2) for clock in seconds[who][0]}
                shared = [clock for clock in row[who] if row["ulbq"].get(clock)]
                row[f"times {who}"] = {clock: round(row[who][clock] / row["ulbq"][clock], 2) for clock in shared}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.results:
        known = json.loads(options.results.read_text())["rows"] if options.results.is_file() else []
        rows = [row for row in known if row["work"] not in options.works] + rows
        device = f"{describe_device(torch.device('cpu'))}, {options.threads} threads"
        result = {"device": device, "versions": versions(), "rows": rows}
        options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
