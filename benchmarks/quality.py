"""What the methods reach on the default model: true bits, perplexity, task accuracy, time and memory, in one table.

    python benchmarks/quality.py [NAME ...] [--folder DIR] [--results benchmarks/results/quality.json]

Runs ``ulbq saliency``, ``ulbq quantize`` and ``ulbq eval`` as a user would, each in a process of its own; with
``--folder`` the artifacts stay, and what is finished there is not made again. The protocol: 32 samples of 512 tokens
of WikiText-2 ``train`` (the ``quick`` and ``mos`` rows: 256 tokens, 5 epochs); perplexity on WikiText-2
``test``, context 1024, first 32 windows, bf16; accuracy as the mean over six tasks, the first 200 documents of each.
The times mean something only where nothing else runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ulbq.artifacts import BitsReport, EvaluationManifest, QuantizedManifest, read_manifest

TASKS = ("piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "social_iqa")
SALIENCY = "fisher"

_SAMPLES = ("--calibration", "wikitext2", "--samples", "32", "--sequence-length", "512")
# Layers that shall give what they give in the full-precision model: the rows that end so.
_FULL_INPUTS, _FULL = ("--target-inputs", "full"), "-full"
# What is not coded yet trains while a block is solved.
_PASSES = ("--epochs", "2")
_QUICK = ("--samples", "32", "--sequence-length", "256", "--epochs", "5", "--calibration", "wikitext2")

_PUBLISHED = ("--as-published", "--outlier-bits", "0.07")
_GLOBAL = ("--allocation", "global", "--saliency", SALIENCY)
_CLAQ: dict[str, tuple[str, ...]] = {
    "2": (),
    "2-uniform": ("--token-weighting", "uniform"),
    "2-no-refit": ("--no-refit",),
    "2.12-published": (*_PUBLISHED, "--target-bits", "2.12"),
    "2.12": (*_GLOBAL, "--target-bits", "2.12"),
    "2-sweeps": ("--sweeps", "8"),
    "2.3-sweeps": ("--target-bits", "2.3", "--sweeps", "8"),
    "2.3-outlier": ("--target-bits", "2.3", "--allocation", "outlier", "--outlier-bits", "0.1"),
    "2.3-hessian": ("--target-bits", "2.3", "--allocation", "hessian", "--outlier-bits", "0.1"),
    "2.3": ("--target-bits", "2.3"),
    "2.3-global": ("--target-bits", "2.3", "--allocation", "global"),
    "2.3-fisher": (*_GLOBAL, "--target-bits", "2.3"),
}
# What goes on from the row of 2.3 bits.
_CLAQ_TRAINED: dict[str, tuple[str, ...]] = {
    "2.3-levels": ("--epochs", "4"),
    "2.3-weights": ("--epochs", "4", "--train-weights"),
    "2.3-ce": ("--epochs", "0", "--end-to-end", "ce", "--end-to-end-epochs", "2"),
}


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        options: of ``ulbq quantize``.
        base: score it without its adapter too.
        tasks: score it on the tasks too.
        start: the setting whose artifact it goes on from; None for the default model.
    """

    options: tuple[str, ...]
    base: bool = False
    tasks: bool = False
    start: str | None = None

    @property
    def weighted(self) -> bool:
        """Whether it reads the saliency artifact, which is made first."""
        return SALIENCY in self.options


