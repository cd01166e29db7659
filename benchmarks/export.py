"""The largest logit differences between an artifact and what other tools compute from its conversions.

    python tests/export/readers/environments.py /tmp/readers
    python benchmarks/export.py --readers /tmp/readers --out benchmarks/results/export-cpu.json

Quantizes the default model by rounding to nearest (or takes the artifacts named by ``--artifact``), converts it for
every reader and compares the logits of a text at all its positions. ``rounding`` is what bfloat16 costs by itself: the
largest difference between the artifact's own logits in bfloat16 and in float32. A reader in float32 has to stay far
below it, a reader in bfloat16 near it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import UlbqError
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize

SCRIPTS = Path(__file__).resolve().parents[1] / "tests" / "export" / "readers"
TEXT = (
    "The lighthouse stood at the end of a long pier of grey stone, and every evening the keeper walked out to it with "
    "a lamp in one hand and a loaf of bread in the other. He had done so for thirty years, in summer and in winter."
)
# Environment, script, what is asked of convert, and the last argument of the script: the dtype it computes in.
READERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gptqmodel, float32": ("gptqmodel", "gptqmodel_logits.py", {"engine": "gptqmodel"}, "float32"),
    "gptqmodel, bfloat16": ("gptqmodel", "gptqmodel_logits.py", {"engine": "gptqmodel"}, "bfloat16"),
    "AutoGPTQ 0.7.1, float32": ("auto-gptq", "auto_gptq_logits.py", {"engine": "auto-gptq"}, "float32"),
    "transformers + compressed-tensors, float32": (
        *("gptqmodel", "transformers_logits.py"),
        *({"engine": "transformers", "to": "compressed-tensors"}, "float32"),
    ),
    "llama.cpp (log-probabilities)": ("llama-cpp", "llama_cpp_logits.py", {"engine": "llama.cpp"}, ""),
}


def measure(artifact: Path, readers: Path, folder: Path) -> dict[str, Any]:
    """Differences of one artifact by reader; a reason instead where a reader cannot have it."""
    source = resolve(artifact)
    tokens = torch.tensor([source.tokenizer()(TEXT)["input_ids"]])
    np.save(folder / "tokens.npy", tokens.numpy())
    exact, rounded = logits(source, tokens, torch.float32), logits(source, tokens, torch.bfloat16)
    found: dict[str, Any] = {
        "rounding": float(np.abs(exact - rounded).max()),
        "spread": float(exact.std()),
        "tokens": tokens.shape[1],
    }
    for name, (environment, script, asked, last) in READERS.items():
        python = readers / environment / "bin" / "python"
        if not python.exists():
            found[name] = "no environment"
            continue
        path = folder / "-".join([artifact.name, *asked.values()])
        try:
            if not path.exists():
                convert(ConvertRequest(source=str(artifact), out=path, **asked))
        except UlbqError as error:
            found[name] = error.message.partition(": ")[2]
            continue
        out = folder / "read.npy"
        command = [python, SCRIPTS / script, path, folder / "tokens.npy", out, last or str(exact.shape[-1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found[name] = difference(np.load(out), exact)
        print(artifact.name, name, found[name], flush=True)
    return found


def difference(read: np.ndarray, exact: np.ndarray) -> float:
    """The largest; of log-probabilities of the next token ``[1, vocabulary]`` after a softmax of the last logits."""
    if read.ndim == 3:
        return float(np.abs(read - exact).max())
    ours = torch.from_numpy(exact[:, -1]).log_softmax(-1).numpy()
    likely = ours > np.log(1e-4)  # of what is rarer, no sampler takes notice
    return float(np.abs(read - ours)[likely].max())


def logits(source: ModelSource, tokens: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Of the artifact itself, in float32."""
    with torch.no_grad():
        found: np.ndarray = load_model(source, dtype=dtype)(tokens).logits.float().numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=Path, required=True, help="folder of environments.py")
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="instead of rounding to nearest")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = options.artifact or [
            quantize(
                QuantizeRequest(
                    method="rtn",
                    bits=bits,
                    group_size=64,
                    symmetric=symmetric,
                    device="cpu",
                    out=Path(scratch) / f"w{bits}{'-sym' if symmetric else ''}",
                )
            )[0]
            for bits in options.bits
            for symmetric in (False, True)
        ]
        for artifact in artifacts:
            results[artifact.name] = measure(artifact, options.readers, Path(scratch))
            options.out.write_text(json.dumps({"text": TEXT, "artifacts": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
