"""Decoding with a packed model against its bfloat16 original, in one run: tokens per second and resident memory.

    python benchmarks/speed.py ARTIFACT [--model SOURCE] [--tokens 128] [--threads 1] [--rounds 3] [--results FILE]

Each contender is a process of its own, all of them alive at once, and they take turns: whatever else the machine does
meets all of them alike. The original is read from a bfloat16 folder that is written first. A turn goes on greedily
from one prompt for exactly ``--tokens`` tokens, prefill included. ``wall`` is the clock's, the best turn; ``cpu`` is
the processor time of the process, which other programs disturb least. Memory is resident memory beyond what the
process held after its imports, with the tokenizer loaded: the most that it ever was (``peak``, loading included), and
what is left after the turns (``held``). ``weights`` are the bytes of parameters and buffers.

``ulbq`` decodes as ``ulbq generate`` does, the others of torch as transformers does. ``fp16`` is the original's folder
in float16. HQQ, where installed, quantizes the original's blocks to the artifact's bits in
groups of 64 and runs on its PyTorch backend (its fast one, gemlite, wants a GPU). gptqmodel, where installed, runs the
artifact's own codes, converted, with its Torch kernel. llama.cpp runs the original's GGUF file, as many bits as that
has, where the package ``xllamacpp`` is installed.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

PROMPT = "The history of the steam engine begins in the first century, when"
# Other engines, by how their presence shows.
PEERS = {"gptqmodel": "gptqmodel", "HQQ": "hqq", "llama.cpp": "xllamacpp"}
_ROW = ("wall_tokens_per_s", "cpu_tokens_per_s", "prefill_s", "peak_mb", "held_mb", "weights_mb")


def work(source: str, tokens: int, threads: int, kind: str) -> None:
    """Be a contender: load, then take a turn for every line on standard input, and report each as a line of JSON.

    Args:
        kind: ``bf16``, ``fp16``, ``ulbq``, ``hqq`` and the bits, ``gptqmodel``, or ``llama.cpp``.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from ulbq.runtime import calm_threads, peak_memory

    calm_threads()
    import torch
    from transformers import AutoTokenizer

    from ulbq.models.decoding import TextStream, greedy, write_on
    from ulbq.models.load import load_model, model_memory
    from ulbq.models.source import resolve

    torch.set_num_threads(threads)
    if kind == "llama.cpp":
        return work_by_llama_cpp(source, tokens, threads, out)
    if kind == "gptqmodel":
        tokenizer = AutoTokenizer.from_pretrained(source)
        before = resident()
        model = load_by_gptqmodel(source)
    else:
        opened = resolve(source, offline=True)
        tokenizer = opened.tokenizer()
        before = resident()
        model = load_model(opened, dtype=torch.float16 if kind == "fp16" else torch.bfloat16)
    if kind.startswith("hqq"):
        quantize_by_hqq(model, int(kind.removeprefix("hqq")))
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    print(json.dumps({"weights_mb": (model_memory(model).weights + hqq_scales(model)) / 1e6}), file=out)
    for _ in sys.stdin:
        stream = TextStream(tokenizer)
        wall, cpu = time.perf_counter(), time.process_time()
        if kind == "ulbq":
            write_on(model, tokenizer, prompt[0].tolist(), greedy(tokens, at_least=tokens), stream)
        else:
            with torch.inference_mode():
                model.generate(
                    input_ids=prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=stream
                )
        turn = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        memory = {"peak_mb": (peak_memory() - before) / 1e6, "held_mb": (resident() - before) / 1e6}
        turn["prefill"] = stream.times[1] - stream.times[0]
        print(json.dumps(turn | memory | {"text": stream.text}), file=out)


def work_by_llama_cpp(source: str, tokens: int, threads: int, out: TextIO) -> None:
    """Be llama.cpp, with a GGUF file."""
    import xllamacpp

    from ulbq.runtime import peak_memory

    before = resident()
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = source, 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(json.dumps({"weights_mb": Path(source).stat().st_size / 1e6}), file=out)
    asked = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        answer = server.handle_completions(asked)
        turn = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        memory = {"peak_mb": (peak_memory() - before) / 1e6, "held_mb": (resident() - before) / 1e6}
        told = {"prefill": answer["timings"]["prompt_ms"] / 1e3, "text": answer["choices"][0]["text"]}
        print(json.dumps(turn | memory | told), file=out)


def gguf_file(model: str) -> Path | None:
    """The GGUF file of the original; None where it has none."""
    from ulbq.models.source import default_model, resolve

    source = resolve(model, offline=True) if model else default_model(offline=True)
    return source.path if source.kind == "gguf" else None


def quantize_by_hqq(model: Any, bits: int) -> None:
    """Replace the linear layers of all blocks by HQQ's, groups of 64, on its PyTorch backend."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    from ulbq.models.blocks import block_list

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    for block in block_list(model)[1]:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                block.set_submodule(name, HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu"))


def load_by_gptqmodel(folder: str) -> Any:
    """A GPTQ folder on gptqmodel's Torch kernel."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16).model


def hqq_scales(model: Any) -> int:
    """Bytes of the scales and zero points of HQQ's layers, which are neither parameters nor buffers."""
    metas = [layer.meta for layer in model.modules() if type(layer).__name__ == "HQQLinear"]
    return sum(meta[name].nbytes for meta in metas for name in ("scale", "zero"))


