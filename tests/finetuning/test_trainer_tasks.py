"""The training of tasks: examples of many lengths, transformers' schedules, the last state."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from tests.models.tiny import tiny_config, tiny_model
from ulbq.config.finetuning import FinetuneSettings
from ulbq.finetuning.checkpoint import TrainerCheckpoint
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.student import Student
from ulbq.finetuning.trainer import Trainer
from ulbq.models.blocks import block_list
from ulbq.progress import Silent
from ulbq.training.optimizer import task_lr_factor
from ulbq.training.precision import Precision

FP32 = Precision(torch.device("cpu"), torch.float32)
# Behind each end a token that is not learnt.
ROWS = [
    ([5, 6, 7, 8, 2], [False, False, True, True, False]),
    ([9, 10, 11, 12, 13, 14, 2], [False, True, False, True, True, False, False]),
    ([*range(3, 60), 2], [False] * 10 + [True] * 47 + [False]),
]
WEIGHT = "model.layers.0.mlp.down_proj.weight"


def examples(rows: list[tuple[list[int], list[bool]]], training: int) -> Examples:
    return Examples([torch.tensor(r[0]) for r in rows], training, [torch.tensor(r[1]) for r in rows], padding=2)


def make(folder: Path, rows: list[tuple[list[int], list[bool]]] | None = None, **changes: Any) -> Trainer:
    model = tiny_model(tiny_config("llama"))
    student = Student(model, block_list(model)[1], FP32, checkpointing=False)
    student.roles["adapter"] = [model.get_parameter(WEIGHT)]
    values = {"epochs": 2, "batch_size": 2, "micro_batch": 1, "adapter_lr": 1e-2, "schedule": "constant", "warmup": 0}
    values |= {"eval_every": 0, "save_every": 1, **changes}
    given = examples(rows or ROWS[:2] * 3, 4)
    settings = FinetuneSettings.model_validate(values)
    named: dict[str, Any] = {"schedule": task_lr_factor, "seeds": lambda epoch: 2**40 + epoch, "folder": folder}
    return Trainer(student, None, given, settings, **named)


def run(trainer: Trainer) -> tuple[TrainerCheckpoint, list[tuple[int, list[str]]]]:
    told: list[tuple[int, list[str]]] = []
    with Silent().phase("training") as bar:
        last = trainer.train(None, bar, lambda one, files: told.append((one.step, [path.name for path in files])))
    return last, told


def test_examples_are_padded_and_cut_behind_their_longest_answer() -> None:
    found = examples(ROWS, 3).batch(torch.tensor([0, 1]))
    assert found.tokens.tolist() == [[5, 6, 7, 8, 2], [9, 10, 11, 12, 13]]
    asked = torch.where(found.counted, found.following, -100)
    assert asked.tolist() == [[-100, 7, 8, -100, -100], [10, -100, 12, 13, -100]]
    assert examples(ROWS, 3).ragged
    assert not examples(ROWS[:1] * 2, 2).ragged


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_loss_and_gradients_are_those_of_transformers(
    micro_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ulbq.finetuning.head.LOGITS_MEMORY", 0)  # chunks of 16
    model = tiny_model(tiny_config("llama")).requires_grad_(False)
    weight = model.get_parameter(WEIGHT).requires_grad_(True)
    width = max(len(tokens) for tokens, _ in ROWS)
    tokens, labels = torch.full((3, width), 2), torch.full((3, width), -100)
    for row, (own, mask) in enumerate(ROWS):
        tokens[row, : len(own)] = torch.tensor(own)
        labels[row, : len(own)] = torch.where(torch.tensor(mask), torch.tensor(own), -100)
    theirs = model(input_ids=tokens, labels=labels).loss
    theirs.backward()
    trainer = make(tmp_path, ROWS * 2, micro_batch=micro_batch)
    # Tokens count alike over all micro-batches of a step.
    ours = [trainer._loss(part, True) * share for part, share in trainer._parts(torch.arange(3))]
    assert len(ours) == 3 // micro_batch
    torch.stack(ours).sum().backward()
    assert sum(loss.item() for loss in ours) == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(trainer.trained[0].grad, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("schedule", "name"), [("cosine",) * 2, ("linear",) * 2, ("constant", "constant_with_warmup")])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.3])
def test_schedules_are_those_of_transformers(schedule: str, name: str, warmup: float) -> None:
    settings = FinetuneSettings.model_validate({"schedule": schedule, "warmup": warmup})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, math.ceil(warmup * 17), 17)
    factor = task_lr_factor(settings, 17)
    for step in range(17):
        assert factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_steps_count_the_last_one_of_an_epoch() -> None:
    assert FinetuneSettings(epochs=2, batch_size=2).steps(5) == 6


def test_every_step_and_checkpoint_is_told(tmp_path: Path) -> None:
    last, told = run(make(tmp_path, eval_every=2))
    assert [step for step, _ in last.losses] == [1, 2, 3, 4]
    assert [step for step, _ in last.evaluations] == [0, 2]  # not at the last one, which is measured as it is stored
    assert told == [(0, []), *((step, [f"step-{step:07d}.safetensors"]) for step in (1, 2, 3, 4))]
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000004.safetensors"]
    _, told = run(make(tmp_path, save_every=3))
    assert [step for step, _ in told] == [0, 3, 4]


def test_a_run_of_one_step_learns_whatever_its_warm_up(tmp_path: Path) -> None:
    trainer = make(tmp_path, epochs=1, batch_size=4, warmup=0.1)
    before = trainer.trained[0].detach().clone()
    last, _ = run(trainer)
    assert last.step == 1
    assert not torch.equal(trainer.trained[0], before)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with torch.no_grad():
        # Not in the attention: torch's kernel for the CPU leaves some of its NaNs out.
        trainer.trained[0].fill_(math.nan)
    last, told = run(trainer)
    assert (last.failed, told) == ("evaluation", [(0, [])])
    with Silent().phase("training") as bar:
        going = trainer.train(TrainerCheckpoint(evaluations=((0, 1.0),)), bar, lambda checkpoint, files: None)
    assert (going.failed, going.step, going.losses) == ("loss", 1, ())
