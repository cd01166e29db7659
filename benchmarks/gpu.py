"""What a GPU is asked: right, fast, and how much of its memory, in parts of a few minutes each.

    python benchmarks/gpu.py [--parts tests kernels …] [--minutes 8] [--results FILE]
                             [--autoround PYTHON] [--efficientqat FOLDER]
    python benchmarks/gpu.py --device cpu --tiny

Each part is a process of its own, so that a kernel that breaks the device, or a lack of memory, ends that part alone.
Parts come in the order of the list until the minutes are over; a part that failed says why, and one that there was no
time for is run by the next call: results are added to what the file has. On a GPU the file is
``benchmarks/results/gpu-NAME.json``, which ``docs/gpu.md`` reads (``benchmarks/tables.py``).

It wants torch, triton, transformers, peft, pydantic, gguf and what they need, and pytest for ``tests``; no data sets
and no lm-eval. Where the default model's file is missing a random model of its shape takes its place.

* ``tests``: ``pytest -m gpu``.
* ``kernels``: products of 1 to 128 rows in every format beside cuBLAS in bfloat16, and beside Humming, gemlite and
  gptqmodel where they are installed. ``graph`` is the time of a product in a CUDA graph, ``eager`` without one, in
  microseconds; ``of_copy`` the packed bytes over the time of ``graph`` as a share of the bandwidth of a copy.
* ``training``: a block of Llama-2-7B's shape beside AutoRound and the EfficientQAT authors' loop (``block_time.py``).
* ``methods``: ``gptq``, ``claq``, ``efficientqat`` and ``trellis`` on CPU and GPU: seconds, and perplexities on text
  that the model wrote.
* ``resume``: a run is killed after its first block and goes on; blocks that are not those of a run that was not killed.
* ``decoding``: tokens per second with and without CUDA graphs, behind the first.
* ``large``: a block of Llama-70B's shape through ``gptq`` and through block training; most memory of device and host.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import block_time
import matmul
import peers
import torch
from safetensors.torch import load_file, save_file

from ulbq import formats, kernels, runtime
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import ResourceError
from ulbq.evaluation.perplexity import perplexity
from ulbq.formats import AffineScheme, AnyScheme
from ulbq.kernels import dispatch
from ulbq.kernels.block_sizes import slug
from ulbq.models.decoding import TextStream, greedy, write_on
from ulbq.models.graph_decoding import record
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, default_model, resolve
from ulbq.pipeline.predict import heldout_samples
from ulbq.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
ROWS = (1, 4, 16, 32, 64, 128)
SHAPES = ((4096, 4096), (8192, 8192), (11008, 4096))
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
DEFAULT = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 3, "group_size": 64},
    "claq": {"bits": 3},
    "efficientqat": {"bits": 2, "group_size": 64, "epochs": 1},
    "trellis": {"bits": 2},
}
# Launches between two looks at the clock.
_LAUNCHES = 48

Result = dict[str, Any]


def random_model(folder: Path, shape: dict[str, int], layers: int, vocabulary: int, device: str) -> Path:
    """A random Llama in bfloat16 with a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(
            **shape, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=False, dtype="bfloat16"
        )
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def random_tokens(path: Path, samples: int, length: int, vocabulary: int) -> Path:
    """Random samples, and those that are held out, as ``--calibration`` takes them."""
    shape = samples + heldout_samples(samples), length
    tokens = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens.int()}, path)
    return path


def tests(options: Namespace, folder: Path) -> Result:
    """``pytest -m gpu``: its last line, and how it ended."""
    chosen = ["-m", "not slow", "tests/test_printable.py"] if options.tiny else ["-m", "gpu", "tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit": done.returncode, "summary": lines[-1] if lines else done.stderr[-300:], "broken": broken[:20]}


def microseconds(calls: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> tuple[float | None, float]:
    """Of a product in a CUDA graph and without one, the weight another one each time; least of a few rounds."""

    def launch() -> None:
        for turn in range(_LAUNCHES):
            calls[turn % len(calls)](x)

    if x.device.type == "cpu":
        begun = time.perf_counter()
        for call in calls:
            call(x)
        return None, (time.perf_counter() - begun) / len(calls) * 1e6
    _, replay = record(launch, lambda: None)
    return _events(replay), _events(launch)


def _events(work: Callable[[], object]) -> float:
    found = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / _LAUNCHES * 1e3)
    return float(min(found))


