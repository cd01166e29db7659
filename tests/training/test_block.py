"""Block training on a toy block: two linears, a norm, and outputs that a full-precision copy gives."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.toy import CPU, WIDTH, ToyBlock, store
from ulbq import runtime
from ulbq.config.training import TrainSettings
from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.quantizers.dual_binary import DualBinaryQuantizer, search_scales
from ulbq.training.block import BlockTrainer
from ulbq.training.linear import TrainedLinear
from ulbq.training.objective import BlockData, Objective, Validation
from ulbq.training.optimizer import clip_gradients, snapshot
from ulbq.training.pieces import Pieces


@pytest.fixture
def problem(tmp_path: Path) -> tuple[nn.Module, BlockData]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = ToyBlock().requires_grad_(False)
        inputs = torch.randn(20, 8, WIDTH)
    targets = block(inputs, gain=1.0)
    for name in ("up", "down"):
        linear = block.get_submodule(name)
        weight = linear.weight.detach()
        scales = search_scales(weight, torch.ones(weight.shape[1]), 32)
        quantizer = DualBinaryQuantizer(weight, scales, DualBinaryScheme(group_size=32))
        block.set_submodule(name, TrainedLinear(quantizer, linear.bias))
    data = BlockData(store(inputs, tmp_path), store(targets, tmp_path), None, {"gain": 1.0}, training=16)
    return block, data


def state(block: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(block.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def trainer(problem: tuple[nn.Module, BlockData], **settings: Any) -> BlockTrainer:
    return BlockTrainer(*problem, TrainSettings(**{"epochs": 6, "batch_size": 4, **settings}), CPU)


def test_training_lowers_the_held_out_loss_and_reports_it(problem: Any) -> None:
    seen: list[float] = []
    outcome = trainer(problem).train(seed=0, on_epoch=seen.append)
    assert outcome.end_error < 0.9 * outcome.start_error
    assert outcome.end_error == min(seen)
    assert (outcome.steps, outcome.retries, outcome.fallback, outcome.diverged) == (24, 0, False, False)


def test_the_same_seed_gives_the_same_parameters_and_another_does_not(problem: Any) -> None:
    states = []
    for seed in (1, 1, 2):
        block, data = copy.deepcopy(problem[0]), problem[1]
        trainer((block, data)).train(seed=seed)
        states.append(state(block))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_only_scales_weights_and_norms_move(problem: Any) -> None:
    before = state(problem[0])
    trainer(problem).train(seed=0)
    after = state(problem[0])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {f"{linear}.quantizer.{part}" for linear in ("up", "down") for part in ("latents", "scales")}
    assert moved == trained | {"norm.weight"}


def test_a_norm_rate_of_zero_freezes_the_norms(problem: Any) -> None:
    before = state(problem[0])
    trainer(problem, norm_lr=0).train(seed=0)
    assert torch.equal(before["norm.weight"], state(problem[0])["norm.weight"])


def test_a_block_that_got_worse_at_every_rate_keeps_its_start(problem: Any) -> None:
    before = state(problem[0])
    outcome = trainer(problem, weight_lr=1e6, scale_lr=1e6, retries=2, warmup=0).train(seed=0)
    assert outcome.fallback
    assert outcome.retries == 2
    assert outcome.end_error == outcome.start_error
    assert same(before, state(problem[0]))


def test_a_rate_that_is_too_high_is_mended_by_a_lower_one(problem: Any) -> None:
    outcome = trainer(problem, weight_lr=3.0, scale_lr=1.0, norm_lr=1.0, retries=4).train(seed=0)
    assert not outcome.fallback
    assert 1 <= outcome.retries <= 4
    assert outcome.end_error < outcome.start_error


def test_a_loss_that_is_not_finite_is_rolled_back(problem: Any, tmp_path: Path) -> None:
    block, data = problem
    inputs = data.inputs.get(slice(0, 20))
    inputs[3] = math.inf  # a training sample; the held-out ones stay finite
    broken = BlockData(store(inputs, tmp_path), data.targets, None, data.kwargs, data.training)
    before = state(block)
    outcome = trainer((block, broken), retries=1).train(seed=0)
    assert outcome.diverged
    assert outcome.fallback
    assert same(before, state(block))


def test_what_it_reports_is_what_evaluating_again_would(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at the start and one after each epoch are enough."""
    looks: list[Validation] = []
    real = Objective.validation_output

    def counted(self: Objective) -> Validation:
        looks.append(real(self))
        return looks[-1]

    monkeypatch.setattr(Objective, "validation_output", counted)
    block, data = problem
    settings = {"weight_lr": 3.0, "scale_lr": 1.0, "norm_lr": 1.0, "patience": 6}
    start = Objective(block, data, TrainSettings(batch_size=4), CPU, None)
    wanted = real(start)
    outcome = trainer(problem, retries=4, **settings).train(seed=0)
    assert outcome.retries
    assert len(looks) <= 1 + 6 * (outcome.retries + 1)
    assert outcome.start_error == wanted.error
    assert outcome.end_error == real(start).error < wanted.error