def _settings() -> dict[str, Setting]:
    db_llm, apiq = ("--method", "db-llm"), ("--method", "apiq")
    sapr = ("--method", "ulb-sapr", "--saliency", SALIENCY)
    mos = ("--method", "binary-mos")
    found = {
        "db-llm": Setting((*db_llm, *_SAMPLES, "--epochs", "10")),
        "quick": Setting((*db_llm, *_QUICK)),
        "quick-uniform": Setting((*db_llm, *_QUICK, "--token-weighting", "uniform")),
        "quick-start": Setting((*db_llm, *_QUICK, "--epochs", "0")),
        **{f"quick-s{seed}": Setting((*db_llm, *_QUICK, "--seed", seed)) for seed in ("0", "1", "2")},
        **{
            f"quick-tied-s{seed}": Setting((*db_llm, *_QUICK, "--tied-scales", "--seed", seed))
            for seed in ("0", "1", "2")
        },
        "quick-frozen": Setting((*db_llm, *_QUICK, "--freeze-weights")),
        "rtn-w4g64": Setting(("--method", "rtn", "--bits", "4")),
        "rtn-w3g64": Setting(("--method", "rtn", "--bits", "3")),
        "rtn-w2g64": Setting(("--method", "rtn", "--bits", "2")),
        "rtn-w2g64-plain": Setting(("--method", "rtn", "--bits", "2", "--no-search")),
        "ulb-w3": Setting((*sapr, "--bits", "3", "--no-adapter", *_SAMPLES, "--epochs", "4")),
        "ulb-w4": Setting((*sapr, "--bits", "4", "--no-adapter", *_SAMPLES, "--epochs", "4")),
    }
    for bits in ("2", "3", "4"):
        gptq = ("--method", "gptq", "--bits", bits, *_SAMPLES)
        found[f"gptq-w{bits}{_FULL}"] = Setting((*gptq, *_FULL_INPUTS))
        found |= {f"gptq-w{bits}": Setting(gptq)}
        found |= {f"gptq-w{bits}-uniform": Setting((*gptq, "--token-weighting", "uniform"))}
        found |= {f"gptq-w{bits}-rotated": Setting((*gptq, "--rotate"))}
        found |= {f"gptq-w{bits}-rotated-uniform": Setting((*gptq, "--rotate", "--token-weighting", "uniform"))}
    for bits in ("3", "4"):
        found[f"rtn-w{bits}g64-rotated"] = Setting(("--method", "rtn", "--bits", bits, "--rotate"))
    for name, options in (_CLAQ | _CLAQ_TRAINED).items():
        start = "claq-2.3-fisher" if name in _CLAQ_TRAINED else None
        found[f"claq-{name}"] = Setting(("--method", "claq", *options, *_SAMPLES), start=start)
    for name in ("2", "2.3", "2.3-fisher"):
        found[f"claq-{name}{_FULL}"] = Setting(("--method", "claq", *_CLAQ[name], *_SAMPLES, *_FULL_INPUTS))
    trained = ("--method", "claq", *_SAMPLES, "--epochs", "0")
    found["claq-2.3-t"] = Setting((*trained, "--fit-temperature"), start="claq-2.3-fisher")
    faster = ("--end-to-end", "ce", "--end-to-end-epochs", "2", "--end-to-end-lr-factor", "1")
    found["claq-2.3-t-ce-1"] = Setting((*trained, *faster), start="claq-2.3-t")
    for seed in ("0", "1", "2"):
        four = ("--rank", "64", *_SAMPLES, "--epochs", "4", "--seed", seed)
        found[f"apiq-r64-s{seed}"] = Setting((*apiq, *four), base=True, tasks=True)
        found[f"ulb-r64-s{seed}"] = Setting((*sapr, *four), base=True, tasks=True)
    strong = (*sapr, "--lambda", "0.1", "--rank", "64", *_SAMPLES, "--epochs", "4")
    found["ulb-r64-strong"] = Setting(strong, base=True)
    for rank in ("0", "4", "16"):
        adapter = ("--rank", rank) if rank != "0" else ("--no-adapter",)
        found[f"apiq-r{rank}"] = Setting((*apiq, *adapter, *_SAMPLES, "--epochs", "4"), base=True)
    for experts in ("1", "2", "4", "8"):
        found[f"mos-{experts}"] = Setting((*mos, "--experts", experts, *_QUICK))
    for loss in ("ce", "kl", "kl-hidden", "dad"):
        phase = ("--no-adapter", "--epochs", "0", "--end-to-end", loss, "--end-to-end-epochs", "2")
        found[f"apiq-r0-{loss}"] = Setting((*apiq, *phase, *_SAMPLES), start="apiq-r0")
    found |= _efficientqat() | _trellis() | _hessians() | _grids()
    together = ("--epochs", "0", "--end-to-end", "kl-hidden", "--end-to-end-epochs", "2")
    found["mos-4-kl-hidden"] = Setting((*mos, "--experts", "4", *_QUICK, *together), start="mos-4")
    found["mos-start"] = Setting((*mos, "--experts", "1", *_QUICK, "--epochs", "0"))
    return found


