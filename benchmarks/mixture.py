"""What methods reach on a trained mixture of experts, beside the dense model that it was made of.

    python benchmarks/mixture.py FOLDER [ROW ...] [--model SOURCE] [--results benchmarks/results/upcycle-cpu.json]

FOLDER keeps all that is made; what is finished there is not made again, and a stopped run goes on. It starts with
``upcycle.py``, which makes FOLDER/mixture of the default model; then come the rows, by what says most: perplexity in
full precision of both models and with ``gptq`` at 3 bits, experts that no token reaches, the other methods. The
protocol is that of ``quality.py``: 32 samples of 512 tokens of WikiText-2 ``train``, perplexity on ``test``, context
1024, first ``--windows`` windows, bf16.

Experts that no token reaches (``unseen-*``): ``quantize`` runs with routers that never choose the last expert, on
blocks 0, half and last. Then each expert of the artifact reads what the routers as they are send to it, on two windows
of ``test`` behind the others; errors are squared, relative to the outputs in full precision.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from quality import ulbq
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from upcycle import main as upcycle

import ulbq as api
from ulbq.artifacts import BitsReport, EvaluationManifest, QuantizedManifest, read_manifest
from ulbq.data.registry import texts
from ulbq.data.windows import token_stream
from ulbq.models.blocks import load_block, skeleton
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.experts import Experts
from ulbq.runtime import calm_threads, versions

MIXTURE, CONTEXT, HELD = "mixture", 1024, 2
_UNSEEN = "unseen-"
_SAMPLES = ("--calibration", "wikitext2", "--samples", "32", "--sequence-length", "512")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "gptq": (),
    "trellis": (),
    "claq": (),
    "efficientqat": ("--epochs", "2"),
}
_QUANTIZED = {
    f"{method}-w{bits}": ("--method", method, "--bits", bits, *more, *_SAMPLES)
    for method, more in _OPTIONS.items()
    for bits in ("3", "2")
}
ROWS = ("full", "dense", "gptq-w3", "dense-gptq-w3", "unseen-gptq-w3", "unseen-trellis-w2", *list(_QUANTIZED)[1:])
"""``dense`` is the default model; rows without it are of the mixture."""


@dataclass(frozen=True)
class Bench:
    """What all rows have: the folder, the dense model, windows and samples to measure on and to calibrate with."""

    folder: Path
    model: str
    windows: int
    samples: int

    def perplexity(self, source: str, name: str) -> float:
        """That of a model or an artifact, taken now or found finished under a name."""
        out = f"{name}-ppl"
        if not (self.folder / out).is_dir():
            text = ("--perplexity", "wikitext2", "--context", str(CONTEXT), "--limit", str(self.windows))
            ulbq("eval", source, *text, "--no-parent-scores", "--no-fidelity", "-o", out, folder=self.folder)
        manifest = read_manifest(self.folder / out)
        assert isinstance(manifest, EvaluationManifest)
        return round(manifest.results["models"][0]["perplexity"]["wikitext2"]["value"], 2)

    def quantized(self, name: str) -> QuantizedManifest:
        """The manifest of a row's artifact, made now or found finished."""
        source = self.model if name.startswith("dense-") else f"./{MIXTURE}"
        options = (*_QUANTIZED[name.removeprefix("dense-")], "--samples", str(self.samples))
        if not (self.folder / name).is_dir():
            ulbq("quantize", source, *options, "-o", name, folder=self.folder)
        manifest = read_manifest(self.folder / name)
        assert isinstance(manifest, QuantizedManifest)
        return manifest

    def measure(self, name: str) -> dict[str, Any]:
        """One row: perplexity, and what a quantized model's manifest tells."""
        if name in ("full", "dense"):
            return {"perplexity": self.perplexity(f"./{MIXTURE}" if name == "full" else self.model, name)}
        if name.startswith(_UNSEEN):
            return unseen(name, self)
        made = self.quantized(name)
        row: dict[str, Any] = {
            "options": " ".join(_QUANTIZED[name.removeprefix("dense-")]),
            "true_bits": round(BitsReport.model_validate(made.bits).bits_per_weight, 4),
            "perplexity": self.perplexity(f"./{name}", name),
            "seconds": round(sum(phase.seconds for phase in made.phases)),
            "peak_memory_gb": round(max(phase.peak_memory for phase in made.phases) / 1e9, 2),
        }
        if made.coverage is not None:
            row["share"] = round(made.coverage.quantized / made.coverage.in_blocks, 4)
        tokens = [count for one in made.experts for count in one.tokens]
        if tokens:
            row["tokens"] = {"least": min(tokens), "median": median(tokens), "most": max(tokens)}
            row["tokens"]["none"] = tokens.count(0)
        return row


