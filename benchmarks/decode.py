"""Decoding and reading a prompt on a CPU in every packed format, beside bfloat16 and llama.cpp, in one run.

    python benchmarks/decode.py [--shape default] [--threads 1] [--only NAME …] [--rounds 3] [--results FILE]
        [--gguf FILE] [--head-bits 4]

Weights are random: time depends on their number and format alone. ``default`` has the shapes of the default model,
``7b`` those of eight layers of Llama-2-7B. Contenders are processes of their own
that take turns, one round to warm up. A turn is ``--tokens`` tokens from a prompt of 16, and a prompt of 256.
``decode`` are tokens per second behind the first new one, ``prompt`` those of the prompt per second, of the best turn;
``peak`` is the most resident memory beyond the imports, in MB. bfloat16 is transformers as it is, formats go
as ``ulbq generate`` does, with a head in bfloat16, or in the bits of ``--head-bits`` as ``ulbq quantize`` packs it;
where it is tied, it is the table of tokens. llama.cpp, where ``xllamacpp`` is installed, has 4.5 bits (Q4_0) or the
original file.

A file of results (``benchmarks/results/decode-cpu.json``, which ``tables.py`` reads) may be filled by several runs,
each with some contenders: every row has what llama.cpp did in turns with it. Rows that are there stay.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMATS = ("affine", "affine-3", "affine-4", "codebook", "dual-binary", "binary-mos", "trellis")
SHAPES: dict[str, dict[str, int]] = {
    "default": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
OWN_FILE = "llama.cpp, own file"
START, PROMPT = 16, 256


def scheme_of(name: str) -> Any:
    """The format of a contender."""
    from ulbq import formats

    if name.startswith("affine"):
        return formats.AffineScheme(bits=int(name.partition("-")[2] or 2), group_size=64)
    kinds = {
        "codebook": lambda: formats.CodebookScheme(bits=2),
        "dual-binary": lambda: formats.DualBinaryScheme(group_size=64),
        "binary-mos": lambda: formats.BinaryMosScheme(experts=4),
        "trellis": lambda: formats.TrellisScheme(bits=2),
    }
    return kinds[name]()


def titled(name: str, head_bits: int | None) -> str:
    """What the row of a contender is called."""
    packed = name != "bf16" and not name.startswith("llama.cpp") and head_bits
    return f"{name}, head {head_bits} bits" if packed else name


def random_model(shape: str, name: str, head_bits: int | None) -> Any:
    """A model of Llama's kind with random weights: bfloat16, or its blocks in a format, and its head packed or not."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ulbq.models.packed_tables import chosen_tables
    from ulbq.nn.quant_embedding import QuantEmbedding, swap_table
    from ulbq.nn.quant_linear import QuantLinear

    config = LlamaConfig(tie_word_embeddings=shape == "default", **SHAPES[shape])
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    def drawn(packed: Any) -> Any:
        for tensor in packed.buffers():
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256, generator=generator)
            else:
                tensor.normal_(0, 0.01, generator=generator)
        packed.prepare()
        return packed

    def linear(scheme: Any, layer: Any) -> Any:
        return drawn(QuantLinear(scheme, layer.in_features, layer.out_features, dtype=torch.bfloat16))

    tables = {} if name == "bf16" else chosen_tables(model, None, head_bits)
    for path, layer in [*model.model.layers.named_modules()] if name != "bf16" else []:
        if isinstance(layer, torch.nn.Linear):
            model.model.layers.set_submodule(path, linear(scheme_of(name), layer))
    for table, scheme in tables.items():
        if table.name == "lm_head":
            model.lm_head = linear(scheme, table)
        else:
            packed = QuantEmbedding(scheme, model.model.embed_tokens, dtype=torch.bfloat16)
            swap_table(model, table.name, drawn(packed), ["lm_head"])
    for path, parameter in [*model.named_parameters()]:
        if parameter.is_meta:
            some = torch.empty(1 << 20, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            values = some.repeat(-(-parameter.numel() // len(some)))[: parameter.numel()].view(parameter.shape)
            if values.ndim == 1:
                values = torch.ones_like(values)
            model.get_submodule(path.rpartition(".")[0])._parameters[path.rpartition(".")[2]] = torch.nn.Parameter(
                values, requires_grad=False
            )
    if not tables:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def gguf_file(shape: str, path: str) -> None:
    """Write random Q4_0 weights, with a vocabulary of made-up words."""
    import gguf
    import numpy

    of = SHAPES[shape]
    hidden, inner, heads, shared = (
        of[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    vocabulary = of["vocab_size"]
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(3, vocabulary))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * (vocabulary - 3)]
    )
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(of["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    generator = numpy.random.default_rng(0)

    def matrix(name: str, outs: int, columns: int) -> None:
        blocks = generator.integers(0, 256, (outs, columns // 32, 18), dtype=numpy.uint8)
        blocks[:, :, :2] = numpy.frombuffer(numpy.float16(0.005).tobytes(), numpy.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(outs, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(hidden, numpy.float32))

    matrix("token_embd", vocabulary, hidden)
    if shape != "default":
        matrix("output", vocabulary, hidden)
    norm("output_norm")
    width = hidden // heads * shared
    for index in range(of["num_hidden_layers"]):
        block = f"blk.{index}"
        for name in ("attn_norm", "ffn_norm"):
            norm(f"{block}.{name}")
        sizes = {
            "attn_q": (hidden, hidden),
            "attn_k": (width, hidden),
            "attn_v": (width, hidden),
            "attn_output": (hidden, hidden),
        }
        sizes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        for name, (outs, columns) in sizes.items():
            matrix(f"{block}.{name}", outs, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prompt(count: int, turn: int) -> list[int]:
    """Tokens that no earlier turn had."""
    return [1000 + (31 * index + 7919 * turn) % 30000 for index in range(count)]


def work(options: argparse.Namespace) -> None:
    """Be a contender: a turn for every line on standard input, each reported as a line of JSON."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from ulbq.runtime import calm_threads, peak_memory

    calm_threads()
    import torch

    from ulbq.models.source import default_model

    torch.set_num_threads(options.threads)
    tokenizer = default_model(offline=True).tokenizer()
    before = resident()
    turns = by_llama_cpp(options) if options.worker.startswith("llama.cpp") else by_torch(options, tokenizer)
    print("ready", file=out)
    for turn, _ in enumerate(sys.stdin):
        decode, read = turns(turn)
        row = {"decode": decode, "prompt": read, "peak": (peak_memory() - before) / 1e6}
        print(json.dumps(row), file=out)


def by_torch(options: argparse.Namespace, tokenizer: Any) -> Any:
    """A turn of transformers', or of ours."""
    import torch

    from ulbq.models.decoding import TextStream, greedy, write_on

    model = random_model(options.shape, options.worker, options.head_bits)
    model.generation_config.eos_token_id = None

    def write(tokens: list[int], count: int) -> TextStream:
        stream = TextStream(tokenizer)
        if options.worker != "bf16":
            write_on(model, tokenizer, tokens, greedy(count, at_least=count), stream)
        else:
            ids = torch.tensor([tokens])
            model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=stream, pad_token_id=0
            )
        return stream

    def turn(number: int) -> tuple[float, float]:
        written = write(prompt(START, number), options.tokens)
        return (options.tokens - 1) / written.decode_seconds, PROMPT / write(prompt(PROMPT, number), 1).prefill_seconds

    return turn


def by_llama_cpp(options: argparse.Namespace) -> Any:
    """A turn of llama.cpp's."""
    import xllamacpp

    from ulbq.models.source import default_model

    file = str(default_model(offline=True).path) if options.worker == OWN_FILE else options.file
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = file, 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)

    def write(tokens: list[int], count: int) -> dict[str, Any]:
        asked = {"prompt": tokens, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        timings: dict[str, Any] = server.handle_completions(asked)["timings"]
        return timings

    def turn(number: int) -> tuple[float, float]:
        written = write(prompt(START, number), options.tokens)
        return written["predicted_per_second"], write(prompt(PROMPT, number), 1)["prompt_per_second"]

    return turn


def main() -> None:
    """Run the contenders in turns and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="contenders (default: all)")
    parser.add_argument("--head-bits", type=int, choices=(8, 6, 4), help="of our formats' heads (default: bfloat16)")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each, after one that warms up")
    parser.add_argument("--results", type=Path, help="add the rows to a file of JSON")
    parser.add_argument("--gguf", type=Path, help="where llama.cpp's random weights lie, or are put (default: nowhere)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    found: dict[str, Any] = {"rows": {}}
    if options.results and options.results.exists():
        found = json.loads(options.results.read_text(encoding="utf-8"))
    known = found["rows"].setdefault(f"{options.shape}, {options.threads}", {})
    names = [name for name in options.only or ["bf16", *FORMATS] if titled(name, options.head_bits) not in known]
    if not names:
        return
    if importlib.util.find_spec("xllamacpp") is not None:
        names = list(dict.fromkeys([*names, "llama.cpp"]))
        if options.shape == "default" and not options.only and OWN_FILE not in known:
            names.append(OWN_FILE)
    with tempfile.TemporaryDirectory() as folder:
        file = options.gguf or Path(folder) / "random.gguf"
        if "llama.cpp" in names and not file.exists():
            gguf_file(options.shape, str(file))
        found_rows = measure(names, str(file), options)
    rows = {titled(name, options.head_bits): row for name, row in found_rows.items()}
    for name, row in rows.items():
        print(f"{name:28}", *(f"{key} {value:9.2f}" for key, value in row.items()))
        beside = {f"llama.cpp {key}": value for key, value in rows.get("llama.cpp", {}).items()}
        known[name] = {key: round(value, 2) for key, value in (row | beside).items()}
    known.pop("llama.cpp", None)
    if options.results:
        found["processor"] = processor()
        options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """What this machine calls its own."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def measure(names: list[str], file: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The best of each contender's turns."""
    words = [sys.executable, __file__, "--shape", options.shape, "--tokens", str(options.tokens)]
    words += ["--threads", str(options.threads), "--file", file]
    words += [*(["--head-bits", str(options.head_bits)] if options.head_bits else []), "--worker"]
    workers, turns = {}, {name: list[dict[str, float]]() for name in names}
    for name in names:
        process = subprocess.Popen([*words, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        workers[name] = (process, process.stdin, process.stdout)
    for _ in range(options.rounds + 1):
        for name, (_, given, told) in workers.items():
            print(file=given, flush=True)
            turns[name].append(json.loads(told.readline()))
            time.sleep(0.05)
    for process, given, _ in workers.values():
        given.close()
        process.wait()
    return {name: {key: max(turn[key] for turn in found[1:]) for key in found[0]} for name, found in turns.items()}


if __name__ == "__main__":
    main()
