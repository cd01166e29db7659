"""Settings of this project's larger comparisons, for ``ulbq sweep``.

    python benchmarks/settings.py calibration /tmp/kinds
    python benchmarks/settings.py ulb-sapr /tmp/sapr
    python benchmarks/settings.py binary-mos /tmp/mos
    (cd /tmp/kinds && ulbq sweep smollm2-135m --settings kinds-16k.yaml -o kinds-16k)
    python benchmarks/swept.py /tmp/kinds/kinds-16k benchmarks/results/swept-kinds-16k-cpu.json

``calibration``: what the kind and the number of samples bring. Kinds are WikiText-2 (``train``), samples that the
model writes itself, and chats: questions and answers of GSM8K (``train``) in the model's template. A setting is two
bits by one method from so many thousand tokens (1,024) of one kind; methods that train do so for two epochs.

``ulb-sapr``: ApiQ against ULB-SAPR, weights frozen, as published, and trained. ``choose.yaml`` has penalties and orders
of the stages. It reads ``held-out``: the data sets, but WikiText-2's ``train`` without its last fifth, which stands for
``test``. ``measure.yaml`` has the chosen ones (``--penalty``, ``--stages``) beside ApiQ, for several seeds. Fisher
scores come from other samples than the training's, by another seed and more of them:

    cd /tmp/sapr
    fisher='--kind fisher --calibration wikitext2 --samples 256 --sequence-length 512 --seed 100'
    ulbq saliency smollm2-135m $fisher --data-dir held-out -o chosen-by
    ulbq sweep smollm2-135m --settings choose.yaml --data-dir held-out -o choose
    ulbq saliency smollm2-135m $fisher -o scores
    ulbq sweep smollm2-135m --settings measure.yaml --seeds 0,1,2,3,4 --limit 500 \
        --tasks piqa,arc_easy,arc_challenge,openbookqa,winogrande,social_iqa -o measure

``binary-mos``: distillation of the whole model over more and more tokens, ``choose.yaml`` for its rates on the same
held-out text, ``tokens.yaml`` for the curve, ``experts.yaml`` for the number of experts.

``defaults``: what the defaults of ``apiq``, ``ulb-sapr`` and ``binary-mos`` were chosen from, on that text too, with
the first six blocks alone quantized: ``penalties.yaml``, ``rates.yaml``, ``adapters.yaml``, ``experts.yaml``. The
figures that chose them, ``results/sweep-*.json``, are of a program before ``ulbq sweep``, on 10 windows of that text.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ulbq.data.registry import resolve_dataset

Settings = list[dict[str, Any]]

LENGTH, SAMPLES = 512, 32
METHODS: dict[str, dict[str, Any]] = {"gptq": {}, "trellis": {}, "claq": {}, "efficientqat": {"epochs": 2}}
KINDS = {"wikitext2": "wikitext2", "self": "self", "chat": "chats.jsonl"}
WIKITEXT = Path("Salesforce", "wikitext", "wikitext-2-raw-v1")
PENALTIES = (0.01, 0.1, 1.0, 10.0)
ORDERS = ("mixed:4", "mixed:3,opt:1", "wpt:3,opt:1", "wpt:1,mixed:2,opt:1")
"""Stages and their epochs, four in all; the third is as published (15 and 5)."""
REGIMES: dict[str, dict[str, Any]] = {"frozen": {"train_weights": False, "norm_lr": 0.0}, "trained": {}}
_TEXT = {"calibration": "wikitext2", "sequence_length": LENGTH}


def chats(path: Path) -> None:
    """Write a chat a line."""
    rows = resolve_dataset("openai/gsm8k", "main", "train")
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            print(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}), file=file)


def held_out(folder: Path, data: Path | None) -> None:
    """Lay out the data sets anew, with WikiText-2's ``train`` alone, cut in two at four fifths."""
    if data is None:
        sys.exit("The text that is held out is cut from a mirror of the data sets: give --data or ULBQ_DATA_DIR.")
    lines = (data / WIKITEXT / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    own = folder / WIKITEXT
    own.mkdir(parents=True, exist_ok=True)
    (own / "train.jsonl").write_text("".join(lines[:cut]), encoding="utf-8")
    (own / "test.jsonl").write_text("".join(lines[cut:]), encoding="utf-8")


def calibration(options: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """A file for each number of tokens."""
    chats(options.folder / KINDS["chat"])
    for thousands in options.tokens:
        yield (
            f"kinds-{thousands}k",
            [
                {"name": f"{method}-{kind}", "method": method, "bits": 2, "calibration": source}
                | {"samples": 1024 * thousands // LENGTH, "sequence_length": LENGTH, **own}
                for method, own in METHODS.items()
                for kind, source in KINDS.items()
            ],
        )


def _adapted(regime: str, rank: int, penalty: float | None, order: str, scores: str) -> dict[str, Any]:
    """ApiQ where there is no penalty, else ULB-SAPR."""
    common = {"bits": 2, "rank": rank, "samples": SAMPLES, **_TEXT, **REGIMES[regime]}
    if penalty is None:
        return {"name": f"apiq-{regime}-r{rank}", "method": "apiq", "epochs": 4, **common}
    stages = [dict(zip(("name", "epochs"), (name, int(epochs)), strict=True)) for name, epochs in _pairs(order)]
    name = f"ulb-sapr-{regime}-r{rank}-{penalty:g}-{'-'.join(name for name, _ in _pairs(order))}"
    own = {"method": "ulb-sapr", "penalty": penalty, "stages": stages, "saliency": scores}
    return {"name": name, **own, **common}


def _pairs(order: str) -> list[tuple[str, str]]:
    return [(one.partition(":")[0], one.partition(":")[2]) for one in order.split(",")]


def ulb_sapr(options: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """What to choose from with rank 64, and what to measure then with both ranks."""
    held_out(options.folder / "held-out", options.data)
    yield (
        "choose",
        [
            _adapted(regime, 64, penalty, order, "chosen-by")
            for regime in REGIMES
            for penalty in (None, *PENALTIES)
            for order in (ORDERS if penalty in (0.1, 1.0) else ORDERS[:1])
        ],
    )
    yield (
        "measure",
        [
            _adapted(regime, rank, penalty, order, "scores")
            for regime, chosen, order in zip(REGIMES, options.penalty, options.stages, strict=True)
            for rank in (64, 16)
            for penalty in (None, chosen)
        ],
    )


def _distilled(name: str, thousands: int, **own: Any) -> dict[str, Any]:
    """A setting whose whole model sees so many tokens (1,024); its blocks train on 32 samples before."""
    distinct = min(1024 * thousands // LENGTH, 128)
    phase = {
        "end_to_end": "kl-hidden",
        "end_to_end_train": "all",
        "end_to_end_samples": distinct,
        "end_to_end_epochs": 1024 * thousands // LENGTH // distinct,
    }
    return {"name": name, "method": "binary-mos", "samples": SAMPLES, "epochs": 5, **_TEXT, **phase, **own}


def binary_mos(options: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """Rates to choose from, the curve over tokens, and the number of experts."""
    held_out(options.folder / "held-out", options.data)
    yield (
        "choose",
        [
            _distilled(f"factor-{factor:g}-hidden-{hidden:g}", 64, end_to_end_lr_factor=factor, **_hidden(hidden))
            for factor in (0.03, 0.1, 0.3, 1.0)
            for hidden in (0.0, 1.0, 10.0)
        ],
    )
    best = {"end_to_end_lr_factor": options.factor, **_hidden(options.hidden)}
    yield "tokens", [_distilled(f"{thousands}k", thousands, **best) for thousands in (16, 64, 256, 1024)]
    yield "experts", [_distilled(f"experts-{count}", 64, experts=count, **best) for count in (1, 2, 4, 8)]


def _hidden(weight: float) -> dict[str, Any]:
    return {"end_to_end_hidden_weight": weight} if weight else {"end_to_end": "kl"}


def _six_blocks(name: str, **own: Any) -> dict[str, Any]:
    few = {"only": [f"layers.{block}" for block in range(6)], "allow_partial": True}
    return {"name": name, "samples": SAMPLES, "epochs": 4, **_TEXT, **few, **own}


def defaults(options: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """Penalties, rates, adapters and experts, of the first six blocks."""
    held_out(options.folder / "held-out", options.data)
    apiq: dict[str, Any] = {"method": "apiq", "rank": 16}
    sapr: dict[str, Any] = {"method": "ulb-sapr", "rank": 16, "saliency": "fisher"}
    yield (
        "penalties",
        [
            _six_blocks("none", **apiq),
            *(_six_blocks(f"{penalty}", **sapr, penalty=penalty) for penalty in (0.003, 0.01, 0.03, 0.1, 0.3)),
            *(
                _six_blocks(f"{penalty}-after", **sapr, penalty=penalty, penalize="after-adapter")
                for penalty in (0.03, 0.1)
            ),
            _six_blocks("0.03-power-1", **sapr, penalty=0.03, saliency_power=1.0),
            _six_blocks("0.1-unweighted", **(sapr | {"saliency": "none"}), penalty=0.1),
        ],
    )
    yield (
        "rates",
        [
            _six_blocks(f"{weights}-{scales}-{batch}", **apiq, weight_lr=weights, scale_lr=scales, batch_size=batch)
            for weights, scales, batch in (
                *((0.015, 0.005, 4), (0.02, 0.005, 4), (0.03, 0.005, 4), (0.03, 0.01, 4), (0.045, 0.01, 4)),
                *((0.02, 0.005, 2), (0.03, 0.005, 2)),
            )
        ],
    )
    yield (
        "adapters",
        [
            _six_blocks("none", method="apiq", adapter=False),
            *(_six_blocks(f"rate-{rate:g}", **apiq, adapter_lr=rate) for rate in (1e-3, 5e-3, 2e-2)),
            _six_blocks("base-share-0.3", **apiq, base_share=0.3),
            _six_blocks("frozen", **apiq, train_weights=False),
        ],
    )
    yield (
        "experts",
        [
            _six_blocks(
                f"experts-{count}-rates-{factor}",
                method="binary-mos",
                experts=count,
                weight_lr=0.015 * factor,
                scale_lr=0.005 * factor,
                **({"router_lr": 0.005 * factor} if count > 1 else {}),
            )
            for count in (1, 4)
            for factor in (1, 3, 6, 12)
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=os.environ.get("ULBQ_DATA_DIR"), help="data sets like the Hub's")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="calibration: thousands of them")
    parser.add_argument("--penalty", type=float, nargs=2, default=[0.1, 0.03], help="ulb-sapr: frozen, trained")
    parser.add_argument("--stages", nargs=2, default=[ORDERS[2], ORDERS[0]], help="ulb-sapr: frozen, trained")
    parser.add_argument("--factor", type=float, default=0.1, help="binary-mos: of the rates end to end")
    parser.add_argument("--hidden", type=float, default=1.0, help="binary-mos: weight of hidden states; 0 for kl")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, settings in COMPARISONS[options.comparison](options):
        (options.folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


COMPARISONS = {"calibration": calibration, "ulb-sapr": ulb_sapr, "binary-mos": binary_mos, "defaults": defaults}

if __name__ == "__main__":
    main()