@contextmanager
def last_expert_unseen() -> Iterator[None]:
    """Routers never choose the last expert while this lasts."""
    original = MixtralTopKRouter.forward

    def forward(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        logits[:, -1] = -torch.inf
        weights, index = logits.float().softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), index

    MixtralTopKRouter.forward = forward
    try:
        yield
    finally:
        MixtralTopKRouter.forward = original


def unseen(name: str, bench: Bench) -> dict[str, Any]:
    """Errors of experts that no token reached, and of the others."""
    method, _, bits = name.removeprefix(_UNSEEN).partition("-w")
    source, out = resolve(bench.folder / MIXTURE), bench.folder / name
    count = source.config.num_hidden_layers
    blocks = sorted({0, count // 2, count - 1})
    if not out.is_dir():
        options: dict[str, Any] = {"only": tuple(f"layers.{index}.mlp.experts" for index in blocks)}
        options |= {"calibration": "wikitext2", "samples": bench.samples, "sequence_length": 512}
        with last_expert_unseen():
            api.quantize(source.path, method=method, bits=int(bits), allow_partial=True, output=out, **options)
    stored, found = resolve(out), inputs(source, blocks, bench.windows)
    missed, others = [], []
    for index in blocks:
        for expert, error in errors(source, stored, index, *found[index]):
            (missed if expert == source.config.num_local_experts - 1 else others).append(error)
    return {"blocks": blocks, "unseen_error": round(mean(missed), 4), "other_error": round(mean(others), 4)}


@torch.no_grad()
def inputs(source: ModelSource, blocks: list[int], windows: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What the experts of some blocks read of held-out text, ``[tokens, in]``, and who is chosen, ``[tokens, k]``."""
    model = load_model(source, dtype=torch.bfloat16)
    held = token_stream(texts("wikitext2", "test"), source.tokenizer(), (windows + HELD) * CONTEXT)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index in blocks:
        model.get_submodule(f"model.layers.{index}.mlp.experts").register_forward_pre_hook(
            lambda module, given, index=index: found.__setitem__(index, (given[0].float(), given[1]))
        )
    model(held.view(-1, CONTEXT)[windows:], logits_to_keep=1)
    return found


@torch.no_grad()
def errors(
    source: ModelSource, stored: ModelSource, index: int, hidden: torch.Tensor, chosen: torch.Tensor
) -> Iterator[tuple[int, float]]:
    """Relative squared error of the outputs of each expert that any token is sent to, on these tokens."""
    pair = []
    for one in (source, stored):
        experts = load_block(skeleton(one), one, index, torch.float32).get_submodule("mlp.experts")
        assert isinstance(experts, Experts)
        pair.append(experts)
    for expert in range(len(pair[0])):
        rows = hidden[(chosen == expert).any(-1)]
        if not len(rows):
            continue
        whole = torch.full((len(rows), 1), expert)
        wanted, got = (experts(rows, whole, torch.ones(len(rows), 1)) for experts in pair)
        yield expert, ((got - wanted).square().sum() / wanted.square().sum()).item()


def main() -> None:
    """Measure what was asked for, print each row, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    parser.add_argument("--model", help="a dense Llama; default: the default model")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=80, help="of upcycle.py")
    options = parser.parse_args()
    calm_threads()
    folder, model = options.folder.resolve(), str(resolve(options.model).path.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MIXTURE).is_dir():
        made = ["upcycle.py", str(folder / "unfinished"), "--model", model, "--steps", str(options.steps)]
        sys.argv = [*made, "--results", str(folder / f"{MIXTURE}.json")]
        upcycle()
        (folder / "unfinished").rename(folder / MIXTURE)
    training = json.loads((folder / f"{MIXTURE}.json").read_text(encoding="utf-8"))
    results: dict[str, Any] = {"training": training, "windows": options.windows, "versions": versions(), "rows": {}}
    bench = Bench(folder, model, options.windows, options.samples)
    for name in options.rows or ROWS:
        results["rows"][name] = bench.measure(name)
        print(json.dumps({"row": name} | results["rows"][name]), flush=True)
        if options.results:
            options.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
