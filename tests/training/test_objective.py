"""Stages, the penalty on salient weights, adapters in training, and training layer by layer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.toy import CPU, ToyBlock, store
from ulbq.config.adapter import AdapterConfig
from ulbq.config.stages import Stage, StageName
from ulbq.config.training import TrainSettings
from ulbq.errors import InputError
from ulbq.formats.affine import AffineScheme
from ulbq.nn.adapter import Adapter
from ulbq.quantizers.affine import AffineQuantizer
from ulbq.solvers.rtn import round_to_nearest
from ulbq.training.block import BlockTrainer
from ulbq.training.layers import LayerwiseTrainer, input_groups
from ulbq.training.linear import TrainedLinear
from ulbq.training.losses import sliced_wasserstein
from ulbq.training.objective import BlockData, Objective
from ulbq.training.penalty import WeightPenalty

WIDTH = 32
SCHEME = AffineScheme(bits=2, group_size=32)
SETTINGS = TrainSettings(epochs=4, batch_size=4)


def dense_block() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ToyBlock().requires_grad_(False)


def quantized(block: nn.Module, *, rank: int = 0, search: bool = True, **options: Any) -> nn.Module:
    made = copy.deepcopy(block)
    for name in ("up", "down"):
        linear = made.get_submodule(name)
        weight = linear.weight.detach()
        start = round_to_nearest(weight, SCHEME, search=search)
        adapter = None
        if rank:
            generator = torch.Generator().manual_seed(1)
            adapter = Adapter(AdapterConfig(rank=rank, **options), *reversed(weight.shape), generator=generator)
            adapter.init_magnitude(weight)
        quantizer = AffineQuantizer(weight, start.scales, start.zeros, SCHEME)
        made.set_submodule(name, TrainedLinear(quantizer, linear.bias, adapter))
    return made


@pytest.fixture
def data(tmp_path: Path) -> BlockData:
    inputs = torch.randn(20, 8, WIDTH, generator=torch.Generator().manual_seed(2))
    noisy = inputs + 0.05 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    targets = dense_block()(inputs)
    held = {name: store(value, tmp_path) for name, value in (("x", noisy), ("y", targets), ("o", inputs))}
    return BlockData(held["x"], held["y"], None, {"gain": 1.0}, training=16, originals=held["o"])


def layers(block: nn.Module) -> dict[str, TrainedLinear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, TrainedLinear)}


def penalty(block: nn.Module, saliency: dict[str, torch.Tensor] | None = None, **options: Any) -> WeightPenalty:
    dense = dense_block()
    scores = None if saliency is None else saliency.__getitem__
    return WeightPenalty({name: dense.get_submodule(name).weight for name in layers(block)}, scores, **options)


def test_the_penalty_is_the_weighted_relative_error_of_the_weights() -> None:
    block = quantized(dense_block())
    scores = {name: torch.rand(layer.weight.shape) for name, layer in layers(block).items()}
    above = below = 0.0
    for name, layer in layers(block).items():
        original = dense_block().get_submodule(name).weight
        above += (scores[name] * (layer.quantizer() - original).square()).sum().item()
        below += (scores[name] * original.square()).sum().item()
    assert penalty(block, scores)(layers(block)).item() == pytest.approx(above / below, rel=1e-5)
    # A score's unit cancels: one λ serves every model.
    scaled = {name: 1e-9 * score for name, score in scores.items()}
    assert penalty(block, scaled)(layers(block)).item() == pytest.approx(above / below, rel=1e-5)


def test_a_penalty_reads_half_precision_as_what_it_is() -> None:
    block, dense = quantized(dense_block()), dense_block()
    halves = {name: dense.get_submodule(name).weight.detach().bfloat16() for name in layers(block)}
    whole = {name: half.float() for name, half in halves.items()}
    ours, theirs = (WeightPenalty(weights, None)(layers(block)) for weights in (halves, whole))
    assert torch.equal(ours, theirs)


def test_after_the_adapter_the_penalty_sees_both() -> None:
    block = quantized(dense_block(), rank=4)
    with torch.no_grad():
        for layer in layers(block).values():
            assert layer.adapter is not None
            layer.adapter.lora_b.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    before = penalty(block)(layers(block)).item()
    after = penalty(block, penalized="after-adapter")(layers(block)).item()
    assert after != pytest.approx(before, rel=1e-3)


def test_weight_preservation_lowers_the_penalty_and_needs_no_samples(data: BlockData) -> None:
    block = quantized(dense_block(), search=False)
    own = penalty(block)
    before = own(layers(block)).item()
    stage = Stage(name="wpt", epochs=6, penalty=1.0, weight_lr=0.0, scale_lr=0.02)
    outcome = BlockTrainer(block, data, SETTINGS, CPU, stages=[stage], penalty=own).train(0)
    assert outcome.steps == 24
    assert own(layers(block)).item() < before


def test_a_heavier_penalty_keeps_weights_nearer_at_the_cost_of_the_output(data: BlockData) -> None:
    found = []
    for strength in (0.0, 30.0):
        block = quantized(dense_block())
        own = penalty(block)
        stages = [Stage(name="mixed", epochs=6, penalty=strength)]
        outcome = BlockTrainer(block, data, SETTINGS, CPU, stages=stages, penalty=own).train(0)
        found.append((own(layers(block)).item(), outcome.end_error))
    (loose, near_output), (tight, far_output) = found
    assert tight < loose
    assert near_output < far_output


def test_stages_follow_each_other_with_rates_of_their_own(data: BlockData) -> None:
    block = quantized(dense_block(), rank=4, search=False)
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    stages = [
        Stage(name="wpt", epochs=1, penalty=1.0, weight_lr=0, scale_lr=0.01, norm_lr=0, adapter_lr=0),
        Stage(name="opt", epochs=2, weight_lr=0, scale_lr=0, norm_lr=0, adapter_lr=0.01),
    ]
    outcome = BlockTrainer(block, data, SETTINGS, CPU, stages=stages, penalty=penalty(block)).train(0)
    assert outcome.steps == 12
    changed = {name for name, p in block.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_b" in name for name in changed)
    assert any("ends" in name for name in changed)
    assert not any("latents" in name or "norm" in name for name in changed)


@pytest.mark.parametrize("names", [("wpt",), ("mixed", "wpt"), ("wpt", "opt")])
def test_the_reported_error_is_that_of_the_block_behind_its_last_stage(
    names: tuple[StageName, ...], data: BlockData
) -> None:
    block = quantized(dense_block(), search=False)
    stages = [Stage(name=name, epochs=2, penalty=1.0) for name in names]
    outcome = BlockTrainer(block, data, SETTINGS, CPU, stages=stages, penalty=penalty(block)).train(0)
    assert outcome.steps
    assert outcome.end_error == Objective(block, data, SETTINGS, CPU, None).validation_output().error


def test_a_rate_of_zero_everywhere_changes_nothing(data: BlockData) -> None:
    block = quantized(dense_block())
    settings = SETTINGS.model_copy(update={"weight_lr": 0.0, "scale_lr": 0.0, "norm_lr": 0.0})
    outcome = BlockTrainer(block, data, settings, CPU).train(0)
    assert outcome.steps == 0
    assert outcome.end_error == outcome.start_error


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_lowers_the_error_beyond_what_frozen_weights_reach(data: BlockData, dora: bool) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 8, "weight_lr": 0.0, "adapter_lr": 0.02})
    alone = BlockTrainer(quantized(dense_block()), data, settings, CPU).train(0).end_error
    adapted = BlockTrainer(quantized(dense_block(), rank=8, dora=dora), data, settings, CPU).train(0).end_error
    assert adapted < 0.95 * alone


def test_steps_without_the_adapter_keep_the_base_usable(data: BlockData) -> None:
    def base_error(share: float) -> float:
        block = quantized(dense_block(), rank=16)
        settings = SETTINGS.model_copy(update={"epochs": 10, "adapter_lr": 0.05, "base_share": share})
        BlockTrainer(block, data, settings, CPU).train(0)
        for layer in layers(block).values():
            layer.adapted = False
        with torch.no_grad():
            outputs = block(data.inputs.get(slice(16, 20)), gain=1.0)
        targets = data.targets.get(slice(16, 20))
        return ((outputs - targets).square().sum() / targets.square().sum()).item()

    assert base_error(0.5) < base_error(0.0)


def test_dropout_is_for_training_alone(data: BlockData) -> None:
    block = quantized(dense_block(), rank=8, dropout=0.5)
    with torch.no_grad():
        for layer in layers(block).values():
            assert layer.adapter is not None
            layer.adapter.lora_b.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    trainer = BlockTrainer(block, data, SETTINGS.model_copy(update={"epochs": 0}), CPU)
    assert trainer.train(0).start_error == trainer.train(0).start_error


def test_sliced_wasserstein_sees_the_cloud_and_not_the_order() -> None:
    cloud = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    shuffled = cloud.flatten(0, 1)[torch.randperm(32, generator=torch.Generator().manual_seed(1))].view(cloud.shape)
    weighted = cloud / cloud.norm(dim=-1, keepdim=True)
    other = shuffled / shuffled.norm(dim=-1, keepdim=True)
    seed = torch.Generator().manual_seed(2)
    assert sliced_wasserstein(weighted, other, seed).item() < 1e-10
    assert sliced_wasserstein(2 * weighted, other, seed).item() == pytest.approx(1.0, rel=1e-4)


def test_sliced_wasserstein_takes_part_in_training(data: BlockData) -> None:
    ends = []
    for weight in (0.0, 0.5):
        block = quantized(dense_block())
        BlockTrainer(block, data, SETTINGS.model_copy(update={"sliced_wasserstein": weight}), CPU).train(0)
        ends.append([p.detach().clone() for p in block.parameters()])
    assert any(not torch.equal(one, other) for one, other in zip(*ends, strict=True))


class Attention(nn.Module):
    """Two layers that read the same input, one that reads what comes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return x + gain * self.o(torch.tanh(self.q(x)) * self.k(x))


