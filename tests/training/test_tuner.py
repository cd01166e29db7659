"""Batches of lessons, the loss of answers, and what a Trainer of ours keeps."""

import math
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from tests.models.tiny import tiny_config, tiny_model
from ulbq.config.finetune import TunerSettings
from ulbq.data.lessons import Lesson
from ulbq.errors import NumericsError
from ulbq.training.batches import Listed, Order, batch
from ulbq.training.precision import Precision
from ulbq.training.tuner import Answers, Tuner, Watch, answer_loss, stay_on

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
    assert found.labels.tolist() == [[-100, -100, 7, 8, -100, -100], [-100, 10, -100, 12, 13, -100]]
    assert batch([Lesson([5, 6], [True, True])], 2).labels.tolist() == [[-100, 6]]


def test_loss_and_gradients_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ulbq.training.head.LOGITS_MEMORY", 0)  # chunks of 16
    model = tiny_model(tiny_config("llama"))
    long = Lesson(list(range(3, 60)), [False] * 10 + [True] * 47)
    found = batch([*LESSONS, long], 2)
    theirs = model(input_ids=found.tokens, labels=found.labels).loss
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    ours = Answers(model, FP32)(*found)["loss"]
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    assert answer_loss(model, [*LESSONS, long], FP32) == pytest.approx(theirs.item(), rel=1e-5)
    assert Answers(model, FP32)(*found, num_items_in_batch=10)["loss"].item() == pytest.approx(theirs.item() * 5.2)


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
    found = tuner(tmp_path, watch, eval_every=2)
    assert found.model_accepts_loss_kwargs  # tokens count alike over all micro-batches of a step
    found.train()
    assert steps == [1, 2, 3, 4]
    assert looks == [2]  # not at the last one, which is measured as it is stored
    assert saved == [f"checkpoint-{step}" for step in steps]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert capsys.readouterr().out == ""


def test_of_several_gpus_it_takes_the_one_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    arguments._n_gpu = 2  # as it counts them
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    stay_on(torch.device("cuda:1"), arguments)
    assert current == [torch.device("cuda:1")]
    assert arguments.device == torch.device("cuda:1")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 3)


def test_only_the_first_process_writes_what_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuner(tmp_path, Watch(lambda step, loss: None, lambda step: None, lambda folder: None))
    monkeypatch.setattr("ulbq.distributed.is_main", lambda: False)
    found.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_empty_lessons_fill_up_the_last_batches_and_teach_nothing() -> None:
    listed = Listed(LESSONS * 2 + LESSONS[:1], 4)
    order = Order(listed, seed=3)
    first = list(order)
    assert sorted(first) == list(range(8)) == [*sorted(first[:5]), *first[5:]]  # what is empty comes last
    assert first == list(order)
    order.set_epoch(1)
    assert list(order) != first
    model = tiny_model(tiny_config("llama"))
    nothing = Answers(model, FP32)(*batch([listed[5], listed[6]], 2), num_items_in_batch=3)["loss"]
    nothing.backward()
    assert nothing.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.model.layers.parameters())


def test_a_run_of_one_step_learns_whatever_its_warm_up(tmp_path: Path) -> None:
    quiet = Watch(lambda step, loss: None, lambda step: None, lambda folder: None)
    found = tuner(tmp_path, quiet, epochs=1, batch_size=4, warmup=0.1)
    (weight,) = [parameter for parameter in found.model.parameters() if parameter.requires_grad]
    before = weight.detach().clone()
    found.train()
    assert found.state.global_step == 1
    assert not torch.equal(weight, before)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    found = tuner(tmp_path, Watch(lambda step, loss: None, lambda step: None, lambda folder: None))
    with torch.no_grad():
        # Not in the attention: torch's kernel for the CPU leaves some of its NaNs out.
        found.trained["model.layers.0.mlp.down_proj.weight"].fill_(math.nan)
    with pytest.raises(NumericsError, match="loss is not finite in step 1"):
        found.train()
