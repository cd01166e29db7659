"""What one process or two together do, for ``test_distributed``: each piece of work has a folder of its own.

``torchrun -m tests.together WORD …`` is the command line, in which the second process cannot read blocks.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ulbq import distributed
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.saliency import SaliencyRequest
from ulbq.errors import InputError
from ulbq.evaluation.fidelity import fidelity
from ulbq.evaluation.lm import LanguageModel
from ulbq.evaluation.perplexity import perplexity
from ulbq.models.blocks import load_block
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline import finetune_plan
from ulbq.pipeline.finetune_run import finetune
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.saliency import saliency
from ulbq.pipeline.tasks import load_task
from ulbq.progress import Silent
from ulbq.solvers import claq

MODEL, TOKENS, BASE, ROWS = "model", "tokens.safetensors", "base", "rows.jsonl"
CPU = torch.device("cpu")
_SIZE = {"bits": 3, "group_size": 32, "samples": 7, "sequence_length": 32, "precision": "fp32"}
_TRAINING = {"method": "efficientqat", "epochs": 2, "batch_size": 3}


class _StopAfter(Silent):
    """Interrupts a run in all processes at once: when the first block is done."""

    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Any:
        outer = super().phase(name, total)

        class Phase:
            def __enter__(self) -> Any:
                outer.__enter__()
                return self

            def __exit__(self, *error: object) -> None:
                outer.__exit__(None, None, None)

            def advance(self, steps: int = 1, detail: str = "") -> None:
                if detail == "block 0":
                    raise KeyboardInterrupt

        return Phase()


def _quantized(**options: Any) -> Callable[[Path, Path], None]:
    def work(inputs: Path, folder: Path) -> None:
        quantize(_request(inputs, folder / "q", **options))

    return work


def _request(inputs: Path, out: Path, **options: Any) -> QuantizeRequest:
    common = {"device": "cpu", "offline": True, "calibration": str(inputs / TOKENS), "out": out, **_SIZE}
    return QuantizeRequest(source=str(inputs / MODEL), **{**common, **options})


def parted(inputs: Path, folder: Path) -> None:
    """Codebooks that come out otherwise in the second process, as those of another GPU may."""
    plain = claq.refit

    def moved(*given: Any) -> Any:
        found = plain(*given)
        books = found.columns.codebooks * (1 + distributed.rank() / 64)
        return found._replace(columns=found.columns._replace(codebooks=books))

    claq.refit = moved
    try:
        quantize(_request(inputs, folder / "q", method="claq", group_size=None, only=("q_proj",), allow_partial=True))
    finally:
        claq.refit = plain


def unshared(inputs: Path, folder: Path) -> None:
    """Have every process solve every layer."""
    shared = distributed.shared
    distributed.shared = lambda items, work, device: [work(item) for item in items]
    try:
        WORK["claq"](inputs, folder)
    finally:
        distributed.shared = shared


def interrupted(inputs: Path, folder: Path) -> None:
    """Leave a run behind that has done one block."""
    try:
        quantize(_request(inputs, folder / "q", method="gptq"), _StopAfter())
    except KeyboardInterrupt:
        return
    raise RuntimeError("nobody stopped it")


def resumed(inputs: Path, folder: Path) -> None:
    """Go on with what was left behind."""
    quantize(_request(inputs, folder / "q", method="gptq"))


def finetuned(inputs: Path, folder: Path) -> None:
    """Learn questions and answers, and keep checkpoints on the way; an epoch's last step leaves one process idle."""
    options = {
        "data": (str(inputs / ROWS),),
        "sequence_length": 200,
        "batch_size": 4,
        "micro_batch": 4,
        "rank": 4,
        "dropout": 0.0,
    }
    options |= {"samples": 13, "validation_samples": 3, "epochs": 2, "adapter_lr": 0.01, "save_every": 4}
    options |= {"precision": "fp32", "device": "cpu", "offline": True, "out": folder / "q"}
    finetune(finetune_plan.prepare(str(inputs / BASE), load_task("instructions"), options, Silent()))


def scores(inputs: Path, folder: Path) -> None:
    """Fisher scores on an odd number of samples."""
    given = {"source": str(inputs / MODEL), "calibration": str(inputs / TOKENS), "samples": 5, "sequence_length": 32}
    saliency(SaliencyRequest(**given, precision="fp32", device="cpu", offline=True, out=folder / "s"))


def evaluated(inputs: Path, folder: Path) -> None:
    """Perplexity, fidelity, likelihoods of answers and answers, by functions: without texts and tasks to load."""
    source = resolve(str(inputs / MODEL))
    model = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    parent = load_model(source, dtype=torch.bfloat16, device=torch.device("cpu"))
    windows = load_file(inputs / TOKENS)["tokens"][:5].long()
    speaker = LanguageModel(model, source.tokenizer(), batch_size=2)
    pairs = [(row[:20].tolist(), row[20:22].tolist()) for row in windows]
    found = {
        "perplexity": perplexity(model, windows, batch_size=2).model_dump(),
        "one window": perplexity(model, windows[:1]).model_dump(),
        "fidelity": fidelity(model, parent, windows, text="these").model_dump(),
        "scores": speaker.score(pairs),
        "answers": speaker.write(["one", "two words", "and three words"], stops=["."], new_tokens=4, sampling={}),
    }
    # Every process knows the result; one of them tells.
    every = distributed.gather(found)
    if any(other != every[0] for other in every):
        raise RuntimeError("the processes know different results")
    distributed.on_main((folder / "found.json").write_text, json.dumps(found))