def kernel_rows(scheme: AnyScheme, outs: int, columns: int, counts: tuple[int, ...], device: str) -> list[Result]:
    """One matrix, all numbers of rows."""
    stored = {name: tensor.to(device) for name, tensor in matmul.random_matrix(scheme, outs, columns).items()}
    weight = formats.dequantize(scheme, stored, columns)
    contenders, sizes = {"bf16": matmul.dense_call(weight.bfloat16())}, {"bf16": 2 * outs * columns}
    device_type = torch.device(device).type
    for layout in dispatch.LAYOUTS:
        if layout.device == device_type and not (
            dispatch.unsupported_reason(layout, scheme, outs, columns, device_type) or layout.unavailable_reason()
        ):
            ready = kernels.Ready(layout, layout.pack(scheme, stored, outs, columns))
            contenders[layout.name] = matmul.packed_call(scheme, outs, ready)
            sizes[layout.name] = sum(tensor.nbytes for tensor in stored.values())
    own = set(contenders)
    rows: list[Result] = []
    if isinstance(scheme, AffineScheme):
        for name, made in peers.calls(scheme, stored, weight, matmul.turns).items():
            contenders[name], sizes[name] = made[:2]
    for count in counts:
        x = torch.randn(count, columns, device=device).bfloat16()
        exact = formats.multiply(scheme, stored, x.float(), formats.matrix(scheme, stored, columns))
        for name, calls in contenders.items():
            row: Result = {"shape": f"{outs} × {columns}", "scheme": scheme.label, "rows": count, "kernel": name}
            try:
                graph, eager = microseconds(calls, x)
                error = ((calls[0](x).float() - exact).norm() / exact.norm()).item()
                row |= {"graph": graph and round(graph, 2), "eager": round(eager, 2), "error": float(f"{error:.2e}")}
                row["gb_per_s"] = round(sizes[name] / (graph or eager) / 1e3, 2)
            except Exception as problem:  # another package's, whatever it raises: it is told, and the rest goes on
                if name in own:
                    raise
                row["failed"] = " ".join(str(problem).split())[:200]
            rows.append(row)
    return rows


@torch.no_grad()
def kernel_table(options: Namespace, folder: Path) -> Result:
    """Every format and number of bits."""
    torch.manual_seed(0)
    shapes, counts = (((192, 256),), (1, 3)) if options.tiny else (SHAPES, ROWS)
    if options.device == "cpu":
        copied = matmul.copy_bandwidth()
    else:
        source = torch.zeros(1 << 30, dtype=torch.uint8, device=options.device)
        target = torch.empty_like(source)
        times = microseconds([target.copy_], source)
        copied = 2 * source.nbytes / (times[0] or times[1]) * 1e6
        del source, target
    rows = []
    for outs, columns in shapes:
        for scheme in matmul.SCHEMES:
            rows += kernel_rows(scheme, outs, columns, counts, options.device)
    for row in rows:
        if "gb_per_s" in row:
            row["of_copy"] = round(row["gb_per_s"] * 1e9 / copied, 3)
    return {"copy_gb_per_s": round(copied / 1e9, 1), "rows": rows}


