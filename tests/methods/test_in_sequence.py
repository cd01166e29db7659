"""Layers in execution order: who reads what, and from which pass."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from ulbq.blockwise.activations import ActivationStore
from ulbq.config.methods import ClaqOptions, GptqOptions
from ulbq.config.training import TokenWeighting
from ulbq.methods import in_sequence
from ulbq.methods.base import BlockTask
from ulbq.methods.claq import Claq
from ulbq.methods.gptq import Gptq
from ulbq.methods.in_sequence import solve_in_sequence
from ulbq.nn.quant_linear import linear_layer
from ulbq.sensitivity.outputs import OutputCosts
from ulbq.solvers import hessian
from ulbq.solvers.hessian import HessianSum
from ulbq.training.objective import BlockData
from ulbq.training.precision import Precision

WIDTH, SAMPLES, LENGTH = 16, 6, 20


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 24)
        self.gate = nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.gate(x)) * self.up(x))
        return result


class Block(nn.Module):
    """Two layers on one input, one on what they make, and experts: all tokens, a few, none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.query = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, 8)
        self.out = nn.Linear(8, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = nn.functional.layer_norm(hidden, (WIDTH,))
        hidden = hidden + self.mix(self.out(self.value(x) * self.query(x)[..., :8].sigmoid()))
        few = hidden[..., 0] > 1.9
        routed = torch.zeros_like(hidden)
        routed[few] = self.experts[1](hidden[few]).to(hidden.dtype)
        result: torch.Tensor = hidden + self.experts[0](hidden) + routed
        return result


LINEARS = tuple(name for name, module in Block().named_modules() if isinstance(module, nn.Linear))


def task(folder: Path, precision: torch.dtype = torch.float32) -> BlockTask:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        block = Block().requires_grad_(False)
        hidden = torch.randn(SAMPLES + 2, LENGTH, WIDTH)
    hidden[0, :, 0] = 0  # the first sample calls no second expert with a token, in the first stream at least
    store = ActivationStore((SAMPLES + 2, LENGTH, WIDTH), torch.float32, limit=2**30, directory=folder)
    store.set(0, hidden)
    data = BlockData(store, store, None, {}, SAMPLES)
    cpu = Precision(torch.device("cpu"), precision)
    return BlockTask(0, block, LINEARS, {}, data, cpu, 0, lambda error: None)


def solved(
    asked: BlockTask, *, one_by_one: bool, weighting: TokenWeighting = TokenWeighting.ENERGY
) -> list[tuple[tuple[str, ...], HessianSum]]:
    """Halve every weight; returns what the solver was called with."""
    calls = []

    def solve(linears, inputs):  # type: ignore[no-untyped-def]
        calls.append((tuple(linears), inputs))
        return {linear: asked.weight(linear) / 2 for linear in linears}

    solve_in_sequence(asked, solve, one_by_one=one_by_one, weighting=weighting)
    return calls


def inputs_of(block: nn.Module, linear: str, hidden: torch.Tensor) -> torch.Tensor:
    """All that a layer is called with, ``[tokens, in]``."""
    caught: list[torch.Tensor] = []
    handle = block.get_submodule(linear).register_forward_pre_hook(
        lambda module, arguments: caught.append(arguments[0].flatten(0, -2))
    )
    block(hidden)
    handle.remove()
    return torch.cat(caught) if caught else torch.zeros(0, linear_layer(block, linear).in_features)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_layer_is_solved_once_with_those_that_read_the_same(one_by_one: bool, tmp_path: Path) -> None:
    calls = solved(task(tmp_path), one_by_one=one_by_one)
    groups = [names for names, _ in calls]
    assert sorted(name for names in groups for name in names) == sorted(LINEARS)
    assert groups[:4] == [("value", "query"), ("out",), ("mix.0",), ("mix.2",)]
    assert ("experts.0.gate", "experts.0.up") in groups
    order = [name for names in groups for name in names]
    assert all(order.index(f"experts.{i}.down") > order.index(f"experts.{i}.up") for i in range(3))
    if one_by_one:
        assert order.index("experts.0.down") > order.index("experts.2.up")


@pytest.mark.parametrize("weighting", list(TokenWeighting))
@pytest.mark.parametrize("one_by_one", [False, True])
def test_second_moments_are_of_what_the_layer_then_reads(
    one_by_one: bool, weighting: TokenWeighting, tmp_path: Path
) -> None:
    asked = task(tmp_path)
    assert asked.data is not None
    hidden = asked.data.inputs.get(slice(0, SAMPLES))
    full = task(tmp_path).block
    for names, found in solved(asked, one_by_one=one_by_one, weighting=weighting):
        for name in names:
            # The quantized layers before it: at the end, all are quantized, and no layer reads what comes later.
            rows = inputs_of(asked.block if one_by_one else full, name, hidden)
            assert found.tokens == len(rows), name
            if weighting is TokenWeighting.ENERGY:
                rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
            expected = 2 / max(1, len(rows)) * rows.t() @ rows
            torch.testing.assert_close(found.matrix, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_each_layer_has_its_own_moments_where_outputs_cost(tmp_path: Path) -> None:
    plain = task(tmp_path)
    layers = ("query", "value", "out")
    generator = torch.Generator().manual_seed(0)
    costs = {name: OutputCosts(torch.rand(SAMPLES, LENGTH, 2, generator=generator), None) for name in LINEARS}
    asked = dataclasses.replace(plain, linears=layers, outputs=costs)
    assert asked.data is not None
    hidden = asked.data.inputs.get(slice(0, SAMPLES))
    calls = solved(asked, one_by_one=True, weighting=TokenWeighting.UNIFORM)
    assert [names for names, _ in calls] == [("value",), ("query",), ("out",)]
    for (name,), found in calls:
        rows = inputs_of(asked.block, name, hidden)
        for group in range(2):
            sizes = rows.square().mean(1, keepdim=True)
            weights = (costs[name].tokens[:, :, group].reshape(-1, 1) + 1 / sizes) / 2
            torch.testing.assert_close(
                found.matrices[group], 2 / len(rows) * (rows * weights).t() @ rows, rtol=1e-4, atol=1e-6
            )


def test_experts_are_solved_from_the_tokens_that_reach_them(tmp_path: Path) -> None:
    tokens = {name: found.tokens for names, found in solved(task(tmp_path), one_by_one=True) for name in names}
    assert tokens["experts.0.up"] == tokens["query"] == SAMPLES * LENGTH
    assert 0 < tokens["experts.1.up"] < SAMPLES * LENGTH / 4
    assert tokens["experts.2.up"] == tokens["experts.2.down"] == 0


def test_the_weights_that_came_are_left_to_compare_with(tmp_path: Path) -> None:
    asked, fresh = task(tmp_path), task(tmp_path).block
    came = {name: asked.weight(name) for name in LINEARS}
    solved(asked, one_by_one=True)
    for name in LINEARS:
        assert torch.equal(came[name], linear_layer(fresh, name).weight), name
        assert torch.equal(asked.weight(name), came[name] / 2), name


def test_samples_held_out_are_not_looked_at(tmp_path: Path) -> None:
    asked, other = task(tmp_path), task(tmp_path)
    assert other.data is not None
    other.data.inputs.set(SAMPLES, 1000 * torch.ones(2, LENGTH, WIDTH))
    for (_, ours), (_, theirs) in zip(solved(asked, one_by_one=True), solved(other, one_by_one=True), strict=True):
        assert torch.equal(ours.matrix, theirs.matrix)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_layers_with_too_few_tokens_are_rounded_and_named(true_sequential: bool, tmp_path: Path) -> None:
    asked = task(tmp_path, torch.bfloat16)
    options = GptqOptions(bits=4, true_sequential=true_sequential)
    method = Gptq.from_options(options, 8)
    result = method.quantize_block(asked)
    assert list(result.packed) == list(LINEARS)
    told = " ".join(": ".join(note) for note in result.notes)
    assert "experts.2.gate" in told
    assert "experts.2.down" in told
    assert "0 tokens are too few for 24 columns" in told
    assert "query" not in told
    assert "experts.0" not in told
    for name, tensors in result.packed.items():
        assert set(tensors) == {"codes", "scales", "zeros"}, name


def test_of_too_few_tokens_the_diagonal_alone_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (in_sequence, hessian):
        monkeypatch.setattr(module, "FEWEST_TOKENS", 2)
    asked, met = task(tmp_path), dict[str, HessianSum]()
    assert asked.data is not None
    asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, training=1))

    def keep(linears, inputs):  # type: ignore[no-untyped-def]
        met.update(dict.fromkeys(linears, inputs))
        return {name: asked.weight(name) for name in linears}

    solve_in_sequence(asked, keep, one_by_one=True, weighting=TokenWeighting.UNIFORM, rounds_few=True)
    # 20 tokens: enough of 8 columns, too few of 16; of experts nobody knows before how many they see.
    for name, alone in (("query", True), ("mix.2", True), ("out", False), ("experts.0.up", False)):
        if alone:
            with pytest.raises(ValueError, match="diagonal"):
                _ = met[name].matrix
        rows = inputs_of(asked.block, name, asked.data.inputs.get(slice(0, 1)))
        torch.testing.assert_close(met[name].diagonal, 2 / 20 * rows.square().sum(0))
        assert met[name].tokens == 20
    assert {name for name, inputs in met.items() if not inputs.few} == {"out"}