def primitives(inputs: Path, folder: Path) -> None:
    """The sums by themselves, of what processes have in different amounts, or not at all."""
    rank = distributed.rank()
    everything = torch.arange(5, dtype=torch.float32)
    held, idle, unused = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    for weight in distributed.own(everything):
        (held * weight).sum().backward()
    if rank == 0:
        (2 * idle).sum().backward()
    distributed.sum_gradients([held, idle, unused])
    if unused.grad is not None:
        raise RuntimeError("nobody had this gradient")
    try:
        distributed.on_main(json.loads, "{")
        caught = "nothing"
    except ValueError as error:
        caught = str(error)
    try:
        distributed.check_agreement([torch.tensor([float(rank)])], "this")
        agreed = True
    except Exception:
        agreed = False
    found = {
        "mean": distributed.mean(distributed.own(everything)).item(),
        "mean of one": distributed.mean(distributed.own(everything[3:4])).item(),
        "total": distributed.total(len(distributed.own(everything)), 0.5),
        "held": held.grad.tolist() if held.grad is not None else None,
        "idle": idle.grad.tolist() if idle.grad is not None else None,
        "caught": caught,
        "agreed": agreed,
        "shared": [one.tolist() for one in distributed.shared([0, 1, 2], lambda n: torch.tensor([float(n)]), CPU)],
        "rows": distributed.rows(torch.tensor([4, 1, 0])).tolist(),
    }
    every = distributed.gather(found)
    distributed.on_main((folder / "found.json").write_text, json.dumps(every))


WORK: dict[str, Callable[[Path, Path], None]] = {
    "rtn": _quantized(method="rtn", **dict.fromkeys(("samples", "sequence_length", "calibration", "precision"))),
    "claq": _quantized(method="claq", group_size=None, refit=True),
    "unshared": unshared,
    "trellis": _quantized(method="trellis", group_size=None, epochs=1, batch_size=3),
    "gptq": _quantized(method="gptq"),
    "drift": _quantized(method="gptq", target_inputs="full"),
    "efficientqat": _quantized(**_TRAINING, fit_temperature=True),
    "uniform": _quantized(**_TRAINING, micro_batch=2, token_weighting="uniform"),
    "apiq": _quantized(method="apiq", epochs=2, batch_size=3, granularity="layer", adapter=True, rank=4),
    "db-llm": _quantized(method="db-llm", bits=None, epochs=1, batch_size=3),
    "binary-mos": _quantized(method="binary-mos", bits=None, group_size=None, epochs=1, batch_size=3),
    "ulb-sapr": _quantized(
        method="ulb-sapr", batch_size=3, stages=[{"name": "wpt", "epochs": 1}, {"name": "mixed", "epochs": 1}]
    ),
    "end-to-end": _quantized(
        **_TRAINING | {"epochs": 0},
        end_to_end="kl",
        end_to_end_epochs=2,
        end_to_end_lr_factor=0.05,
        gradient_accumulation=3,
        teacher="cached",
        teacher_top_k=200,
    ),
    "parted": parted,
    "interrupted": interrupted,
    "finetune": finetuned,
    "saliency": scores,
    "evaluation": evaluated,
    "primitives": primitives,
}


def prepare(inputs: Path) -> None:
    """What all work is done on: a tiny model, plain and quantized, tokens, questions and answers."""
    from tests.models.tiny import save_tiny

    save_tiny("llama", inputs / MODEL, tied=False)
    tokens = torch.randint(3, 250, (12, 32), generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens.int()}, inputs / TOKENS)
    base = {"source": str(inputs / MODEL), "method": "rtn", "bits": 3, "group_size": 32, "device": "cpu"}
    quantize(QuantizeRequest(**base, offline=True, out=inputs / BASE))
    rows = [{"instruction": f"count from {n % 5}", "output": f"{n % 5} then {n % 5 + 1}"} for n in range(30)]
    (inputs / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def do(name: str, inputs: Path, folder: Path) -> None:
    """One piece of work."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    WORK[name](inputs, folder / name)


def as_one_of(rank: int, count: int, port: int, inputs: Path, folder: Path) -> int:
    """All pieces of work, by a process that others wait for at a port; returns its exit code."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    with distributed.joined():
        for name in WORK:
            do(name, inputs, folder)
    return 0


def break_second(words: list[str]) -> int:
    """Run a command; returns its exit code."""
    from ulbq.blockwise import walk
    from ulbq.commands.app import main

    def broken(*arguments: Any) -> Any:
        if distributed.rank() == 1:
            raise InputError("The second one stumbles.")
        return load_block(*arguments)

    walk.load_block = broken
    return main(words)


if __name__ == "__main__":
    raise SystemExit(break_second(sys.argv[1:]))
