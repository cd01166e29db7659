"""End-to-end training of tiny students: what moves, what the parts of a step add up to, and what goes wrong."""

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.tiny import tiny_config, tiny_model
from ulbq import distributed
from ulbq.config.adapter import AdapterConfig
from ulbq.config.finetuning import FinetuneSettings
from ulbq.config.methods import DbLlmOptions
from ulbq.errors import UsageError
from ulbq.finetuning.checkpoint import TrainerCheckpoint
from ulbq.finetuning.examples import Examples
from ulbq.finetuning.head import Head
from ulbq.finetuning.losses import hidden_error, mean_loss, predicted, token_terms
from ulbq.finetuning.student import Student
from ulbq.finetuning.teacher import HiddenTap, StreamedTeacher
from ulbq.finetuning.trainer import Trainer
from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.models.blocks import block_list
from ulbq.nn.adapter import Adapter
from ulbq.progress import Silent
from ulbq.quantizers.dual_binary import DualBinaryQuantizer, search_scales
from ulbq.training.linear import TrainedLinear
from ulbq.training.optimizer import lr_factor
from ulbq.training.precision import Precision

PRECISION = Precision(torch.device("cpu"), torch.float32)
TOKENS = torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(1))


def make_student(*, checkpointing: bool = True, dropout: float = 0.0) -> Student:
    model = tiny_model(tiny_config("llama", num_hidden_layers=2))
    blocks = block_list(model)[1]
    for name, linear in [(n, m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear)]:
        weight = linear.weight.detach()
        scales = search_scales(weight, torch.ones(weight.shape[1]), 32)
        quantizer = DualBinaryQuantizer(weight, scales, DualBinaryScheme(group_size=32))
        generator = torch.Generator().manual_seed(5)
        form = AdapterConfig(rank=2, dropout=dropout)
        adapter = Adapter(form, linear.in_features, linear.out_features, generator=generator) if dropout else None
        blocks.set_submodule(name, TrainedLinear(quantizer, None, adapter))
    return Student(model, blocks, PRECISION, checkpointing=checkpointing)


def make_trainer(folder: Path, student: Student, **changes: Any) -> Trainer:
    values = {"loss": "kl", "epochs": 2, "batch_size": 2, "train": "scales", "warmup": 0, "keep_best": True}
    values |= {"scale_lr": 0.005, "norm_lr": 0.002, "weight_lr": 0.015, "final_lr_factor": 0.05, **changes}
    examples = values.pop("examples", Examples(TOKENS, 4))
    teacher = StreamedTeacher(tiny_model(tiny_config("llama", num_hidden_layers=2)), examples, PRECISION, hidden=True)
    return Trainer(
        student,
        teacher,
        examples,
        FinetuneSettings.model_validate(values),
        schedule=lr_factor,
        seeds=lambda epoch: 3 + epoch,
        folder=folder,
    )


def run(trainer: Trainer, done: TrainerCheckpoint | None = None) -> tuple[TrainerCheckpoint, list[TrainerCheckpoint]]:
    told: list[TrainerCheckpoint] = []
    with Silent().phase("training") as bar:
        last = trainer.train(done, bar, lambda checkpoint, files: told.append(checkpoint))
    return last, told


def state(student: Student) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in student.model.named_parameters()}