def training(options: Namespace, folder: Path) -> Result:
    """Two blocks, of which the second counts, in turns with the others where they are."""
    shape, length, vocabulary = (TINY, 16, 300) if options.tiny else (LLAMA_7B, 1024, 4096)
    samples = 4 if options.tiny else 32
    model = random_model(folder / "model", shape, 2, vocabulary, options.device)
    calibration = random_tokens(folder / "tokens.safetensors", samples, length, vocabulary)
    task: Result = {
        **{"precision": "bf16", "samples": samples, "batch_size": 2, "passes": 2, "threads": torch.get_num_threads()},
        **{"device": options.device, "blocks": 2, "group_size": 32 if options.tiny else 64, "compile": None},
        **{"method": block_time.METHOD, "model": str(model), "source": str(model), "calibration": str(calibration)},
        "efficientqat": str(options.efficientqat),
    }
    names = {"ours": sys.executable} | ({"autoround": options.autoround} if options.autoround else {})
    names |= {"efficientqat": sys.executable} if options.efficientqat else {}
    rows = block_time.compete(names, task, load_file(calibration)["tokens"].long(), folder)
    steps = task["passes"] * -(-samples // task["batch_size"])
    found = {name: block_time.summary(row, task["batch_size"] * length, steps) for name, row in rows.items()}
    return {"medians": found, "rows": rows}


def _default(options: Namespace, folder: Path) -> tuple[ModelSource, str]:
    """The default model, or where it is missing a random one of its shape."""
    if not options.tiny:
        try:
            return default_model(offline=True), "the default model"
        except ResourceError:
            pass
    shape, layers, vocabulary = (TINY, 2, 300) if options.tiny else (DEFAULT, 30, 8192)
    return resolve(str(random_model(folder / "model", shape, layers, vocabulary, options.device))), "random weights"


def _quantize(
    source: ModelSource, method: str, device: str, out: Path, tokens: Path, **given: Any
) -> QuantizedManifest:
    request = QuantizeRequest(
        source=str(source.given), method=method, device=device, calibration=str(tokens), out=out, offline=True, **given
    )
    return quantize(request)[1]


def methods(options: Namespace, folder: Path) -> Result:
    """Each method on both devices; text is the model's own, so that no data are wanted."""
    source, name = _default(options, folder)
    samples, length = (3, 16) if options.tiny else (16, 256)
    model = load_model(source, dtype=torch.float32, device=options.device)
    start = torch.randint(3, model.config.vocab_size, (2 * samples, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    written = model.generate(  # type: ignore[operator]
        start.to(options.device), do_sample=True, min_new_tokens=length - 4, max_new_tokens=length - 4, pad_token_id=0
    ).cpu()
    drawn, windows = written.split(samples)
    extra = drawn[: heldout_samples(samples)].flip(0)
    tokens = folder / "tokens.safetensors"
    save_file({"tokens": torch.cat([drawn, extra]).int().contiguous()}, tokens)
    full = perplexity(model, windows.to(options.device)).value
    rows = []
    for method, given in METHODS.items():
        for device in dict.fromkeys(["cpu", options.device]):
            out, begun = folder / f"{method}-{device}", time.perf_counter()
            sized = given | ({"group_size": 32} if options.tiny and "group_size" in given else {})
            manifest = _quantize(source, method, device, out, tokens, samples=samples, sequence_length=length, **sized)
            seconds = time.perf_counter() - begun
            packed = load_model(resolve(str(out)), dtype=torch.bfloat16, device=options.device)
            value = perplexity(packed, windows.to(options.device)).value
            errors = [layer.error for layer in manifest.layers]
            rows.append(
                {"method": method, "device": device, "seconds": round(seconds, 1), "perplexity": round(value, 3)}
                | {"mean_layer_error": float(f"{sum(errors) / max(len(errors), 1):.4e}")}
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"model": name, "full": round(full, 3), "rows": rows}


def resume(options: Namespace, folder: Path) -> Result:
    """``gptq`` killed after its first block, gone on with, and beside it one that was let be."""
    source, name = _default(options, folder)
    samples, length = (3, 16) if options.tiny else (16, 256)
    tokens = random_tokens(folder / "tokens.safetensors", samples, length, source.config.get_text_config().vocab_size)

    def start(out: Path) -> subprocess.Popen[bytes]:
        words = [source.given, "--method", "gptq", "--bits", 3, "--group-size", 32, "--device", options.device]
        words += ["--samples", samples, "--sequence-length", length, "--calibration", tokens, "--offline", "-o", out]
        return subprocess.Popen([sys.executable, "-m", "ulbq", "quantize", *map(str, words)], stdout=subprocess.DEVNULL)

    killed, whole = folder / "killed", folder / "whole"
    first = folder / "killed.partial" / "model-block-00000.safetensors"
    process = start(killed)
    while not first.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    stopped = process.wait() == -signal.SIGKILL
    codes = [start(out).wait() for out in (killed, whole)]
    sums = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("model-block-*.safetensors")}
        for out in (killed, whole)
    ]
    different = sorted(block for block, found in sums[1].items() if sums[0].get(block) != found)
    return {"model": name, "killed": stopped, "exits": codes, "blocks": len(sums[1]), "different": different}


@torch.inference_mode()
def decoding(options: Namespace, folder: Path) -> Result:
    """Tokens per second of the packed model and of the full one, behind the first new token."""
    source, name = _default(options, folder)
    out = folder / "packed"
    group = 32 if options.tiny else 64
    quantize(
        QuantizeRequest(
            source=str(source.given),
            method="rtn",
            bits=2,
            group_size=group,
            device=options.device,
            out=out,
            offline=True,
        )
    )
    new = 8 if options.tiny else 128
    rows = []
    for given, label in ((resolve(str(out)), "rtn, 2 bits"), (source, "bf16")):
        model, tokenizer = load_model(given, dtype=torch.bfloat16, device=options.device), given.tokenizer()
        for graphs in (False, True) if options.device != "cpu" else (False,):
            found = []
            for _ in range(4):  # the first compiles, and records
                stream = TextStream(tokenizer)
                write_on(model, tokenizer, [1] * 8, greedy(new, at_least=new), stream, cuda_graphs=graphs)
                found.append(stream.tokens_per_second or 0.0)
            rows.append({"weights": label, "graphs": graphs, "tokens_per_second": max(found)})
    return {"model": name, "rows": rows}


def large(options: Namespace, folder: Path) -> Result:
    """One block: solved with second moments of enough tokens to be factored, then trained."""
    shape, vocabulary = (TINY, 300) if options.tiny else (LLAMA_70B, 1024)
    source = resolve(str(random_model(folder / "model", shape, 1, vocabulary, options.device)))
    group = 32 if options.tiny else 64
    cases: dict[str, dict[str, Any]] = {
        "gptq": {"bits": 3, "samples": 4 if options.tiny else 32, "sequence_length": 16 if options.tiny else 512},
        "efficientqat": {"bits": 2, "epochs": 1, "batch_size": 2, "samples": 4 if options.tiny else 8}
        | {"sequence_length": 16 if options.tiny else 1024},
    }
    rows = []
    for method, given in cases.items():
        tokens = folder / f"{method}.safetensors"
        random_tokens(tokens, given["samples"], given["sequence_length"], vocabulary)
        runtime.forget_peak_memory()
        if options.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        _quantize(source, method, options.device, folder / method, tokens, group_size=group, **given)
        row: Result = {"method": method, "seconds": round(time.perf_counter() - begun, 1)}
        row["host_gb"] = round(runtime.peak_memory() / 1e9, 2)
        if options.device != "cpu":
            row["device_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        rows.append(row)
    return {"rows": rows}


PARTS: dict[str, Callable[[Namespace, Path], Result]] = {
    "tests": tests,
    "kernels": kernel_table,
    "large": large,
    "training": training,
    "methods": methods,
    "resume": resume,
    "decoding": decoding,
}


def alone(part: str, given: list[str], seconds: float) -> Result:
    """Run a part in a process of its own; what it found, or why it did not."""
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile("r", suffix=".json") as found:
        command = [sys.executable, __file__, *given, "--alone", part, "--found", found.name]
        # A session of its own: what it started ends with it.
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=sys.stderr, text=True, start_new_session=True
        )
        try:
            _, errors = process.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"failed": f"stopped after {seconds:.0f} s"}
        taken = round(time.perf_counter() - begun, 1)
        if process.returncode:
            last = [line for line in errors.splitlines() if line.strip()][-1:]
            return {"failed": " ".join(last)[:400] or f"exit {process.returncode}", "seconds": taken}
        return {"seconds": taken, **json.loads(found.read())}


