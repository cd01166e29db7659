"""How fast llama.cpp computes the block types that hold our codes: tokens a second, type by type, in turns.

    python tests/export/readers/environments.py /tmp/readers llama-cpp
    python benchmarks/gguf_types.py --readers /tmp/readers [--threads 1] [--results FILE]

A random Llama of 8 blocks (hidden 1024, intermediate 2816; 94 M weights in them) is rounded to nearest at 1, 2 and 4
bits, symmetric, groups of 128, and converted. Each file reads a prompt of
128 tokens and writes 64; the best of three rounds counts. Speeds are ratios to those of Q4_0 in the same run.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from predictions import write_model

from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.models.gguf_header import read_header
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize
from ulbq.runtime import describe_device, versions

_RUN = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = sys.argv[1], 512, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
server = xllamacpp.Server(params)
asked = {"prompt": list(range(1000, 1128)), "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
for tokens in (8, 64):
    answer = server.handle_completions({**asked, "n_predict": tokens})
answer = json.loads(answer) if isinstance(answer, str) else answer
print(json.dumps([answer["timings"][f"{what}_per_second"] for what in ("prompt", "predicted")]))
"""


def write_files(folder: Path) -> dict[str, Path]:
    """GGUF files by the type of their layers."""
    dense = write_model(folder / "dense", hidden=1024, inside=2816, heads=16, blocks=8)
    found: dict[str, Path] = {}
    for bits in (4, 2, 1):
        packed = folder / f"w{bits}"
        options: dict[str, Any] = {"method": "rtn", "bits": bits, "group_size": 128, "symmetric": True}
        quantize(QuantizeRequest(source=str(dense), out=packed, device="cpu", offline=True, **options))
        asked = ConvertRequest(source=str(packed), to="gguf", out=folder / f"g{bits}")
        file = convert(asked)[0] / "model.gguf"
        found[read_header(file).tensors["blk.0.ffn_up.weight"].kind.name] = file
    return found


def main() -> None:
    """Write the files, run them in turns, print a row each and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=Path, required=True, help="where the environment llama-cpp is")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    python = options.readers / "llama-cpp" / "bin" / "python"
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(Path(temporary))
        for _ in range(3):
            for kind, file in files.items():
                words = [python, "-c", _RUN, file, str(options.threads)]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                speeds = json.loads(done.stdout.splitlines()[-1])
                best[kind] = [max(pair) for pair in zip(speeds, best.get(kind, speeds), strict=True)]
    rows = [
        {"type": kind, "prompt": round(speeds[0] / best["Q4_0"][0], 3), "text": round(speeds[1] / best["Q4_0"][1], 3)}
        for kind, speeds in best.items()
    ]
    print(*map(json.dumps, rows), sep="\n")
    if options.results:
        about = {"device": describe_device(torch.device("cpu")), "versions": versions(), "threads": options.threads}
        options.results.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
