"""What fine-tuning a 2-bit model on a task brings: held-out answers before, after, and after a reload.

    python benchmarks/finetune.py ARTIFACT --out DIR --results benchmarks/results/finetune-cpu.json [OPTIONS]

OPTIONS are ``--task``, once or more, and any of ``ulbq finetune``.
Each task runs as ``ulbq finetune`` in a process of its own, whose largest resident memory is noted. The artifact that
it leaves is then loaded anew, as ``ulbq eval`` loads it, and the same held-out answers are measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ulbq import runtime
from ulbq.config.finetuning import FinetuneSettings
from ulbq.data.examples import draw_examples
from ulbq.finetuning.student import Student
from ulbq.finetuning.trainer import Trainer
from ulbq.models.blocks import block_list
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.finetune_run import examples_of
from ulbq.progress import Silent
from ulbq.training.optimizer import task_lr_factor
from ulbq.training.precision import Precision

TASKS = ("gsm8k", "arithmetic")


def run(artifact: str, task: str, out: Path, options: list[str]) -> dict[str, Any]:
    """Fine-tune in a process of its own; what came of it."""
    program = "import sys; from ulbq.commands.app import main; sys.exit(main())"
    words = ["finetune", artifact, "--task", task, "-o", str(out), "--json", *options]
    command = [sys.executable, "-c", program, *words]
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    text = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"'ulbq {' '.join(words)}' failed")
    manifest = json.loads(text)
    learnt = manifest["finetune"]
    return {
        "command": " ".join(["ulbq", "finetune", Path(artifact).name, "--task", task, *options]),
        **summary(learnt),
        # Not what was counted for the child: that holds this process's own peak, too.
        "peak_resident_mib": max(phase["peak_memory"] for phase in manifest["phases"]) >> 20,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "seconds": round(time.monotonic() - began),
        "training_tokens_a_cpu_second": round(
            learnt["epochs"] * learnt["data"]["tokens"] / (usage.ru_utime + usage.ru_stime)
        ),
    }


def summary(learnt: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says; of the training loss, means of the first and of the last quarter of the steps."""
    losses = [loss for _, loss in learnt["losses"]]
    quarter = max(1, len(losses) // 4)
    return {
        "steps": learnt["steps"],
        "samples": learnt["data"]["samples"],
        "answer_tokens": learnt["data"]["taught_tokens"],
        "heldout": learnt["data"]["heldout"],
        "parameters": learnt["parameters"],
        "training_loss": [sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter],
        "heldout_loss": [learnt["start_loss"], learnt["end_loss"]],
        "evaluations": learnt["evaluations"],
    }


def reloaded(out: Path) -> dict[str, Any]:
    """Loss of the same held-out answers with the artifact read from the disk, and what of it is packed."""
    source = resolve(str(out), offline=True)
    manifest = json.loads((out / "manifest.json").read_text())
    request, learnt = manifest["request"], manifest["finetune"]
    drawn = draw_examples(
        learnt["data"]["sources"],
        source.tokenizer(),
        template=learnt["template"],
        samples=request["samples"],
        heldout=learnt["data"]["heldout"],
        length=request["sequence_length"],
        seed=request["seed"],
        data_dir=None,
        offline=True,
        progress=Silent(),
    )
    if drawn.sha256 != learnt["data"]["sha256"]:
        raise SystemExit("the data has changed")
    precision = Precision.choose(torch.device("cpu"), request["precision"])
    model = load_model(source, dtype=precision.dtype)
    packed = sum(isinstance(layer, QuantLinear) for layer in model.modules())
    student, examples = Student(model, block_list(model)[1], precision), examples_of(drawn, source)
    settings = FinetuneSettings(micro_batch=request["micro_batch"])
    trainer = Trainer(student, None, examples, settings, schedule=task_lr_factor, seeds=int, folder=out)
    with Silent().phase("evaluation") as bar:
        return {"reloaded_loss": trainer.evaluate(bar), "packed_layers": packed}


def main() -> None:
    """Run every task and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--task", action="append", help=f"default: {', '.join(TASKS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the artifacts")
    parser.add_argument("--results", type=Path, required=True)
    given, options = parser.parse_known_args()  # what else is given goes to ulbq finetune
    results: dict[str, Any] = json.loads(given.results.read_text()) if given.results.is_file() else {}
    results["machine"] = {"device": runtime.describe_device(torch.device("cpu")), "versions": runtime.versions()}
    rows = results.setdefault("tasks", {})
    for task in given.task or TASKS:
        out = given.out / f"{Path(given.artifact).name}-{task}"
        rows[task] = {"artifact": Path(given.artifact).name, **run(given.artifact, task, out, options)}
        rows[task] |= reloaded(out)
        given.results.write_text(json.dumps(results, indent=2) + "\n")
        print(task, json.dumps(rows[task], indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
