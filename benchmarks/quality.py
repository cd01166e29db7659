"""What the methods reach on the default model: true bits, perplexity, time and memory, in one table.

    python benchmarks/quality.py [NAME ...] [--results benchmarks/results/quality.json]

Runs ``ulbq quantize`` and ``ulbq eval`` as a user would, each in a process of its own. The protocol: db-llm on 32
samples of 512 tokens of WikiText-2 ``train`` (the ``quick`` rows: what that preset takes); perplexity on WikiText-2
``test``, context 1024, first 32 windows, bf16. The times mean something only where nothing else runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ulbq.artifacts import BitsReport

_DB_LLM = ["--method", "db-llm", "--calibration", "wikitext2", "--samples", "32", "--sequence-length", "512"]
_QUICK = ["--method", "db-llm", "--preset", "quick", "--calibration", "wikitext2"]
SETTINGS: dict[str, list[str]] = {
    "db-llm": [*_DB_LLM, "--epochs", "10"],
    "quick": _QUICK,
    "quick-uniform": [*_QUICK, "--token-weighting", "uniform"],
    "quick-start": [*_QUICK, "--epochs", "0"],
    "quick-frozen": [*_QUICK, "--freeze-weights"],
    "rtn-w4g64": ["--method", "rtn", "--bits", "4"],
    "rtn-w3g64": ["--method", "rtn", "--bits", "3"],
    "rtn-w2g64": ["--method", "rtn", "--bits", "2"],
    "rtn-w2g64-plain": ["--method", "rtn", "--bits", "2", "--no-search"],
}


def ulbq(*words: str) -> dict[str, Any]:
    """Run one command and return its manifest."""
    command = [
        sys.executable,
        "-c",
        "import sys; from ulbq.commands.app import main; sys.exit(main())",
        *words,
        "--json",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    manifest: dict[str, Any] = json.loads(done.stdout)
    return manifest


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Quantize with one setting and score it."""
    packed = folder / name
    made = ulbq("quantize", *SETTINGS[name], "--seed", "0", "-o", str(packed))
    scored = ulbq(
        *("eval", str(packed), "--perplexity", "wikitext2", "--context", "1024", "--limit", "32"),
        *("--no-parent-scores", "-o", str(folder / f"{name}-eval")),
    )
    return {
        "setting": name,
        "options": " ".join(SETTINGS[name]),
        "true_bits": round(BitsReport.model_validate(made["bits"]).bits_per_weight, 4),
        "perplexity": round(scored["results"]["models"][0]["perplexity"]["wikitext2"]["value"], 2),
        "seconds": round(sum(phase["seconds"] for phase in made["phases"])),
        "peak_memory_gb": round(max(phase["peak_memory"] for phase in made["phases"]) / 1e9, 2),
        "device": made["device"],
        "versions": made["versions"],
    }


def main() -> None:
    """Measure what was asked for, print the table as it grows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SETTINGS, []], metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or SETTINGS:
            rows.append(measure(name, Path(folder)))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "versions"}), flush=True)
            if options.results:
                options.results.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
