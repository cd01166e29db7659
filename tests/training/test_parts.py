"""What a process holds of parameters that several share, the others played."""

import pytest
import torch
from torch import nn

from ulbq import distributed
from ulbq.training.optimizer import Group, half_adamw, make_optimizer, sign_descent
from ulbq.training.parts import SplitTrained


class _Chain(nn.Module):
    """Two matrices, one of which makes no even parts, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(4, 3))
        self.norm = nn.Parameter(torch.ones(3))
        self.second = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first @ x * self.norm[0]) @ self.second.sum(1, keepdim=True)


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first of two processes, whose other has the same gradients; sizes of what was summed, in order."""
    sizes: list[int] = []

    def sum_of_own(values: torch.Tensor) -> torch.Tensor:
        sizes.append(len(values))
        return 2 * values[: len(values) // 2]

    monkeypatch.setattr(distributed, "_world", distributed._World(0, 2, None))
    monkeypatch.setattr(distributed, "sum_", lambda *tensors: None)
    monkeypatch.setattr(distributed, "sum_of_own", sum_of_own)
    monkeypatch.setattr(distributed, "join_own", lambda values, into: into[: len(values)].copy_(values))
    return sizes


def _split(chain: _Chain) -> SplitTrained:
    return SplitTrained([Group(list(chain.parameters()), 0.1, 0.0)], chain)


def test_a_process_moves_and_keeps_its_part(summed: list[int]) -> None:
    chain = _Chain()
    trained = _split(chain)
    assert [p.numel() for group in trained.groups for p in group.parameters] == [6, 2, 5]
    assert [len(copy) for copy in trained.snapshot()] == [6, 2, 5]
    before = trained.snapshot()
    for make in (make_optimizer, half_adamw, sign_descent):
        optimizer = make(trained.groups, 1.0)
        chain(torch.ones(3, 3)).sum().backward()
        trained.went_back()
        trained.settle(0.0)
        optimizer.step()
        optimizer.zero_grad()
        trained.moved()
    assert (chain.first.flatten()[:6] < 1).all()
    assert (chain.first.flatten()[6:] == 1).all()
    assert (chain.second.flatten()[:5] < 1).all()
    trained.restore(before)
    assert all((p == 1).all() for p in chain.parameters())


def test_gradients_go_as_the_way_back_leaves_them(summed: list[int]) -> None:
    chain = _Chain()
    trained = _split(chain)
    seen: list[int] = []
    chain.first.register_hook(lambda gradient: seen.extend(summed))
    for _ in range(2):
        chain(torch.ones(3, 3)).sum().backward()
        assert all(p.grad is None for p in chain.parameters())
        trained.went_back()
    # The second matrix, filled up, before there is a gradient of the first; vectors come last.
    assert seen[:1] == [10]
    assert summed == [10, 12, 4] * 2
    # 9 of either pass in either process.
    assert torch.equal(trained.groups[0].parameters[0].grad, torch.full((6,), 36.0))
    trained.close()
    chain(torch.ones(3, 3)).sum().backward()
    assert chain.first.grad is not None


def test_what_nobody_used_has_no_gradient(summed: list[int]) -> None:
    chain = _Chain()
    trained = _split(chain)
    (chain.first.sum() * 3).backward()
    trained.went_back()
    trained.settle(1.0)
    first, norm, second = trained.groups[0].parameters
    assert norm.grad is None
    assert second.grad is None
    assert first.grad is not None
    assert first.grad.norm() == pytest.approx(1.0, rel=1e-4)


def test_a_process_may_have_no_part_of_what_is_small(summed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_world", distributed._World(3, 4, None))
    monkeypatch.setattr(distributed, "sum_of_own", lambda values: values[len(values) // 4 * 3 :].clone())
    monkeypatch.setattr(distributed, "join_own", lambda values, into: into[len(values) * 3 :].copy_(values))
    chain = _Chain()
    trained = _split(chain)
    assert [p.numel() for group in trained.groups for p in group.parameters] == [3, 0, 0]
    for make in (make_optimizer, half_adamw, sign_descent):
        optimizer = make(trained.groups, 1.0)
        chain(torch.ones(3, 3)).sum().backward()
        trained.went_back()
        trained.settle(1.0)
        optimizer.step()
        optimizer.zero_grad()
        trained.moved()
    trained.restore(trained.snapshot())
    assert (chain.first.flatten()[9:] < 1).all()
    assert all((values == 1).all() for values in (chain.first.flatten()[:9], chain.norm, chain.second))


def test_matrices_do_not_wait_for_an_adapter_that_a_step_leaves_out(summed: list[int]) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(32, 32))
    module.adapter = nn.Parameter(torch.ones(1, 8))
    trained = SplitTrained([Group(list(module.parameters()), 0.1, 0.0)], module)
    module.weight.sum().backward()
    assert summed == [1024]
    trained.went_back()
    assert summed == [1024, 8]