class Crossed(nn.Module):
    """One layer reads what each sample is called with beside its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(hidden) + self.key(states).sum(1, keepdim=True)
        return result


def test_the_first_samples_images_say_nothing_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_sequence, "FEWEST_TOKENS", 10)  # 160 of 16 columns; of the hidden states there are 120
    asked, met = task(tmp_path), dict[str, HessianSum]()
    assert asked.data is not None
    states = [{"states": torch.ones(1, 1 + 50 * (row > 0), WIDTH)} for row in range(SAMPLES + 2)]
    data = dataclasses.replace(asked.data, kwargs=states)
    asked = dataclasses.replace(asked, block=Crossed().requires_grad_(False), linears=("out", "key"), data=data)

    def keep(linears, inputs):  # type: ignore[no-untyped-def]
        met.update(dict.fromkeys(linears, inputs))
        return {}

    solve_in_sequence(asked, keep, one_by_one=False, rounds_few=True)
    assert met["key"].tokens == 1 + 5 * 51
    assert met["key"].matrix.shape == (WIDTH, WIDTH)
    with pytest.raises(ValueError, match="diagonal"):
        _ = met["out"].matrix


def test_what_a_layer_was_is_kept_in_half_precision_where_that_changes_nothing(tmp_path: Path) -> None:
    asked = task(tmp_path)
    layer = linear_layer(asked.block, "out")
    layer.weight = nn.Parameter(layer.weight.bfloat16().float(), requires_grad=False)
    before = {name: asked.weight(name) for name in LINEARS}
    solved(asked, one_by_one=True)
    assert {name for name, kept in asked.originals.items() if kept.dtype == torch.bfloat16} == {"out"}
    assert all(torch.equal(asked.originals[name].float(), before[name]) for name in LINEARS)
    asked.restore()
    assert all(torch.equal(asked.weight(name), before[name]) for name in LINEARS)


def test_a_singular_input_is_told(tmp_path: Path) -> None:
    asked = task(tmp_path)
    assert asked.data is not None
    asked.data.inputs.set(0, torch.ones(SAMPLES, LENGTH, WIDTH).cumsum(2))
    result = Gptq.from_options(GptqOptions(damping=0.0), 8).quantize_block(asked)
    assert any("query" in layers and "damping raised to" in note for layers, note in result.notes)


def test_a_layer_that_no_token_reaches_costs_nothing_in_a_survey(tmp_path: Path) -> None:
    found = Claq.from_options(ClaqOptions(target_bits=2.5, allocation="global"), -1).survey_block(task(tmp_path))
    assert set(found) == set(LINEARS)
    for name, survey in found.items():
        assert survey.losses.any() != name.startswith("experts.2."), name


def drifting(folder: Path) -> BlockTask:
    """The task where the blocks before have changed the inputs."""
    asked = task(folder)
    assert asked.data is not None
    changed = ActivationStore((SAMPLES + 2, LENGTH, WIDTH), torch.float32, limit=2**30, directory=folder)
    full = asked.data.inputs.get(slice(None))
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(5))
    mixing = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(6))
    changed.set(0, full @ mixing + 0.1 * noise)
    return dataclasses.replace(asked, data=dataclasses.replace(asked.data, inputs=changed, originals=asked.data.inputs))


def test_weights_make_good_what_the_blocks_before_have_changed(tmp_path: Path) -> None:
    """With a solver that keeps what it is given, each layer comes nearer to what it gives in full precision."""
    asked = drifting(tmp_path)
    assert asked.data is not None
    assert asked.data.originals is not None
    reference, plain = copy.deepcopy(asked.block), copy.deepcopy(asked.block)
    met: dict[str, torch.Tensor] = {}

    def keep(linears, inputs):  # type: ignore[no-untyped-def]
        met.update({name: asked.weight(name) for name in linears})
        return {name: asked.weight(name) for name in linears}

    solve_in_sequence(asked, keep, one_by_one=True, full_inputs=True)

    moved = {name for name in LINEARS if not torch.equal(met[name], linear_layer(reference, name).weight)}
    # Other tokens may call an expert in the quantized model: nothing tells which belong together.
    assert moved == {name for name in LINEARS if not name.startswith("experts")}
    for name in sorted(moved):

        def made(block: nn.Module, hidden: ActivationStore, name: str = name) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            handle = linear_layer(block, name).register_forward_hook(lambda _, __, y: seen.append(y))
            block(hidden.get(slice(0, SAMPLES)))
            handle.remove()
            return seen[0]

        wanted = made(reference, asked.data.originals)
        errors = [(made(block, asked.data.inputs) - wanted).square().mean() for block in (asked.block, plain)]
        assert errors[0] < 0.6 * errors[1], name


def test_the_full_precision_block_runs_no_farther_than_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as where all of it runs, in fewer calls of its layers."""
    calls: list[int] = []

    def moved() -> dict[str, torch.Tensor]:
        asked, met = drifting(tmp_path), dict[str, torch.Tensor]()

        def keep(linears, inputs):  # type: ignore[no-untyped-def]
            met.update({name: asked.weight(name) for name in linears})
            return {name: asked.weight(name) for name in linears}

        before, forward = 0, nn.Linear.forward

        def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            nonlocal before
            before += 1
            return forward(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", counted)
            solve_in_sequence(asked, keep, one_by_one=True, full_inputs=True)
        calls.append(before)
        return met

    early, wanted = moved(), in_sequence._wanted
    # Inputs that nobody counts: then no call is the last.
    monkeypatch.setattr(in_sequence, "_wanted", lambda *given: wanted(*given[:3], dict.fromkeys(given[3], 0), given[4]))
    whole = moved()
    assert all(torch.equal(early[name], whole[name]) for name in LINEARS)
    assert calls[0] < 0.8 * calls[1]


def test_moments_to_judge_by_are_of_the_samples_held_out_alone(tmp_path: Path) -> None:
    asked = task(tmp_path)
    assert asked.data is not None
    met: dict[str, HessianSum] = {}

    def keep(linears, inputs):  # type: ignore[no-untyped-def]
        met.update(dict.fromkeys(linears, inputs))
        return {name: asked.weight(name) for name in linears}

    solve_in_sequence(asked, keep, one_by_one=True, weighting=TokenWeighting.UNIFORM, heldout=True)
    for name in ("query", "out", "experts.1.up"):
        for given, part in ((met[name], slice(0, SAMPLES)), (met[name].heldout, slice(SAMPLES, None))):
            rows = inputs_of(asked.block, name, asked.data.inputs.get(part))
            assert given is not None
            assert given.tokens == len(rows)
            torch.testing.assert_close(given.matrix, 2 / max(len(rows), 1) * rows.T @ rows)
    assert solved(task(tmp_path), one_by_one=True)[0][1].heldout is None


def test_what_has_not_changed_is_solved_as_it_is(tmp_path: Path) -> None:
    asked = task(tmp_path)
    assert asked.data is not None
    weights = {name: asked.weight(name) for name in LINEARS}
    both = dataclasses.replace(asked, data=dataclasses.replace(asked.data, originals=asked.data.inputs))

    def keep(linears, inputs):  # type: ignore[no-untyped-def]
        return {name: both.weight(name) for name in linears}

    solve_in_sequence(both, keep, one_by_one=True, full_inputs=True)
    assert all(torch.equal(both.weight(name), weight) for name, weight in weights.items())
