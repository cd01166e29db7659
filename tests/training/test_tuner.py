"""Batches of lessons, the loss of answers, and what a Trainer of ours keeps."""

import math
from pathlib import Path

import pytest
import torch

from tests.models.tiny import tiny_config, tiny_model
from ulbq.data.lessons import Lesson
from ulbq.errors import NumericsError
from ulbq.training.precision import Precision
from ulbq.training.tuner import Tuner, TunerSettings, Watch, answer_loss, batch

FP32 = Precision(torch.device("cpu"), torch.float32)
LESSONS = [
    Lesson([5, 6, 7, 8], [False, False, True, True]),
    Lesson([9, 10, 11, 12, 13, 14], [False, True, False, True, True, False]),
]
SETTINGS = TunerSettings(
    epochs=2,
    batch_size=2,
    micro_batch=1,
    adapter_rate=1e-2,
    scale_rate=1e-3,
    adapter_decay=0,
    scale_decay=0,
    schedule="constant",
    warmup=0,
    clip=1,
    checkpointing=False,
    eval_every=0,
    save_every=1,
)


def test_only_answers_have_labels() -> None:
    found = batch(LESSONS, 2)
    assert found.tokens.tolist() == [[5, 6, 7, 8, 2, 2], [9, 10, 11, 12, 13, 14]]
    assert found.attended.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert found.labels.tolist() == [[-100, -100, 7, 8, -100, -100], [-100, 10, -100, 12, 13, -100]]


def test_the_loss_of_answers_is_that_of_transformers() -> None:
    model = tiny_model(tiny_config("llama"))
    found = batch(LESSONS, 2)
    expected = model(input_ids=found.tokens, attention_mask=found.attended, labels=found.labels).loss.item()
    assert answer_loss(model, LESSONS, FP32) == pytest.approx(expected, rel=1e-5)


def test_steps_count_the_last_one_of_an_epoch() -> None:
    assert SETTINGS.steps(5) == 6


def tuner(folder: Path, watch: Watch, **changes: float) -> Tuner:
    model = tiny_model(tiny_config("llama")).requires_grad_(False)
    model.get_parameter("model.layers.0.mlp.down_proj.weight").requires_grad_(True)
    settings = SETTINGS.model_copy(update=changes)
    return Tuner(model, LESSONS * 2, settings, FP32, filler=2, folder=folder, seed=2**40, watch=watch)


def test_every_step_and_checkpoint_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    saved: list[str] = []
    looks: list[int] = []
    watch = Watch(lambda step, loss: steps.append(step), looks.append, lambda folder: saved.append(folder.name))
    tuner(tmp_path, watch, eval_every=2).train()
    assert steps == [1, 2, 3, 4]
    assert looks == [2]  # not at the last one, which is measured as it is stored
    assert saved == [f"checkpoint-{step}" for step in steps]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    found = tuner(tmp_path, Watch(lambda step, loss: None, lambda step: None, lambda folder: None))
    with torch.no_grad():
        # Not in the attention: torch's kernel for the CPU leaves some of its NaNs out.
        found.trained["model.layers.0.mlp.down_proj.weight"].fill_(math.nan)
    with pytest.raises(NumericsError, match="loss is not finite in step 1"):
        found.train()