@pytest.mark.parametrize("loss", ["kl", "kl-hidden", "dad", "ce", "ce-kl"])
def test_checkpointing_changes_no_gradient(loss: str, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        student = make_student(checkpointing=checkpointing)
        trainer = make_trainer(tmp_path, student, loss=loss, train="all")
        trainer._loss(torch.tensor([0, 1]), True).backward()
        gradients.append({n: p.grad for n, p in student.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("latents" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("loss", ["kl", "kl-hidden", "ce", "ce-kl"])
def test_chunks_that_go_back_at_once_give_the_loss_and_gradients_of_one_piece(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(student: Student) -> list[torch.Tensor]:
        return [p.grad for p in student.model.parameters() if p.grad is not None]

    # As the definition has it, with the hidden states' error where there is one.
    student = make_student()
    make_trainer(tmp_path, student)  # which says what trains
    tokens, following = TOKENS[:2], Examples(TOKENS, 4).batch(torch.tensor([0, 1])).following.flatten()
    states, hidden = student.run(tokens, hidden=True)
    teacher = tiny_model(tiny_config("llama", num_hidden_layers=2))
    with torch.no_grad():
        taught = None if loss == "ce" else predicted(teacher(tokens).logits.flatten(0, 1))
        targets = HiddenTap(block_list(teacher)[1]).run(teacher, tokens, hidden=True)[1]
    terms = token_terms(loss, student.model.lm_head(states).flatten(0, 1), following, taught, 0.5)
    plain = mean_loss(loss, terms, following)
    if loss == "kl-hidden":
        plain = plain + 0.5 * hidden_error([h.flatten(0, 1) for h in hidden], [t.flatten(0, 1) for t in targets])
    (3 * plain).backward()
    wanted = gradients(student)
    assert wanted
    for size in (1000, 5):
        monkeypatch.setattr(Head, "chunk", lambda self, copies, size=size: size)
        student = make_student()
        trainer = make_trainer(tmp_path, student, loss=loss, hidden_weight=0.5)
        value = trainer._loss(torch.tensor([0, 1]), True)
        (3 * value).backward()
        torch.testing.assert_close(value, plain)
        torch.testing.assert_close(gradients(student), wanted)


def test_short_samples_of_a_step_run_at_once() -> None:
    settings = FinetuneSettings(micro_batch=6, tokens_at_once=1024)
    assert [settings.together(length) for length in (2048, 1024, 512, 256, 64)] == [1, 1, 2, 4, 6]


@pytest.mark.parametrize(("processes", "sizes"), [(1, [4]), (2, [2]), (3, [2]), (4, [1])])
def test_every_process_has_some_of_a_step(
    processes: int, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, make_student(), batch_size=4)
    monkeypatch.setattr(distributed, "size", lambda: processes)
    assert [len(part) for part, _ in trainer._parts(torch.arange(4))] == sizes


def test_no_layer_keeps_its_matrix(tmp_path: Path) -> None:
    student = make_student()
    make_trainer(tmp_path, student)._loss(torch.tensor([0]), True)
    assert all(layer.matrix is None for layer in student.layers.values())


def test_the_backward_pass_keeps_nothing_of_a_block_behind_it(tmp_path: Path) -> None:
    student = make_student()
    trainer = make_trainer(tmp_path, student)
    largest = max(layer.quantizer.latents.numel() for layer in student.layers.values())
    kept: list[int] = []

    def count(gradient: torch.Tensor) -> None:
        found = (x for x in gc.get_objects() if type(x) is torch.Tensor)
        kept.append(sum(x.dtype == torch.bool and x.numel() == largest for x in found))

    first = next(iter(student.layers.values())).quantizer
    first.scales.register_hook(count)
    gc.collect()
    gc.disable()
    try:
        trainer._loss(torch.tensor([0]), True).backward()
    finally:
        gc.enable()
    assert kept == [0]


@pytest.mark.parametrize("train", ["scales", "all"])
def test_what_trains_is_what_was_asked_for(train: str, tmp_path: Path) -> None:
    student = make_student()
    before = state(student)
    last, told = run(make_trainer(tmp_path, student, train=train, lr_factor=0.5))
    moved = {name.rpartition(".")[2] for name, p in state(student).items() if not torch.equal(p, before[name])}
    assert last.best[1] < last.evaluations[0][1]
    assert [checkpoint.step for checkpoint in told] == [0, 2, 4]
    assert [step for step, _ in last.evaluations] == [0, 2, 4]
    assert len(last.losses) == last.step == 4
    assert moved == {"scales", "weight"} | ({"latents"} if train == "all" else set())
    outside = {
        name for name, p in state(student).items() if not torch.equal(p, before[name]) and ".layers." not in name
    }
    assert not outside


def test_accumulated_samples_make_the_step_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for size in (1, 4):
        monkeypatch.setattr(FinetuneSettings, "together", lambda self, length, size=size: size)
        student = make_student()
        run(make_trainer(tmp_path / str(size), _made(tmp_path / str(size), student), batch_size=4))
        ends.append(state(student))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=2e-4, rtol=2e-4)


def test_steps_without_room_are_taken_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FinetuneSettings, "together", lambda self, length: 4)
    run_model, ends = Student.run, []

    def limited(student: Student, tokens: torch.Tensor, **given: Any) -> Any:
        found = run_model(student, tokens, **given)
        if len(tokens) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    for name in ("whole", "pieces"):
        student = make_student()
        trainer = make_trainer(tmp_path / name, _made(tmp_path / name, student), batch_size=4)
        run(trainer)
        ends.append((state(student), trainer.pieces.said()))
        monkeypatch.setattr(Student, "run", limited)
    assert [said for _, said in ends] == ["", "The device had no room for a step's samples: 1 ran at a time."]
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, atol=2e-4, rtol=2e-4)


def _made(folder: Path, student: Student) -> Student:
    folder.mkdir()
    return student


@pytest.mark.parametrize(("save_every", "keep_best"), [(None, True), (3, False)])
def test_training_goes_on_from_its_files_to_the_same_values(
    save_every: int | None, keep_best: bool, tmp_path: Path
) -> None:
    straight, resumed = make_student(dropout=0.3), make_student(dropout=0.3)
    changes = {"epochs": 3, "train": "all", "save_every": save_every, "keep_best": keep_best, "adapter_lr": 0.01}
    changes |= {"base_share": 0.3}
    run(make_trainer(_folder(tmp_path, "a"), straight, **changes))

    told: list[TrainerCheckpoint] = []

    def stop(checkpoint: TrainerCheckpoint, files: list[Path]) -> None:
        told.append(checkpoint)
        if checkpoint.step:
            raise KeyboardInterrupt

    folder = _folder(tmp_path, "b")
    with pytest.raises(KeyboardInterrupt), Silent().phase("training") as bar:
        make_trainer(folder, make_student(dropout=0.3), **changes).train(None, bar, stop)
    assert told[-1].step == save_every or 2  # within an epoch, or behind one
    again = TrainerCheckpoint.model_validate_json(told[-1].model_dump_json())
    _, rest = run(make_trainer(folder, resumed, **changes), again)
    assert [checkpoint.step for checkpoint in rest] == ([6] if save_every else [4, 6])
    assert sorted(int(path.stem.partition("-")[2]) for path in folder.iterdir()) == sorted(set(rest[-1].kept) - {0})
    for name, value in state(straight).items():
        assert torch.equal(state(resumed)[name], value), name


def test_a_process_more_than_there_were_draws_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, make_student(), save_every=1)
    monkeypatch.setattr(trainer, "_tidy", lambda last: None)
    run(trainer)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    drawn = []
    with torch.random.fork_rng():
        for step in (2, 3):
            trainer._load(step, torch.optim.AdamW(trainer.trained))
            drawn.append(torch.rand(()).item())
        torch.manual_seed(3 + 2 + 7907)  # of the second epoch, whose first step is the third
        assert drawn == [torch.rand(()).item()] * 2


def _folder(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_states_tell_how_many_files_lie_there_at_once(
    epochs: int, keep_best: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, make_student(), epochs=epochs, keep_best=keep_best)
    # The first epoch is the best: its state stays beside the last one and that which is being written.
    losses = iter([5.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(trainer, "evaluate", lambda bar: next(losses))
    lying = [0]
    with Silent().phase("training") as bar:
        trainer.train(None, bar, lambda _, files: lying.append(len(list(tmp_path.glob("step-*")))))
    settings = FinetuneSettings(epochs=epochs, batch_size=2, keep_best=keep_best)
    assert max(lying) == settings.states(4) == min(epochs, 3 if keep_best else 2)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student()
    trainer = make_trainer(tmp_path, student)
    plain, calls = trainer._loss, 0

    def spoiled(indices: torch.Tensor, adapted: bool) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return plain(indices, adapted) * (math.nan if calls > 3 else 1.0)

    monkeypatch.setattr(trainer, "_loss", spoiled)
    last, told = run(trainer)
    assert [checkpoint.failed for checkpoint in told] == ["", "", "loss"]
    assert (last.step, last.best[0], last.kept) == (4, 2, (2,))
    assert all(p.isfinite().all() for p in student.model.parameters())
    monkeypatch.undo()
    with Silent().phase("evaluation") as bar:
        assert trainer.evaluate(bar) == pytest.approx(last.best[1])


def test_a_rate_is_a_share_of_the_blocks_rate() -> None:
    options = DbLlmOptions(end_to_end="kl", end_to_end_lr_factor=0.5, scale_lr=0.4, weight_lr=0.2, norm_lr=0)
    settings = options.end_to_end_settings()
    assert settings is not None
    assert settings.learning_rates()["scales"] == 0.2
    assert settings.learning_rates().keys() == {"scales", "adapter", "router"}
    assert (settings.batch_size, settings.micro_batch, settings.warmup, settings.keep_best) == (2, 2, 0.05, True)
    trained = options.model_copy(update={"end_to_end_train": "all"}).end_to_end_settings()
    assert trained is not None
    assert trained.learning_rates()["weights"] == 0.1


def test_hidden_states_from_a_cache_are_refused() -> None:
    with pytest.raises(UsageError, match="hidden states"):
        FinetuneSettings(loss="kl-hidden", teacher="cached")


TAUGHT = torch.zeros_like(TOKENS, dtype=torch.bool)
TAUGHT[:, 5:9] = True
TAUGHT[1, 7:9] = False
LOSSES = ["ce", "kl", "ce-kl", "kl-hidden", "dad"]


def masked(tokens: torch.Tensor) -> Examples:
    return Examples(tokens, 4, TAUGHT)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_taught_does_not_count(loss: str, tmp_path: Path) -> None:
    behind = TOKENS.clone()
    behind[:, 9:] = 5
    before = TOKENS.clone()
    before[0, 7] = 5
    pair, student = torch.tensor([0, 1]), make_student()
    values = [
        make_trainer(tmp_path, student, loss=loss, examples=examples)._loss(pair, True).item()
        for examples in (masked(TOKENS), masked(behind), masked(before), Examples(TOKENS, 4))
    ]
    assert values[0] == values[1]
    assert abs(values[0] - values[2]) > 1e-4
    assert abs(values[0] - values[3]) > 1e-4


def test_masked_losses_are_means_over_the_answers_alone(tmp_path: Path) -> None:
    student = make_student()
    pair = torch.tensor([0, 1])
    with torch.no_grad():
        ours = student.model(TOKENS[pair]).logits.log_softmax(-1)
        theirs = tiny_model(tiny_config("llama", num_hidden_layers=2))(TOKENS[pair]).logits.log_softmax(-1)
    text = -ours[:, :-1].gather(-1, TOKENS[pair, 1:, None]).squeeze(-1)[TAUGHT[pair, 1:]].mean()
    distances = (theirs.exp() * (theirs - ours)).sum(-1)[:, :-1][TAUGHT[pair, 1:]].mean()
    for loss, expected in {"ce": text, "kl": distances, "ce-kl": text + distances}.items():
        trainer = make_trainer(tmp_path, student, loss=loss, examples=masked(TOKENS))
        torch.testing.assert_close(trainer._loss(pair, True).detach(), expected)


def test_a_batch_is_cut_behind_its_longest_answer() -> None:
    batch = masked(TOKENS).batch(torch.tensor([1]))
    assert torch.equal(batch.tokens, TOKENS[1:2, :7])
    assert batch.counted[0].nonzero().squeeze(1).tolist() == [4, 5]
    whole = Examples(TOKENS, 4).batch(torch.tensor([1]))
    assert whole.counted.all()
    assert whole.following[0].tolist() == [*TOKENS[1, 1:].tolist(), -100]


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_of_the_head_change_no_gradient(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for chunk in (1000, 3):
        monkeypatch.setattr(Head, "chunk", lambda self, copies, chunk=chunk: chunk)
        student = make_student()
        trainer = make_trainer(tmp_path, student, loss=loss, train="all", examples=masked(TOKENS))
        trainer._loss(torch.tensor([0, 1, 2]), True).backward()
        gradients.append({n: p.grad for n, p in student.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox", "mixtral", "deepseek", "phi3"])
def test_the_head_is_what_the_model_has_behind_its_trunk(family: str) -> None:
    model = tiny_model(tiny_config(family))
    student = Student(model, block_list(model)[1], PRECISION)
    with torch.no_grad():
        expected = model(TOKENS[:2]).logits
        states, _ = student.run(TOKENS[:2])
        torch.testing.assert_close(student.head.logits(states.flatten(0, 1)[5:9]), expected.flatten(0, 1)[5:9])
        torch.testing.assert_close(model(TOKENS[:2]).logits, expected)


def test_samples_of_different_length_count_by_their_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for size in (1, 4):
        monkeypatch.setattr(FinetuneSettings, "together", lambda self, length, size=size: size)
        student = make_student()
        folder = _folder(tmp_path, str(size))
        run(make_trainer(folder, student, batch_size=4, examples=masked(TOKENS)))
        ends.append(state(student))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=2e-4, rtol=2e-4)