def _hessians() -> dict[str, Setting]:
    methods = {
        "gptq-w2": ("--method", "gptq", "--bits", "2"),
        "trellis-w2": ("--method", "trellis"),
        "claq-2.3": ("--method", "claq", "--target-bits", "2.3"),
    }
    return {
        f"{name}-{kind}-s{seed}": Setting((*options, "--hessian", kind, *_SAMPLES, "--seed", seed))
        for name, options in methods.items()
        for kind in ("plain", "guided", "two-sided")
        if (name, kind) != ("claq-2.3", "two-sided")
        for seed in ("0", "1", "2")
    }


def _grids() -> dict[str, Setting]:
    methods = {
        "rtn": ("--method", "rtn"),
        "gptq": ("--method", "gptq", *_SAMPLES),
        "eqat": ("--method", "efficientqat", *_SAMPLES, "--epochs", "4"),
    }
    grids = {"asymmetric": (), "symmetric": ("--symmetric",), "mid-rise": ("--symmetric", "--mid-rise")}
    return {
        f"grid-{name}-{grid}{'-rotated' if rotate else ''}": Setting((*options, "--bits", "2", *chosen, *rotate))
        for name, options in methods.items()
        for grid, chosen in grids.items()
        for rotate in ((), ("--rotate",))
    }


def _efficientqat() -> dict[str, Setting]:
    eqat = ("--method", "efficientqat", *_SAMPLES)
    found = {f"eqat-w{bits}": Setting((*eqat, "--bits", bits, "--epochs", "4")) for bits in ("3", "4")}
    rounding = ("--train", "rounding", "--optimizer", "sign")
    for seed in ("0", "1", "2"):
        blocks, after = ("--epochs", "10", "--seed", seed), ("--epochs", "0", "--seed", seed)
        for name, trained in ((f"eqat-w2-s{seed}", ()), (f"eqat-sign-s{seed}", rounding)):
            found[name] = Setting((*eqat, *trained, *blocks))
            found[f"{name}-t"] = Setting((*eqat, *after, "--fit-temperature"), start=name)
            for loss in ("ce", "ce-kl"):
                phase = ("--end-to-end", loss, "--end-to-end-epochs", "2")
                found[f"{name}-{loss}"] = Setting((*eqat, *after, *phase), start=name)
            faster = ("--end-to-end", "ce", "--end-to-end-epochs", "2", "--end-to-end-lr-factor", "1")
            found[f"{name}-ce-1"] = Setting((*eqat, *after, *faster), start=name)
            found[f"{name}-t-ce-1"] = Setting((*eqat, *after, *faster), start=f"{name}-t")
    for start in ("min-max", "search", "gptq"):
        for epochs in ("0", "4"):
            found[f"eqat-{start}-{epochs}"] = Setting((*eqat, "--start", start, "--epochs", epochs))
    for train in ("clipping", "grid", "rounding", "weights"):
        found[f"eqat-{train}"] = Setting((*eqat, "--train", train, "--epochs", "4"))
    found["eqat-all"] = Setting((*eqat, "--epochs", "4", "--batch-size", "2"))
    found["eqat-sign"] = Setting((*eqat, *rounding, "--epochs", "4"))
    return found