def main() -> None:
    """Run parts one after the other, and write each one's result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8, help="after which no part is started, or left running")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and matrices: whether it runs at all")
    parser.add_argument("--again", action="store_true", help="run parts that the results have, too")
    parser.add_argument("--results", type=Path, help="without, benchmarks/results/gpu-NAME.json on a GPU")
    parser.add_argument("--autoround", metavar="PYTHON", help="of an environment with auto-round")
    parser.add_argument("--efficientqat", metavar="FOLDER", type=Path, help="with the authors' repository")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This machine has no CUDA GPU; `--device cpu --tiny` tries the parts themselves.")
    if options.alone:
        runtime.calm_threads()
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[options.alone](options, Path(folder))
        options.found.write_text(json.dumps(found), encoding="utf-8")
        return
    end = time.monotonic() + 60 * options.minutes
    name = runtime.describe_device(torch.device(options.device))
    path = options.results
    if path is None and options.device == "cuda" and not options.tiny:
        path = ROOT / "benchmarks" / "results" / f"gpu-{slug(name)}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    parts: Result = known.get("parts", {})
    for part in options.parts:
        left = end - time.monotonic()
        if left <= 0 or (not options.again and "failed" not in parts.get(part, {"failed": ""})):
            continue
        parts[part] = alone(part, sys.argv[1:], left)
        print(json.dumps({part: parts[part]}), flush=True)
        if path:
            facts = {"device": name, "tiny": options.tiny, "versions": runtime.versions(), "parts": parts}
            path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
