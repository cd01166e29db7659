"""What one process or two together do, for ``test_distributed``: each piece of work has a folder of its own.

``torchrun tests/together.py WORD …`` is the command line, in which the second process cannot read blocks.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.stored import pack_some
from tests.models.tiny import save_tiny, tiny_config, tiny_model
from ulbq import distributed
from ulbq.config.adapter import AdapterConfig
from ulbq.config.finetuning import FinetuneSettings
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.saliency import SaliencyRequest
from ulbq.errors import InputError
from ulbq.evaluation.fidelity import fidelity
from ulbq.evaluation.lm import LanguageModel
from ulbq.evaluation.perplexity import perplexity
from ulbq.finetuning.checkpoint import TrainerCheckpoint
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.student import Student
from ulbq.finetuning.teacher import StreamedTeacher
from ulbq.finetuning.trainer import Trainer
from ulbq.formats import (
    AffineScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    KQuantScheme,
    TrellisScheme,
    k_quant,
)
from ulbq.models.blocks import block_list, load_block
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.adapter import Adapter
from ulbq.pipeline import finetune_plan
from ulbq.pipeline.finetune_run import finetune
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.saliency import saliency
from ulbq.pipeline.samples import sharded_model
from ulbq.pipeline.student import fixed_quantizer
from ulbq.pipeline.tasks import load_task
from ulbq.progress import Silent
from ulbq.quantizers.fixed import FixedAffine
from ulbq.solvers import claq
from ulbq.solvers.k_quant import find_grids
from ulbq.training.linear import TrainedLinear
from ulbq.training.pieces import Pieces
from ulbq.training.precision import Precision
from ulbq.training.sharding import join, shard

MODEL, MIXTURE, TOKENS, BASE, ROWS = "model", "mixture", "tokens.safetensors", "base", "rows.jsonl"
CPU = torch.device("cpu")
PRECISION = Precision(CPU, torch.float32)
# Of the seven layers of a block.
FORMATS = (
    AffineScheme(bits=3, group_size=32),
    BinaryMosScheme(experts=4),
    CodebookScheme(bits=3),
    DualBinaryScheme(group_size=32),
    KQuantScheme(bits=3),
    TrellisScheme(bits=2),
    AffineScheme(bits=2, group_size=32),
)
_SIZE = {"bits": 3, "group_size": 32, "samples": 7, "sequence_length": 32, "precision": "fp32"}
_TRAINING = {"method": "efficientqat", "epochs": 2, "batch_size": 3}
_STAGES = [{"name": "wpt", "epochs": 1}, {"name": "mixed", "epochs": 1}]
BLOCKS: dict[str, dict[str, Any]] = {
    "efficientqat": {**_TRAINING, "fit_temperature": True},
    "uniform": {**_TRAINING, "micro_batch": 2, "token_weighting": "uniform"},
    "apiq": {"method": "apiq", "epochs": 2, "batch_size": 3, "granularity": "layer", "adapter": True, "rank": 4},
    "db-llm": {"method": "db-llm", "bits": None, "epochs": 1, "batch_size": 3},
    "binary-mos": {"method": "binary-mos", "bits": None, "group_size": None, "epochs": 1, "batch_size": 3},
    "ulb-sapr": {"method": "ulb-sapr", "batch_size": 3, "stages": _STAGES},
    "mixture": {**_TRAINING, "source": MIXTURE, "bits": 2, "epochs": 1},
    "trellis": {"method": "trellis", "group_size": None, "epochs": 1, "batch_size": 3},
}


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


def _quantized(*, sharded: bool = False, **options: Any) -> Callable[[Path, Path], None]:
    def work(inputs: Path, folder: Path) -> None:
        quantize(_request(inputs, folder / "q", shard=_several() if sharded else None, **options))

    return work


def _request(inputs: Path, out: Path, **options: Any) -> QuantizeRequest:
    common = {"device": "cpu", "offline": True, "calibration": str(inputs / TOKENS), "out": out, **_SIZE}
    return QuantizeRequest(source=str(inputs / options.pop("source", MODEL)), **{**common, **options})


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


def interrupted(inputs: Path, folder: Path, **options: Any) -> None:
    """Leave a run behind that has done one block."""
    try:
        quantize(_request(inputs, folder / "q", **{"method": "gptq", **options}), _StopAfter())
    except KeyboardInterrupt:
        return
    raise RuntimeError("nobody stopped it")


def interrupted_sharded(inputs: Path, folder: Path) -> None:
    """The same of blocks that train."""
    interrupted(inputs, folder, **BLOCKS["efficientqat"], shard=_several())


def resumed(inputs: Path, folder: Path, method: str = "gptq") -> None:
    """Go on with what was left behind."""
    quantize(_request(inputs, folder / "q", **BLOCKS.get(method, {"method": method})))


def finetuned(inputs: Path, folder: Path, **changes: Any) -> None:
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
    finetune(finetune_plan.prepare(str(inputs / BASE), load_task("instructions"), options | changes, Silent()))


def finetuned_sharded(inputs: Path, folder: Path) -> None:
    """The same with scales, each of several processes with a part of the model."""
    finetuned(inputs, folder, train="adapter-scales", scale_lr=0.01, shard=_several())


def quantized_sharded(inputs: Path, folder: Path, **changes: Any) -> None:
    """Train end to end by a teacher that runs beside it, each of several processes with a part of both."""
    phase = {"end_to_end": "kl", "teacher": "streamed", "end_to_end_epochs": 2, "gradient_accumulation": 3}
    given = {"method": "efficientqat", "epochs": 0, "end_to_end_lr_factor": 0.05, "shard": _several(), **phase}
    quantize(_request(inputs, folder / "q", **given | changes))


def mixture_sharded(inputs: Path, folder: Path) -> None:
    """The same for a mixture, of whose experts a process calls some and another others."""
    quantized_sharded(inputs, folder, source=MIXTURE, bits=2, end_to_end_lr_factor=0.5)


def _several() -> bool | None:
    return True if distributed.size() > 1 else None


def _student(count: int) -> Student:
    """A student of two blocks with layers of every format, one of them with an adapter; sharded for several."""
    torch.manual_seed(3)
    model = tiny_model(tiny_config("llama", num_hidden_layers=2, hidden_size=256, intermediate_size=256))
    _, blocks = block_list(model)
    wide = torch.randn(256, 256, generator=torch.Generator().manual_seed(4)) / 16
    for block in blocks:
        layers = [(name, layer) for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)]
        for (name, layer), scheme in zip(layers, FORMATS, strict=True):
            rows, columns = layer.weight.shape
            if isinstance(scheme, KQuantScheme):
                packed = dict(k_quant.pack(scheme, find_grids(wide[:rows], scheme)))
            else:
                packed = pack_some(scheme, rows, columns)
            quantizer = fixed_quantizer(layer.weight.detach(), packed, scheme)
            if isinstance(quantizer, FixedAffine):
                quantizer.let_zeros_train()
            adapter = Adapter(AdapterConfig(rank=4), columns, rows) if name.endswith("q_proj") else None
            block.set_submodule(name, TrainedLinear(quantizer, None, adapter))
        if count > 1:
            shard(block, CPU)
    if count > 1:
        join(blocks, CPU)
    return Student(model, blocks, PRECISION)


def _held(student: Student) -> float:
    """Share of the blocks' bytes that this process holds."""
    parameters = [*student.blocks.parameters(), *student.blocks.buffers()]
    held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in parameters)
    return held / sum(p.nbytes for p in parameters)