def test_layers_that_read_the_same_input_are_one_group(data: BlockData) -> None:
    assert data.originals is not None
    groups = input_groups(Attention(), data.originals, {"gain": 1.0}, ["q", "k", "o"], CPU)
    assert groups == [["q", "k"], ["o"]]


def test_layer_by_layer_training_lowers_the_blocks_error(data: BlockData) -> None:
    block = quantized(dense_block(), rank=4)
    norm = block.get_submodule("norm").weight.clone()
    heard: list[float] = []
    outcome = LayerwiseTrainer(block, dense_block(), data, SETTINGS, CPU).train(0, heard.append)
    assert outcome.end_error < 0.9 * outcome.start_error
    assert outcome.steps == 2 * 16
    assert len(heard) == SETTINGS.epochs
    assert torch.equal(norm, block.get_submodule("norm").weight)


def test_layer_by_layer_with_a_penalty_of_each_group(data: BlockData) -> None:
    block = quantized(dense_block())
    dense = dense_block()
    asked: list[list[str]] = []

    def of(names: Any) -> WeightPenalty:
        asked.append(list(names))
        return WeightPenalty({name: dense.get_submodule(name).weight for name in names}, None)

    stages = [Stage(name="mixed", epochs=2, penalty=1.0)]
    outcome = LayerwiseTrainer(block, dense, data, SETTINGS, CPU, stages=stages, penalty=of).train(0)
    assert asked == [["up"], ["down"]]
    assert outcome.end_error < outcome.start_error


