"""Q2_K, Q3_K and Q4_K as ``gptq --k-quant`` finds them, beside llama.cpp's own quantizer with an importance matrix.

    python tests/export/readers/environments.py /tmp/readers llama-cpp
    python benchmarks/k_quants.py --readers /tmp/readers [--bits 2 3 4] [--seed 0] [--mixed] [--folder DIR]
        [--results FILE]

256 does not divide the default model's hidden size of 576. A copy of it has 768, three heads and a key-value head more,
all zeros: it computes the same. Both sides quantize all linear layers of its blocks and nothing else, from the same
samples of 512 tokens of WikiText-2 ``train``. The importance matrix is llama.cpp's: the mean squared inputs of each
layer in full precision. Its quantizer is the compiled one (``ggml_quantize_chunk``), with one type for all layers;
``--mixed`` adds what ``llama-quantize … Q2_K`` mixes: Q3_K for values, attention outputs and ``down_proj``. Perplexity
is that of WikiText-2 ``test``, context 1024, of the weights that the blocks decode to, in bf16; llama.cpp rounds
activations to eight bits besides. A file of results (``benchmarks/results/k-quants-cpu.json``, which ``tables.py``
reads) may be filled by several runs, each with another seed, which draws the samples.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from quality import evaluation, ulbq
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ulbq.artifacts import QuantizedManifest, read_manifest
from ulbq.data.calibration import CALIBRATION_FILE, load_calibration
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.runtime import describe_device, versions

KINDS = {bits: GGMLQuantizationType[f"Q{bits}_K"] for bits in (2, 3, 4)}
_MIXED = ("v_proj", "o_proj", "down_proj")


def widened(folder: Path) -> None:
    """The default model with a hidden size of 768, the same function."""
    source = resolve("smollm2-135m")
    narrow = load_model(source, dtype=torch.float32)
    config, wide = narrow.config, 768
    share = config.hidden_size / wide  # of the values that a norm takes the mean of
    changes = {"hidden_size": wide, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    made = type(config)(**{**config.to_dict(), **changes, "rms_norm_eps": config.rms_norm_eps * share})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = narrow.get_parameter(name)
            parameter.zero_()[tuple(slice(size) for size in part.shape)] = part * share**0.5 if "norm" in name else part
        tokens = torch.arange(1000, 1032).unsqueeze(0)
        torch.testing.assert_close(model(tokens).logits, narrow(tokens).logits, atol=2e-3, rtol=0)
    model.save_pretrained(folder)
    source.save_tokenizer_files(folder)


def importances(model: PreTrainedModel, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean squared inputs ``[in]`` of the linear layers in blocks, over token samples ``[n, length]``."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].float().square().flatten(0, -2).sum(0)
            found[name] = found[name] + squares if name in found else squares

        return see

    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and ".layers." in name}
    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for sample in samples:
            model(sample.unsqueeze(0), use_cache=False)
    for one in hooks:
        one.remove()
    return {name: total / samples.numel() for name, total in found.items()}


def theirs(source: Path, samples: torch.Tensor, kinds: Mapping[int, Path], readers: Path) -> dict[int, float]:
    """Write models of the weights that llama.cpp's blocks decode to; true bits by the key, 0 for the mixture."""
    model = load_model(resolve(source), dtype=torch.float32)
    importance = importances(model, samples)
    weights = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in importance}
    bits: dict[int, float] = {}
    for key, folder in kinds.items():
        with tempfile.TemporaryDirectory() as scratch:
            chosen = {name: KINDS[key or (3 if name.endswith(_MIXED) else 2)] for name in weights}
            for name, weight in weights.items():
                given = {"weight": weight.numpy(), "importance": importance[name].numpy(), "kind": chosen[name]}
                np.savez(Path(scratch, f"{name}.npz"), **given)
            worker = Path(__file__).with_name("workers") / "llama_cpp_blocks.py"
            subprocess.run([readers / "llama-cpp" / "bin" / "python", worker, scratch], check=True)
            size = 0
            for name, kind in chosen.items():
                blocks = np.load(Path(scratch, f"{name}.npy"))
                size += 8 * blocks.nbytes
                with torch.no_grad():
                    model.get_parameter(f"{name}.weight").copy_(torch.from_numpy(dequantize(blocks, kind)))
        bits[key] = size / sum(weight.numel() for weight in weights.values())
        model.save_pretrained(folder, state_dict={name: one.bfloat16() for name, one in model.state_dict().items()})
        resolve(source).save_tokenizer_files(folder)
    return bits


def main() -> None:
    """Make and measure what is not there yet, print a row each and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=Path, required=True, help="where the environment llama-cpp is")
    parser.add_argument("--bits", type=int, nargs="+", default=[2], choices=KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--mixed", action="store_true", help="llama.cpp's mixture of types, too")
    parser.add_argument("--samples", default="32", help="that both sides see")
    parser.add_argument("--windows", default="32", help="that perplexity is taken of")
    parser.add_argument("--folder", type=Path, help="where models stay; artifacts that are there are not made again")
    parser.add_argument("--results", type=Path, help="add the rows to a file of JSON")
    options = parser.parse_args()
    measured: dict[str, Any] = {"samples": int(options.samples), "windows": int(options.windows), "rows": []}
    if options.results and options.results.is_file():
        before = json.loads(options.results.read_text(encoding="utf-8"))
        if any(before[name] != measured[name] for name in ("samples", "windows")):
            parser.error(f"{options.results} has {before['samples']} samples and {before['windows']} windows")
        measured = before
    folder = (options.folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wide, found, seed = folder / "wide", {"wide": 16.0}, str(options.seed)
    if not wide.is_dir():
        widened(wide)
    for bits in options.bits:
        name = f"gptq-q{bits}_k-s{seed}"
        if not (folder / name).is_dir():
            method = ("--method", "gptq", "--bits", str(bits), "--k-quant", "--seed", seed)
            drawn = ("--calibration", "wikitext2", "--samples", options.samples, "--sequence-length", "512")
            ulbq("quantize", "wide", *method, *drawn, "-o", name, folder=folder)
        manifest = read_manifest(folder / name)
        found[name] = manifest.bits.bits_per_weight if isinstance(manifest, QuantizedManifest) else 0.0
    samples = load_calibration(folder / f"gptq-q{options.bits[0]}_k-s{seed}" / CALIBRATION_FILE).tokens
    keys = [*options.bits, *([0] if options.mixed else [])]
    names = {key: f"llama-q{key or 2}_k{'' if key else '-mixed'}-s{seed}" for key in keys}
    made = theirs(wide, samples, {key: folder / name for key, name in names.items()}, options.readers)
    found |= {names[key]: bits for key, bits in made.items()}
    rows = {row["setting"]: row for row in measured["rows"]}
    for name, bits in found.items():
        asked = ("--perplexity", "wikitext2", "--context", "1024", "--limit", options.windows)
        score = evaluation(name, "ppl", folder, *asked)["perplexity"]["wikitext2"]["value"]
        rows[name] = {"setting": name, "true_bits": round(bits, 4), "perplexity": round(score, 2)}
        print(json.dumps(rows[name]), flush=True)
    if options.results:
        about = {"device": describe_device(torch.device("cpu")), "versions": versions()}
        text = json.dumps(measured | about | {"rows": list(rows.values())}, indent=2)
        options.results.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
