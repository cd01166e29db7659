"""A mixture's packed experts at once against one after the other, in one run on the CPU.

    python benchmarks/experts.py [--repeats 15] [--formats trellis] [--mixtures wide,many] [--results FILE]

A mixture is a layer of random codes: ``wide`` has 8 experts of 3584 × 1024 of which a token takes 2, as Mixtral's shape
by a fourth; ``many`` has 128 of 768 × 2048, of which it takes 8, as Qwen3-30B-A3B. Every repeat has tokens and choices
of its own; both ways take turns within it, and begin in turn. Milliseconds are medians of the clock; ``gain`` is the
median over repeats of one after the other's time over that of all at once. That both give the same is checked.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from matmul import cpu_lines, random_matrix
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ulbq import formats
from ulbq.formats import AffineScheme, AnyScheme, CodebookScheme, DualBinaryScheme, TrellisScheme
from ulbq.nn.experts import Experts, single_experts
from ulbq.nn.quant_linear import QuantLinear


class Mixture(NamedTuple):
    """Experts, how many of them a token takes, and the sizes outside and inside them."""

    experts: int
    choices: int
    outside: int
    inside: int


MIXTURES = {"wide": Mixture(8, 2, 1024, 3584), "many": Mixture(128, 8, 2048, 768)}
SCHEMES: list[AnyScheme] = [
    AffineScheme(bits=2, group_size=64),
    AffineScheme(bits=4, group_size=64),
    DualBinaryScheme(group_size=64),
    CodebookScheme(bits=2),
    TrellisScheme(bits=2),
]
TOKENS, THREADS = (1, 64), (1, 2)


class InTurn(Experts):
    """One expert after the other."""

    def _at_once(self, *_: Any) -> None:
        return None


def layer(mixture: Mixture, scheme: AnyScheme) -> Experts:
    """Packed experts of random codes."""
    config = Qwen3MoeConfig(
        hidden_size=mixture.outside, moe_intermediate_size=mixture.inside, num_experts=mixture.experts
    )
    with torch.device("meta"):
        made = single_experts(Qwen3MoeExperts(config))
    assert made is not None
    for number in range(mixture.experts):
        for projection in made.fusion.projections:
            outs, columns = made.get_submodule(f"{number}.{projection}").get_parameter("weight").shape
            packed = QuantLinear(scheme, columns, outs)
            packed.assign(random_matrix(scheme, outs, columns))
            packed.prepare()
            made.set_submodule(f"{number}.{projection}", packed)
    return made


def timed(experts: Experts, mixture: Mixture, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of both ways, and the gain."""
    at_once: list[float] = []
    in_turn: list[float] = []
    for repeat in range(repeats + 1):
        x = torch.randn(tokens, mixture.outside).bfloat16()
        weights, chosen = torch.rand(tokens, mixture.experts).topk(mixture.choices)
        ways = [(Experts, at_once), (InTurn, in_turn)]
        results = []
        for kind, times in ways if repeat % 2 else ways[::-1]:
            experts.__class__ = kind
            begin = time.perf_counter()
            results.append(experts(x, chosen, weights.bfloat16()))
            times.append(1e3 * (time.perf_counter() - begin))
        torch.testing.assert_close(*results)
    gain = median(turn / once for turn, once in zip(in_turn[1:], at_once[1:], strict=True))
    return {
        "in_turn_ms": round(median(in_turn[1:]), 2),
        "at_once_ms": round(median(at_once[1:]), 2),
        "gain": round(gain, 2),
    }


@torch.no_grad()
def main() -> None:
    """Measure every mixture and scheme, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="with 64 tokens a third")
    parser.add_argument("--formats", default=",".join(formats.FORMATS), help="those to measure")
    parser.add_argument("--mixtures", default=",".join(MIXTURES), help="those to measure")
    parser.add_argument("--results", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    # Whoever has loaded a model has freed as much: from then on glibc keeps what is freed for what comes next, where a
    # fresh process gives megabytes back to the system and gets them page by page again.
    torch.empty(31 << 20, dtype=torch.uint8)
    for name in options.mixtures.split(","):
        for scheme in (scheme for scheme in SCHEMES if scheme.format in options.formats.split(",")):
            experts = layer(MIXTURES[name], scheme)
            for threads in THREADS:
                torch.set_num_threads(threads)
                for tokens in TOKENS:
                    repeats = options.repeats if tokens == 1 else max(3, options.repeats // 3)
                    found = timed(experts, MIXTURES[name], tokens, repeats)
                    rows.append({"mixture": name, "scheme": scheme.label, "threads": threads, "tokens": tokens} | found)
    table = Table(*(column.replace("_", " ") for column in rows[0]), box=None)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    if options.results:
        cpu = next((line.split(":")[1].strip() for line in cpu_lines() if line.startswith("model name")), "")
        text = json.dumps({"cpu": cpu, "torch": torch.__version__, "rows": rows}, indent=1, ensure_ascii=False)
        options.results.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
