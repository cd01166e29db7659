"""Experts at once give what they give in turn, and go in turn wherever a call of each is more than a product."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.kernels.matrices import random_matrix
from tests.nn.test_experts import EXPERTS, fused_module, routed, single_experts
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme
from ulbq.kernels import build
from ulbq.models.watch import watching
from ulbq.nn import together
from ulbq.nn.experts import Experts, showing
from ulbq.nn.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

SIGNS = BinaryMosScheme(experts=2)
W3 = AffineScheme(bits=3, group_size=-1)


def packed(kind: str, *schemes: AnyScheme, cache: bool = False) -> Experts:
    """Experts of random matrices, the schemes by turns."""
    experts = single_experts(fused_module(kind))
    for number in range(EXPERTS):
        for index, projection in enumerate(experts.fusion.projections):
            name = f"{number}.{projection}"
            dense = experts.get_submodule(name)
            outs, columns = dense.get_parameter("weight").shape
            scheme = schemes[number % len(schemes)]
            layer = QuantLinear(scheme, columns, outs, bias=experts.fusion.biased, cache=cache)
            layer.assign(random_matrix(scheme, outs, columns, seed=3 * number + index))
            if experts.fusion.biased:
                nn.init.normal_(layer.get_parameter("bias"))
            experts.set_submodule(name, layer)
    return experts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many choices each product of all experts was for."""
    found: list[int] = []
    multiply = together.banks.multiply
    monkeypatch.setattr(together.banks, "multiply", lambda *a: found.append(a[2].places) or multiply(*a))
    return found


def in_turn(experts: Experts, *given: torch.Tensor) -> torch.Tensor:
    """Nobody is shown anything, and nothing is cut short."""
    with showing({experts: (-1,)}):
        found: torch.Tensor = experts(*given)
    return found


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Products are the same bits; torch's exponential function gives an element others by its place in a tensor."""
    assert found.dtype == wanted.dtype
    size = 4 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, wanted, rtol=size, atol=size * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["concatenated", "by turns, with biases", "without a gate"])
@pytest.mark.parametrize("schemes", [(W3,), (DualBinaryScheme(group_size=-1),), (W3, AffineScheme(group_size=-1))])
def test_they_give_the_same(kind: str, schemes: tuple[AnyScheme, ...], dtype: torch.dtype, calls: list[int]) -> None:
    experts = packed(kind, *schemes)
    hidden, index, weights = routed()
    for tokens in (1, 2, len(hidden)):
        given = hidden[:tokens].to(dtype), index[:tokens], weights[:tokens].to(dtype)
        wanted = in_turn(experts, *given)
        assert not calls
        found = experts(*given)
        assert found.dtype == dtype
        assert_same(found, wanted)
        assert torch.equal(experts(*given), found)
        calls[:] = calls[: len(calls) // 2]
        assert calls == [2 * tokens] * len(experts.fusion.projections)
        calls.clear()


def test_autocast_reaches_them(calls: list[int]) -> None:
    experts, given = packed("concatenated", W3), routed()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(experts(*given), in_turn(experts, *given))
    assert len(calls) == 3


def test_choices_beyond_the_experts_and_no_tokens_go_in_turn(calls: list[int]) -> None:
    experts = packed("concatenated", W3)
    hidden, index, weights = routed()
    wanted = experts(hidden, index[:, :1], weights[:, :1])
    calls.clear()
    index[:, 1] = EXPERTS
    assert_same(experts(hidden, index, weights), wanted)
    assert experts(hidden[:0], index[:0], weights[:0]).shape == (0, hidden.shape[1])
    assert not calls


def test_gradients_of_the_inputs_are_what_they_are_in_turn(calls: list[int]) -> None:
    experts = packed("concatenated", W3)
    hidden, index, weights = routed()
    leaf, same = (hidden.clone().requires_grad_() for _ in range(2))
    experts(leaf, index, weights).square().sum().backward()
    in_turn(experts, same, index, weights).square().sum().backward()
    assert not calls
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, same.grad)
    with torch.no_grad():
        experts(leaf, index, weights)
    assert len(calls) == 3


def test_who_watches_a_layer_sees_its_inputs(calls: list[int]) -> None:
    experts, given = packed("concatenated", W3), routed()
    wanted = experts(*given)
    calls.clear()
    seen: dict[int, int] = {}
    layers = {number: experts.get_submodule(f"{number}.up_proj") for number in range(EXPERTS)}
    with watching(layers, lambda number, x: seen.__setitem__(number, len(x))):
        assert_same(experts(*given), wanted)
    counts = given[1].flatten().bincount().tolist()
    assert seen == dict(enumerate(counts))
    assert not calls
    experts(*given)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda experts: experts.set_submodule("1.up_proj", nn.Linear(24, 16, bias=False)),
        lambda experts: setattr(experts.get_submodule("1.up_proj"), "forward", lambda x: x[..., :16]),
        lambda experts: experts.set_submodule(
            "1.up_proj", nn.Sequential(experts.get_submodule("1.up_proj"), nn.ReLU())
        ),
    ],
    ids=["dense", "another forward", "an adapter"],
)
def test_a_layer_that_is_more_than_its_product_is_called(change: Callable[[Experts], None]) -> None:
    experts, given = packed("concatenated", W3), routed()
    experts(*given)
    with torch.no_grad():
        change(experts)
        assert_same(experts(*given), in_turn(experts, *given))
        assert_same(experts(*given), in_turn(experts, *given))


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    experts, given = packed("by turns, with biases", W3), routed()
    experts(*given)
    bias = experts.get_submodule("1.up_proj").get_parameter("bias").requires_grad_()
    experts(*given).sum().backward()
    assert bias.grad is not None
    assert bias.grad.any()


@pytest.mark.parametrize("way", ["assigned", "loaded", "cast", "copied", "pickled"])
def test_matrices_that_come_later_are_seen(way: str, calls: list[int]) -> None:
    experts, given = packed("concatenated", W3), routed()
    experts(*given)
    other = packed("concatenated", W3)
    for number in range(EXPERTS):
        layer = other.get_submodule(f"{number}.up_proj")
        assert isinstance(layer, QuantLinear)
        layer.assign(random_matrix(W3, 16, 24, seed=100 + number))
    wanted = in_turn(other, *given)
    if way == "assigned":
        for number in range(EXPERTS):
            mine, theirs = (one.get_submodule(f"{number}.up_proj") for one in (experts, other))
            assert isinstance(mine, QuantLinear)
            assert isinstance(theirs, QuantLinear)
            mine.assign(theirs.tensors())
    elif way == "loaded":
        experts.load_state_dict(other.state_dict())
    else:
        other(*given)
        made = {"cast": other.double, "copied": lambda: copy.deepcopy(other), "pickled": lambda: again(other)}
        experts = made[way]()
        if experts is not other:
            for buffer in other.buffers():
                buffer.zero_()
    calls.clear()
    assert_same(experts(*given), wanted)
    assert len(calls) == 3


def again(experts: Experts) -> Experts:
    found = pickle.loads(pickle.dumps(experts))
    assert isinstance(found, Experts)
    return found


def test_many_rows_and_formats_without_a_bank_go_in_turn(calls: list[int]) -> None:
    hidden, index, weights = routed()
    signs = packed("concatenated", SIGNS)
    assert torch.equal(signs(hidden, index, weights), in_turn(signs, hidden, index, weights))
    many = hidden.repeat(30, 1), index.repeat(30, 1), weights.repeat(30, 1)
    for cache in (False, True):
        experts = packed("concatenated", W3, cache=cache)
        assert torch.equal(experts(*many), in_turn(experts, *many))
    assert not calls
