"""Chooses defaults on the real model without touching any evaluation text.

    python benchmarks/sweep.py lambda [--results benchmarks/results/sweep-lambda.json]

The first six blocks of the default model are quantized with each setting (32 samples of 512 tokens, 4 epochs) from the
first four fifths of WikiText-2 ``train``; the perplexity is that of the whole model, the other blocks in full
precision, on 10 windows of 1024 tokens of the last fifth. ``error`` is the sixth block's held-out relative error.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ulbq.blockwise.samples import Samples
from ulbq.config.quantize import QuantizeRequest
from ulbq.data.registry import texts
from ulbq.data.windows import token_stream
from ulbq.evaluation.perplexity import perplexity
from ulbq.methods.base import BlockTask
from ulbq.models.load import load_model
from ulbq.pipeline import layout
from ulbq.pipeline.quantization_plan import Job, prepare
from ulbq.pipeline.samples import draw
from ulbq.pipeline.streams import Streams
from ulbq.progress import Silent
from ulbq.runtime import calm_threads, seed_everything
from ulbq.sensitivity import Saliency, SaliencySettings, compute_saliency

BLOCKS, WINDOWS, CONTEXT = 6, 10, 1024

_APIQ: dict[str, Any] = {"method": "apiq", "rank": 16}
_SAPR: dict[str, Any] = {"method": "ulb-sapr", "rank": 16, "saliency": "fisher"}
_MOS: dict[str, Any] = {"method": "binary-mos"}
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "lambda": {
        "apiq": _APIQ,
        **{f"fisher^0.5 λ={penalty}": {**_SAPR, "penalty": penalty} for penalty in (0.003, 0.01, 0.03, 0.1, 0.3)},
        **{
            f"fisher^0.5 λ={penalty}, after the adapter": {**_SAPR, "penalty": penalty, "penalize": "after-adapter"}
            for penalty in (0.03, 0.1)
        },
        "fisher^1.0 λ=0.03": {**_SAPR, "penalty": 0.03, "saliency_power": 1.0},
        "none λ=0.1": {**_SAPR, "saliency": "none", "penalty": 0.1},
        "apiq, seed 1": {**_APIQ, "seed": 1},
        "fisher^0.5 λ=0.03, seed 1": {**_SAPR, "penalty": 0.03, "seed": 1},
    },
    "rates": {
        f"apiq, weights {weights}, scales {scales}, batches of {batch}": {
            **_APIQ,
            "weight_lr": weights,
            "scale_lr": scales,
            "batch_size": batch,
        }
        for weights, scales, batch in (
            *((0.015, 0.005, 4), (0.02, 0.005, 4), (0.03, 0.005, 4), (0.03, 0.01, 4), (0.045, 0.01, 4)),
            *((0.02, 0.005, 2), (0.03, 0.005, 2)),
        )
    },
    "adapter": {
        "none": {"method": "apiq", "adapter": False},
        **{f"rate {rate}": {**_APIQ, "adapter_lr": rate} for rate in (1e-3, 5e-3, 2e-2)},
        "base share 0.3": {**_APIQ, "base_share": 0.3},
        "frozen": {**_APIQ, "train_weights": False},
    },
    "mos": {
        f"{experts} experts, rates × {factor}": {
            **_MOS,
            "experts": experts,
            "weight_lr": 0.015 * factor,
            "scale_lr": 0.005 * factor,
            **({"router_lr": 0.005 * factor} if experts > 1 else {}),
        }
        for experts in (1, 4)
        for factor in (1, 3, 6, 12)
    },
}


@contextmanager
def dev_text() -> Iterator[tuple[Path, list[str]]]:
    """A file with the first four fifths of WikiText-2 ``train``, and the rest."""
    lines = list(texts("wikitext2", "train"))
    cut = len(lines) * 4 // 5
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dev.txt"
        path.write_text("\n\n".join(lines[:cut]), encoding="utf-8")
        yield path, lines[cut:]


def scores(job: Job, tokens: torch.Tensor, folder: Path) -> Saliency:
    """Fisher information on the samples that train."""
    settings = SaliencySettings(kind="fisher", precision=job.precision)
    folder.mkdir()
    found = compute_saliency(
        job.model, job.source, job.found, Samples(tokens[:32]), settings, folder, scratch=folder.parent
    )
    return Saliency(folder, [layer for block in found for layer in block.layers])


def run(
    changes: dict[str, Any], text: Path, held: torch.Tensor, folder: Path, saliency: list[Saliency]
) -> dict[str, Any]:
    """Quantize the first blocks with one setting and measure; the scores are computed by the first who needs them."""
    size = {"device": "cpu", "calibration": str(text), "samples": 32, "sequence_length": 512, "epochs": 4}
    job = prepare(QuantizeRequest(**{**size, **changes}), Silent())
    seed_everything(0)
    tokens = draw(job.request, job.source, 36, Silent()).tokens
    if job.method.needs.saliency is not None and not saliency:
        saliency.append(scores(job, tokens, folder / "fisher"))
    started = time.monotonic()
    streams = Streams(job, Samples(tokens), folder)
    model = load_model(job.source, dtype=torch.bfloat16)
    error = 0.0
    for index in range(BLOCKS):
        prefix, linears = job.names(index)
        block = streams.load(index)
        streams.advance_full_precision(index, block)
        wanted = saliency[0] if job.method.needs.saliency is not None else None
        task = BlockTask(
            index=index,
            prefix=prefix,
            block=block,
            linears=linears,
            importance=streams.importance,
            data=streams.data(index),
            precision=job.precision,
            seed=index,
            on_epoch=lambda error: None,
            saliency=None if wanted is None else {name: wanted.score(prefix + name) for name in linears},
        )
        result = job.method.quantize_block(task)
        error = result.outcome.end_error if result.outcome else 0.0
        shard = folder / layout.block_shard(index)
        layout.write_block(shard, prefix, job.source, job.model.get_submodule(prefix[:-1]), result)
        layout.write_adapters(folder / layout.adapter_shard(index), prefix, result.adapters)
        streams.advance_quantized(index, shard)
        stored = layout.packed_block(job.model, index, shard, linears, job.method.scheme).to(torch.bfloat16)
        if job.method.needs.adapter is not None:
            adapters = folder / layout.adapter_shard(index)
            layout.restore_adapters(stored, prefix, adapters, job.method.needs.adapter)
        model.set_submodule(prefix[:-1], stored)
    measured = perplexity(model, held, batch_size=2).value
    seconds = round(time.monotonic() - started)
    return {"perplexity": round(measured, 3), "error": round(error, 4), "seconds": seconds}


def main() -> None:
    """Run one sweep, print its rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("names", nargs="*", help="rows; all of them by default")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    calm_threads()
    rows, saliency = [], list[Saliency]()
    with dev_text() as (text, rest), tempfile.TemporaryDirectory() as folder:
        job = prepare(QuantizeRequest(method="rtn"), Silent())
        held = token_stream(rest, job.source.tokenizer(), WINDOWS * CONTEXT)[: WINDOWS * CONTEXT].view(WINDOWS, CONTEXT)
        for name, changes in SWEEPS[options.sweep].items():
            if options.names and name not in options.names:
                continue
            rows.append({"setting": name, **run(changes, text, held, Path(folder), saliency)})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
            if options.results:
                options.results.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