class Routed(nn.Module):
    """A layer that sees only the tokens whose first feature is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        chosen = x[..., 0] > 0
        out = x.clone()
        out[chosen] = out[chosen] + gain * self.up(x[chosen])
        return out


def test_layers_that_see_other_tokens_are_refused(data: BlockData) -> None:
    dense = Routed().requires_grad_(False)
    block = copy.deepcopy(dense)
    start = round_to_nearest(dense.up.weight, SCHEME)
    quantizer = AffineQuantizer(dense.up.weight, start.scales, start.zeros, SCHEME)
    block.set_submodule("up", TrainedLinear(quantizer, dense.up.bias))
    with pytest.raises(InputError, match="does not see every token"):
        LayerwiseTrainer(block, dense, data, SETTINGS, CPU).train(0)


class Chosen(nn.Module):
    """A layer that takes all tokens of some samples, and none of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x + self.up(x)
        return made + self.other(x) if x[0, 0, 0] > 0 else made


@pytest.mark.parametrize("calls", [(False, True), (True, False)])
def test_layers_that_only_some_samples_call_are_refused(calls: tuple[bool, bool], tmp_path: Path) -> None:
    inputs = torch.randn(6, 8, WIDTH, generator=torch.Generator().manual_seed(2)).abs()
    for sample, called in enumerate(calls):
        inputs[sample, 0, 0] *= 1 if called else -1
    dense = Chosen().requires_grad_(False)
    block = copy.deepcopy(dense)
    for name in ("up", "other"):
        weight = dense.get_submodule(name).weight
        start = round_to_nearest(weight, SCHEME)
        quantizer = AffineQuantizer(weight, start.scales, start.zeros, SCHEME)
        block.set_submodule(name, TrainedLinear(quantizer, dense.get_submodule(name).bias))
    x = store(inputs, tmp_path)
    data = BlockData(x, store(inputs, tmp_path), None, {}, training=4, originals=x)
    with pytest.raises(InputError, match="'other' does not see every token"):
        LayerwiseTrainer(block, dense, data, SETTINGS, CPU).train(0)


def test_a_penalty_that_reaches_nothing_that_trains_leaves_the_block(data: BlockData) -> None:
    block = quantized(dense_block(), rank=4)
    own = penalty(block)
    stage = Stage(name="wpt", epochs=2, penalty=1.0, weight_lr=0, scale_lr=0, norm_lr=0.01, adapter_lr=0.01)
    outcome = BlockTrainer(block, data, SETTINGS, CPU, stages=[stage], penalty=own).train(0)
    assert outcome.steps == 0
    without = BlockTrainer(block, data, SETTINGS, CPU, stages=[Stage(name="wpt", epochs=2)]).train(0)
    assert without.steps == 0


def test_measuring_without_adapters_leaves_them_switched_on(data: BlockData) -> None:
    block = quantized(dense_block(), rank=4)
    settings = SETTINGS.model_copy(update={"epochs": 1, "base_share": 0.5})
    BlockTrainer(block, data, settings, CPU).train(0)
    assert all(layer.adapted for layer in layers(block).values())
    assert not any(layer.adapter.training for layer in layers(block).values() if layer.adapter)