def _trellis() -> dict[str, Setting]:
    trellis, phase = ("--method", "trellis", *_SAMPLES), ("--end-to-end", "ce", "--end-to-end-epochs", "2")
    budgets = {"w1": ("--bits", "1"), "w2": (), "2.3": ("--target-bits", "2.3"), "w3": ("--bits", "3")}
    ways = {"": (), _FULL: _FULL_INPUTS, "-rows": ("--row-feedback",), "-trained": _PASSES}
    found = {}
    for seed in ("0", "1", "2"):
        for budget, bits in budgets.items():
            for suffix, chosen in ways.items():
                name = f"trellis-{budget}-s{seed}{suffix}"
                found[name] = Setting((*trellis, *bits, *chosen, "--seed", seed))
                # An artifact's bits stay what they are.
                found[f"{name}-ce"] = Setting((*trellis, *phase, "--seed", seed), start=name)
    return found


SETTINGS = _settings()


def ulbq(*words: str, folder: Path) -> None:
    """Run one command inside ``folder``."""
    code = "import sys; from ulbq.commands.app import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words, "--quiet"]
    subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


def evaluation(name: str, suffix: str, folder: Path, *options: str) -> dict[str, Any]:
    """Scores of an artifact, taken now or found finished."""
    out = f"{name}-{suffix}"
    if not (folder / out).is_dir():
        ulbq("eval", name, *options, "--no-parent-scores", "--no-fidelity", "-o", out, folder=folder)
    manifest = read_manifest(folder / out)
    assert isinstance(manifest, EvaluationManifest)
    scores: dict[str, Any] = manifest.results["models"][0]
    return scores


def make(name: str, folder: Path) -> None:
    """Quantize with one setting, unless it is done."""
    setting = SETTINGS[name]
    if setting.weighted and not (folder / SALIENCY).is_dir():
        ulbq("saliency", "--kind", "fisher", *_SAMPLES, "-o", SALIENCY, folder=folder)
    if setting.start is not None:
        make(setting.start, folder)
    if not (folder / name).is_dir():
        source = () if setting.start is None else (f"./{setting.start}",)
        options = [f"./{word}" if word == SALIENCY else word for word in setting.options]
        ulbq("quantize", *source, *options, "-o", name, folder=folder)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Quantize with one setting and score it."""
    setting = SETTINGS[name]
    make(name, folder)
    made = read_manifest(folder / name)
    assert isinstance(made, QuantizedManifest)
    text = ("--perplexity", "wikitext2", "--context", "1024", "--limit", "32")
    bits = BitsReport.model_validate(made.bits)
    row: dict[str, Any] = {
        "setting": name,
        "options": " ".join(setting.options),
        "true_bits": round(bits.bits_per_weight, 4),
        "perplexity": round(evaluation(name, "ppl", folder, *text)["perplexity"]["wikitext2"]["value"], 2),
    }
    if setting.base and "adapter" in bits.parts:
        alone = evaluation(name, "base", folder, *text, "--no-adapter")
        row["base_bits"] = round(bits.bits_per_weight - bits.parts["adapter"] / bits.weights, 4)
        row["base_perplexity"] = round(alone["perplexity"]["wikitext2"]["value"], 2)
    if setting.tasks:
        scores = evaluation(name, "tasks", folder, "--tasks", ",".join(TASKS), "--limit", "200")["tasks"]
        row["tasks"] = {task: round(scores[task]["metrics"]["acc"]["value"], 4) for task in TASKS}
        row["mean_accuracy"] = round(mean(row["tasks"].values()), 4)
    if made.blocks:
        row["mean_block_error"] = round(mean(block.end_error for block in made.blocks), 4)
    return row | {
        "seconds": round(sum(phase.seconds for phase in made.phases)),
        "peak_memory_gb": round(max(phase.peak_memory for phase in made.phases) / 1e9, 2),
        "device": made.device,
        "versions": made.versions,
    }


def main() -> None:
    """Measure what was asked for, print the table as it grows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SETTINGS, []], metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--folder", type=Path, help="keep the artifacts here, and take over what is finished")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.names or SETTINGS:
            rows.append(measure(name, folder))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "versions"}), flush=True)
            if options.results:
                options.results.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