def write_gptq(artifact: str, folder: str) -> None:
    """Convert an affine artifact in a process of its own."""
    code = "import sys; from ulbq.commands.app import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "convert", artifact, "--to", "gptq", "-o", folder, "--quiet"]
    subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_original(model: str, folder: str) -> None:
    """Write a model's bfloat16 folder."""
    import torch

    from ulbq.models.load import load_model
    from ulbq.models.source import default_model, resolve

    source = resolve(model, offline=True) if model else default_model(offline=True)
    load_model(source, dtype=torch.bfloat16).save_pretrained(folder)
    source.save_tokenizer_files(Path(folder))


class Contender:
    """A worker and what it reported."""

    def __init__(self, name: str, source: str, options: argparse.Namespace, kind: str = "bf16") -> None:
        self.name = name
        words = [sys.executable, __file__, source, "--worker", "--kind", kind, "--tokens", str(options.tokens)]
        self._process = subprocess.Popen(
            [*words, "--threads", str(options.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._weights = self._read()["weights_mb"]
        self._turns: list[dict[str, Any]] = []
        self._tokens = options.tokens

    def turn(self) -> None:
        """Let it decode once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._turns.append(self._read())

    def row(self) -> dict[str, Any]:
        """Its figures; the first turn warms up and counts for memory alone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        timed = self._turns[1:]
        last = self._turns[-1]
        return {
            "name": self.name,
            "wall_tokens_per_s": round(self._tokens / min(turn["wall"] for turn in timed), 2),
            "cpu_tokens_per_s": round(self._tokens / min(turn["cpu"] for turn in timed), 2),
            "prefill_s": round(min(turn["prefill"] for turn in timed), 3),
            "peak_mb": round(last["peak_mb"]),
            "held_mb": round(last["held_mb"]),
            "weights_mb": round(self._weights),
            "text": last["text"][:120],
        }

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed, see above")
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> None:
    """Run the contenders in turns and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", help="a quantized artifact")
    parser.add_argument("--model", default="", help="its original (default: the default model)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each, after one that warms up")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="bf16", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.source, options.tokens, options.threads, options.kind)
    if options.write:
        return write_original(options.model, options.write)

    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: this one stays small, and is forked from.
        words = [sys.executable, __file__, options.source, "--model", options.model, "--write", folder]
        subprocess.run(words, check=True)
        contenders = [Contender("bf16", folder, options), Contender("ulbq", options.source, options, "ulbq")]
        contenders.append(Contender("fp16", folder, options, "fp16"))
        bits = whole_bits(options.source)
        if importlib.util.find_spec("hqq") is not None and bits is not None:
            contenders.append(Contender(f"HQQ, {bits} bits, PyTorch", folder, options, f"hqq{bits}"))
        if importlib.util.find_spec("gptqmodel") is not None and bits in (2, 3, 4, 8):
            write_gptq(options.source, f"{folder}/gptq")
            contenders.append(Contender(f"gptqmodel, {bits} bits, Torch", f"{folder}/gptq", options, "gptqmodel"))
        file = gguf_file(options.model)
        if importlib.util.find_spec("xllamacpp") is not None and file is not None:
            contenders.append(Contender(f"llama.cpp, {file.stem.rpartition('.')[2]}", str(file), options, "llama.cpp"))
        for _ in range(options.rounds + 1):
            for contender in contenders:
                contender.turn()
        rows = [contender.row() for contender in contenders]
    report(rows, options)


def whole_bits(source: str) -> int | None:
    """Bits of an affine artifact's codes that HQQ has too; None for others."""
    from ulbq.artifacts.manifest import QuantizedManifest, read_manifest

    manifest = read_manifest(Path(source))
    scheme = manifest.scheme if isinstance(manifest, QuantizedManifest) else {}
    return scheme["bits"] if scheme.get("format") == "affine" and scheme["bits"] in (1, 2, 3, 4, 8) else None


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, and write it."""
    from rich.console import Console
    from rich.table import Table

    from ulbq import runtime
    from ulbq.artifacts.manifest import QuantizedManifest, read_manifest

    manifest = read_manifest(Path(options.source))
    bits = manifest.bits.bits_per_weight if isinstance(manifest, QuantizedManifest) else None
    base = rows[0]
    table = Table(title=f"{manifest.name}, {bits or 16:.2f} bits a weight: {options.tokens} tokens")
    for heading in ("", *_ROW, "times bf16 (wall)", "(cpu)"):
        table.add_column(heading.replace("_", " "))
    for row in rows:
        row["times_bf16_wall"] = round(row["wall_tokens_per_s"] / base["wall_tokens_per_s"], 2)
        row["times_bf16_cpu"] = round(row["cpu_tokens_per_s"] / base["cpu_tokens_per_s"], 2)
        table.add_row(row["name"], *(str(row[key]) for key in (*_ROW, "times_bf16_wall", "times_bf16_cpu")))
    peers = {}
    measured = {row["name"] for row in rows}
    for name, module in PEERS.items():
        if any(row.startswith(name) for row in measured):
            continue
        there = importlib.util.find_spec(module) is not None
        peers[name] = "installed, but there is nothing to run it with" if there else "not installed"
        table.add_row(name, peers[name])
    Console(width=150).print(table)
    if options.results:
        found = {
            "device": f"{_processor()}, {options.threads} threads",
            "versions": runtime.versions(),
            "artifact": manifest.name,
            "bits_per_weight": bits,
            "tokens": options.tokens,
            "rows": rows,
            "peers": peers,
        }
        options.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
