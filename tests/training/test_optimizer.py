"""Moments in half precision: as AdamW on average, the same in every run, and half the memory."""

import pytest
import torch
from torch import nn

from ulbq.training import optimizer as module
from ulbq.training.optimizer import Group, HalfAdamW, half_adamw, make_optimizer


def learned(made: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> float:
    """What is left of a squared error whose gradients are noisy."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        parameter.grad = parameter.detach() - 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
        made.step()
    return (parameter.detach() - 1).square().mean().item()


def test_it_goes_where_adamw_goes() -> None:
    left = {}
    for make in (make_optimizer, half_adamw):
        parameter = nn.Parameter(torch.zeros(64, 48))
        made = make([Group([parameter], lr=0.02, weight_decay=0.01)], 1.0)
        left[make] = learned(made, parameter, 20), learned(made, parameter, 200)
    assert left[half_adamw] == pytest.approx(left[make_optimizer], rel=0.03)
    assert left[half_adamw][1] < 0.05


def test_the_second_moment_does_not_stand_still() -> None:
    parameter = nn.Parameter(torch.zeros(4096))
    made = HalfAdamW([{"params": [parameter], "lr": 0.0}])
    for _ in range(700):
        parameter.grad = torch.ones(4096)
        made.step()
    first, second = made.state[parameter]["moments"]
    assert first.dtype == second.dtype == torch.bfloat16
    assert first.float().mean().item() == pytest.approx(1, rel=0.01)
    # Rounded to nearest it stays at a quarter.
    assert second.float().mean().item() == pytest.approx(1 - 0.999**700, rel=0.01)


def test_every_run_makes_the_same_of_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed, at_once in ((0, 1 << 20), (1, 1 << 20), (1, 64)):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        torch.manual_seed(seed)
        parameter = nn.Parameter(torch.zeros(16, 8).t())
        learned(HalfAdamW([{"params": [parameter], "lr": 0.02}]), parameter, 3)
        found.append(parameter.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])  # drawn in another order
    torch.testing.assert_close(found[1], found[2], rtol=0.02, atol=1e-3)


def test_what_is_not_finite_is_not_hidden() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    made = HalfAdamW([{"params": [parameter], "lr": 0.02}])
    for gradient in (torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]), torch.ones(4)):
        parameter.grad = gradient
        made.step()
    assert parameter.isfinite().tolist() == [True, False, False, False]