@pytest.mark.parametrize("size", [1e-3, 0.1, 10.0, math.inf, math.nan])
def test_clipping_is_torchs(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(n)) for n in (3, 40)] for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = size * torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
    clip_gradients([*ours, nn.Parameter(torch.ones(2))], 0.5)
    nn.utils.clip_grad_norm_(theirs, 0.5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_no_epochs_mean_the_closed_form_start(problem: Any) -> None:
    before = state(problem[0])
    outcome = trainer(problem, epochs=0).train(seed=0)
    assert (outcome.steps, outcome.fallback) == (0, False)
    assert same(before, state(problem[0]))


def test_the_augmented_loss_pulls_towards_its_own_targets(problem: Any, tmp_path: Path) -> None:
    block, data = problem
    other = store(data.targets.get(slice(0, 20)) * 3.0, tmp_path)
    plain, pulled = copy.deepcopy(block), copy.deepcopy(block)
    trainer((plain, data)).train(seed=0)
    augmented = BlockData(data.inputs, data.targets, other, data.kwargs, data.training)
    trainer((pulled, augmented), augmented_loss=True).train(seed=0)

    def distance(trained: nn.Module) -> float:
        return (trained(data.inputs.get(slice(16, 20))) - other.get(slice(16, 20))).square().mean().item()

    assert distance(pulled) < distance(plain)


def test_patience_stops_a_block_that_no_longer_improves(problem: Any) -> None:
    seen: list[float] = []
    rates = {"weight_lr": 0.3, "scale_lr": 0.2, "final_lr_factor": 1.0}
    trainer(problem, epochs=60, patience=3, retries=0, **rates).train(seed=0, on_epoch=seen.append)
    best = seen.index(min(seen))
    assert len(seen) < 60
    assert len(seen) - 1 - best == 3


class Device:
    """Has room for so many samples at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.ran: list[int] = []
        run = Objective._run

        def limited(objective: Objective, own: torch.Tensor, *, adapted: bool, training: bool) -> torch.Tensor:
            found = run(objective, own, adapted=adapted, training=training)
            if training and len(own) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.ran += [len(own)] * training
            return found

        monkeypatch.setattr(Objective, "_run", limited)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_steps_without_room_are_taken_in_pieces(
    micro_batch: int | None, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, data = problem
    start, settings = state(block), {"micro_batch": micro_batch, "clip": 0.5}
    whole, plain = trainer(problem, **settings).train(seed=0), state(block)
    block.load_state_dict(start)
    device = Device(monkeypatch, room=1)
    outcome = trainer((block, data), **settings).train(seed=0)
    assert (whole.at_once, outcome.at_once) == (0, 1)
    assert set(device.ran) == {1}
    assert len(device.ran) == 4 * outcome.steps == 4 * whole.steps
    assert outcome.end_error == pytest.approx(whole.end_error, rel=1e-5)
    for name, value in state(block).items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-4)


def test_what_a_step_without_room_drew_is_drawn_again(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block, data = problem
    block.get_submodule("up").register_forward_hook(lambda module, given, out: nn.functional.dropout(out, 0.2))
    start, states = state(block), []
    for room, micro_batch in ((20, 2), (2, None)):
        block.load_state_dict(start)
        with monkeypatch.context() as patch, torch.random.fork_rng():
            torch.manual_seed(3)
            Device(patch, room)
            trainer((block, data), micro_batch=micro_batch, epochs=2).train(seed=0)
        states.append(state(block))
    assert same(*states)


def test_every_gpu_draws_again_and_not_the_current_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    states, tries = [torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)], iter([False, True])
    set_again: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 2)
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "get_rng_state", lambda device=0: states[device])
        monkeypatch.setattr(module, "set_rng_state", lambda state, device=0: set_again.update({device: state}))

    def step() -> bool:
        if fits := next(tries):
            return fits
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert Pieces().run(2, step, lambda: None)
    assert set_again == dict(enumerate(states))


def test_what_did_not_fit_once_is_not_tried_in_the_next_block(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, settings = Pieces(), TrainSettings(epochs=1, batch_size=4)
    device = Device(monkeypatch, room=2)
    BlockTrainer(*problem, settings, CPU, pieces=pieces).train(seed=0)
    assert pieces.most == 2
    device.ran.clear()
    BlockTrainer(*problem, settings, CPU, pieces=pieces).train(seed=0)
    assert device.ran == [2] * 8


def test_a_device_without_room_for_a_sample_says_so(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        trainer(problem).train(seed=0)


class _OnGpu:
    """A parameter that says to lie on a GPU."""

    device, nbytes = torch.device("cuda"), 1000

    def detach(self) -> torch.Tensor:
        return torch.ones(3)


@pytest.mark.parametrize(("free", "where"), [(13999, "process"), (14000, "gpu")])
def test_snapshots_leave_a_gpu_that_has_little_room(free: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "free_memory", lambda device: free)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: 2 * tensor)
    kept = snapshot([_OnGpu(), _OnGpu()])  # type: ignore[list-item]
    assert [copy.tolist() for copy in kept] == [[2.0 if where == "process" else 1.0] * 3] * 2