def _go_on(inputs: Path, folder: Path, last: TrainerCheckpoint | None, until: int) -> dict[str, Any]:
    """Train students of all formats until a step, with a teacher that runs beside them; tells what came of it."""
    count = distributed.size()
    student, source = _student(count), resolve(str(inputs / MODEL))
    teacher = load_model(source, dtype=torch.float32) if count == 1 else sharded_model(source, PRECISION)
    examples = Examples(load_file(inputs / TOKENS)["tokens"][:10].long(), 7)
    # Portions that three and five examples make cannot be dealt out evenly.
    values = {"loss": "kl", "train": "scales-zeros", "epochs": 2, "batch_size": 5, "micro_batch": 1, "base_share": 0.4}
    values |= {"scale_lr": 0.02, "norm_lr": 0.02, "zero_lr": 0.1, "router_lr": 0.02, "adapter_lr": 0.02, "clip": 0.5}
    trainer = Trainer(
        student,
        StreamedTeacher(teacher, examples, PRECISION),
        examples,
        FinetuneSettings.model_validate(values),
        schedule=lambda settings, steps: lambda step: 1.0,
        seeds=lambda epoch: epoch,
        folder=folder,
    )
    noted: list[TrainerCheckpoint] = []

    def on_checkpoint(checkpoint: TrainerCheckpoint, files: list[Path]) -> None:
        noted.append(checkpoint)
        if checkpoint.step == until:
            raise KeyboardInterrupt

    with Silent().phase("") as bar, suppress(KeyboardInterrupt):
        trainer.train(last, bar, on_checkpoint)
    return {"held": _held(student), "last": noted[-1].model_dump(mode="json")}


