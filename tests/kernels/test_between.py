"""Norms, rotary positions and gates, compiled, against the same in float64: values and gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch

from ulbq.kernels import between, build

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(
    ours: Callable[..., torch.Tensor],
    exact: Callable[..., torch.Tensor],
    given: Sequence[torch.Tensor],
    tolerance: float,
) -> None:
    """Value and gradients of ``ours`` are those of ``exact``, relative to the norm of each."""
    single = [x.detach().requires_grad_() for x in given]
    double = [x.detach().double().requires_grad_() for x in given]
    found, wanted = ours(*single), exact(*double)
    incoming = draw(*found.shape, seed=9, dtype=found.dtype)
    pairs = [(found, wanted)]
    gradients = (torch.autograd.grad(found, single, incoming), torch.autograd.grad(wanted, double, incoming.double()))
    pairs += list(zip(*gradients, strict=True))
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm()


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 576), (70, 17), (33, 4096)])
@pytest.mark.parametrize("half", [False, True])
def test_norm(shape: tuple[int, ...], half: bool) -> None:
    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        whole, rounded = between.rms_norm(x, weight, 1e-5, half=half)
        assert (rounded is whole) is not half
        return rounded

    given = (draw(*shape), 1 + draw(shape[-1], seed=1))
    compare(ours, norm, given, TOLERANCE[torch.bfloat16 if half else torch.float32])


def test_a_norm_adds_up_the_gradients_of_both_of_its_results() -> None:
    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        whole, rounded = between.rms_norm(x, weight, 1e-5, half=True)
        assert rounded is not None
        return whole + 2 * rounded

    compare(ours, lambda *given: 3 * norm(*given), (draw(40, 33), draw(33, seed=1)), TOLERANCE[torch.bfloat16])


def test_frozen_weights_of_a_norm_get_no_gradient() -> None:
    x, weight = draw(3, 8).requires_grad_(), torch.ones(8)
    between.rms_norm(x, weight, 1e-5, half=False)[0].sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def turn(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cosines.unsqueeze(1) + torch.cat([-high, low], -1) * sines.unsqueeze(1)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize(("samples", "width"), [(1, 64), (2, 10)])
def test_rotation(dtype: torch.dtype, side_by_side: bool, samples: int, width: int) -> None:
    x = draw(2, 5, 3, width, dtype=dtype).transpose(1, 2) if side_by_side else draw(2, 3, 5, width, dtype=dtype)
    # Angles that differ between the halves tell which half's are taken.
    cosines, sines = draw(samples, 5, width, seed=1), draw(samples, 5, width, seed=2)
    compare(
        lambda x: between.rotate(x, cosines, sines, dtype),
        lambda x: turn(x, cosines.double(), sines.double()),
        [x],
        TOLERANCE[dtype],
    )
    assert between.rotate(x, cosines, sines, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("count", [1, 16, 1000])
def test_gate(dtype: torch.dtype, count: int) -> None:
    given = (3 * draw(count, dtype=dtype), draw(count, seed=1, dtype=dtype))
    compare(between.gated, lambda gate, up: torch.nn.functional.silu(gate) * up, given, TOLERANCE[dtype])


def test_gates_far_out_are_closed_or_open() -> None:
    gate = torch.tensor([-1e30, -200.0, -89.0, -20.0, 0.0, 20.0, 89.0, 200.0, torch.nan])
    found = between.gated(gate, torch.ones(9))
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("broken", ["epsilon", "row", "weight"])
def test_a_broken_norm_does_not_pass(broken: str) -> None:
    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        whole, _ = between.rms_norm(x, weight, 2e-5 if broken == "epsilon" else 1e-5, half=False)
        if broken == "row":  # one row's factor for another
            return torch.cat([whole[:-1], whole[-1:] * 1.001])
        return whole * (1 + 1e-4 * (weight - weight.detach())) if broken == "weight" else whole

    with pytest.raises(AssertionError):
        compare(ours, norm, (draw(40, 33), draw(33, seed=1)), TOLERANCE[torch.float32])
