"""Output errors of single layers at 2 bits, on the text that they were solved on and on other text.

    python benchmarks/layer_errors.py [--blocks 0 10 29] [--sweeps 4] [--moments FILE] [--results FILE]

The default model's layers read what they read in full precision. Second moments of their inputs, every token by its
relative error, are those of 32 × 512 tokens from the beginning of WikiText-2 ``train``; held out are 32 × 512 from the
end of what is at hand of it. Errors are relative to the outputs. With ``--moments`` the second moments are kept in a
file, and read from there where it exists: so that two versions of the solvers see the same.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from ulbq import formats
from ulbq.data.registry import texts
from ulbq.data.windows import token_stream
from ulbq.formats import trellis
from ulbq.formats.trellis import TrellisScheme
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.runtime import calm_threads
from ulbq.solvers.claq import ClaqSettings, ColumnPlan, claq
from ulbq.solvers.hessian import HessianSum, activation_order, factorize
from ulbq.solvers.refit import matrix_of
from ulbq.solvers.trellis import solve

LENGTH, SAMPLES = 512, 32
TEXTS = {"cal": "", "held": ", held out"}
"""Names of both texts in the file of moments, and in a column's."""
READERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers that read what another reads."""

Moments = dict[str, dict[str, torch.Tensor]]


def main() -> None:
    """Print a line for each layer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 29])
    parser.add_argument("--sweeps", type=int, default=4)
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    calm_threads()
    if options.moments is not None and options.moments.exists():
        found: Moments = torch.load(options.moments, weights_only=True)
    else:
        found = gather(options.blocks)
        if options.moments is not None:
            torch.save(found, options.moments)
    columns = [
        f"{name}{text}"
        for name in ("trellis", "trellis --row-feedback", "claq", f"claq --sweeps {options.sweeps}")
        for text in TEXTS.values()
    ]
    print(f"| layer | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
    errors: dict[str, dict[str, float]] = {}
    for name, weight in found["weights"].items():
        made = solved(weight, found["cal"][name], options.sweeps)
        values = [error(weight, one, found[text][name]) for one in made for text in TEXTS]
        errors[name] = dict(zip(columns, values, strict=True))
        print(f"| {name} | " + " | ".join(f"{one:.5f}" for one in values) + " |", flush=True)
    if options.results is not None:
        options.results.write_text(json.dumps(errors, indent=1) + "\n")


@torch.no_grad()
def gather(blocks: list[int]) -> Moments:
    """Weights of the layers of some blocks, and their inputs' second moments on both texts."""
    source = resolve(None)
    model = load_model(source, dtype=torch.float32)
    stream = token_stream(texts("wikitext2", "train"), source.tokenizer(), 4 * SAMPLES * LENGTH)
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    layers = {
        f"{index}.{name}": module
        for index in blocks
        for name, module in model.model.layers[index].named_modules()
        if isinstance(module, nn.Linear)
    }
    found: Moments = {"weights": {name: layer.weight.detach().clone() for name, layer in layers.items()}}
    for text, part in zip(TEXTS, (windows[: 2 * SAMPLES : 2], windows[-2 * SAMPLES :: 2]), strict=True):
        first = {name: layer for name, layer in layers.items() if _reader(name) == name}
        sums = {name: HessianSum(layer.in_features, relative=True) for name, layer in first.items()}
        handles = [
            layers[name].register_forward_pre_hook(lambda _, inputs, total=total: total.add(inputs[0]))
            for name, total in sums.items()
        ]
        for batch in part.split(2):
            model.model(batch)
        for handle in handles:
            handle.remove()
        found[text] = {name: sums[_reader(name)].matrix for name in layers}
    return found


def _reader(name: str) -> str:
    owner, _, last = name.rpartition(".")
    return f"{owner}.{READERS.get(last, last)}"


def solved(weight: torch.Tensor, hessian: torch.Tensor, sweeps: int) -> list[torch.Tensor]:
    """Weights ``[out, in]`` as ``trellis`` and ``claq`` store them, without feedback of rows or sweeps and with."""
    scheme, columns = TrellisScheme(bits=2), weight.shape[1]
    coded = [
        trellis.pack(
            scheme, solve(weight, hessian, scheme, torch.Generator().manual_seed(0), row_feedback=rows).trellis
        )
        for rows in (False, True)
    ]
    factor = factorize(hessian, order=activation_order(hessian))
    plan = ColumnPlan(torch.full((columns,), 2), torch.zeros(columns, dtype=torch.int64))
    books = [claq(weight, hessian, factor, plan, ClaqSettings(sweeps=count)).columns for count in (0, sweeps)]
    made = [matrix_of(one).T for one in books]
    return [*(formats.dequantize(scheme, one, columns) for one in coded), *made]


def error(weight: torch.Tensor, made: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of a layer's outputs, relative to theirs."""
    left = weight - made
    return ((left @ hessian * left).sum() / (weight @ hessian * weight).sum()).item()


if __name__ == "__main__":
    main()