def sharded(inputs: Path, folder: Path) -> None:
    """Students of all formats, stopped after one of two passes; whoever stopped goes on."""
    begun = _go_on(inputs, folder, None, 2)
    distributed.on_main(shutil.copyfile, folder / "step-0000002.safetensors", folder / "begun.safetensors")
    ended = _go_on(inputs, folder, TrainerCheckpoint.model_validate(begun["last"]), 4)
    distributed.on_main((folder / "found.json").write_text, json.dumps({"begun": begun, "ended": ended}))


def goes_on_alone(inputs: Path, folder: Path) -> dict[str, Any]:
    """One process goes on with what several began."""
    begun = json.loads((folder / "found.json").read_text())["begun"]["last"]
    (folder / "alone").mkdir()
    shutil.copyfile(folder / "begun.safetensors", folder / "alone" / "step-0000002.safetensors")
    return _go_on(inputs, folder / "alone", TrainerCheckpoint.model_validate(begun), 4)


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


def _pieces(most: int) -> Pieces:
    pieces = Pieces()
    pieces.most = most if most < 8 else None
    return pieces


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
        "fewest": _pieces(8 >> rank).fewest(),
        "rows": distributed.rows(torch.tensor([4, 1, 0])).tolist(),
    }
    every = distributed.gather(found)
    distributed.on_main((folder / "found.json").write_text, json.dumps(every))


WORK: dict[str, Callable[[Path, Path], None]] = {
    "rtn": _quantized(method="rtn", **dict.fromkeys(("samples", "sequence_length", "calibration", "precision"))),
    "claq": _quantized(method="claq", group_size=None, refit=True),
    "unshared": unshared,
    "gptq": _quantized(method="gptq"),
    "drift": _quantized(method="gptq", target_inputs="full"),
    **{name: _quantized(**options) for name, options in BLOCKS.items()},
    **{f"{name} sharded": _quantized(sharded=True, **options) for name, options in BLOCKS.items()},
    "end-to-end": _quantized(
        **_TRAINING | {"epochs": 0},
        end_to_end="kl",
        end_to_end_epochs=2,
        end_to_end_lr_factor=0.05,
        gradient_accumulation=3,
        teacher="cached",
        teacher_top_k=200,
    ),
    "sharded": sharded,
    "sharded end-to-end": quantized_sharded,
    "sharded finetune": finetuned_sharded,
    "sharded mixture": mixture_sharded,
    "parted": parted,
    "interrupted": interrupted,
    "interrupted sharded": interrupted_sharded,
    "finetune": finetuned,
    "saliency": scores,
    "evaluation": evaluated,
    "primitives": primitives,
}


def prepare(inputs: Path) -> None:
    """What all work is done on: a tiny model, plain and quantized, tokens, questions and answers."""
    save_tiny("llama", inputs / MODEL, tied=False)
    save_tiny("qwen3_moe", inputs / MIXTURE, num_experts=8, num_hidden_layers=2)
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
