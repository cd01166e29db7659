"""Weights that make good what the blocks before have changed: against least squares, and token by token."""

import torch

from ulbq.solvers.drift import Drift
from ulbq.solvers.hessian import HessianSum


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums(wanted: torch.Tensor, inputs: torch.Tensor, *, relative: bool) -> tuple[HessianSum, Drift]:
    hessian, drift = (kind(inputs.shape[-1], relative=relative) for kind in (HessianSum, Drift))
    for start in range(0, len(inputs), 100):
        hessian.add(inputs[start : start + 100])
        drift.add(wanted[start : start + 100], inputs[start : start + 100])
    return hessian, drift


def test_the_weight_has_the_least_error_of_all():
    weight, wanted = noise(5, 12, seed=0), noise(1000, 12, seed=1)
    inputs = wanted @ noise(12, 12, seed=2) + 0.3 * noise(1000, 12, seed=3)
    hessian, drift = sums(wanted, inputs, relative=False)
    found = weight + weight @ drift.correction(hessian.matrix)

    ridge = 0.1 * inputs.square().sum(0).mean().sqrt().square() * torch.eye(12)
    least = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted + ridge) @ weight.T
    torch.testing.assert_close(found, least.T, rtol=1e-4, atol=1e-5)


def test_inputs_that_have_not_changed_leave_the_weight():
    inputs = noise(200, 8, seed=0)
    for relative in (False, True):
        hessian, drift = sums(inputs, inputs, relative=relative)
        assert not drift.correction(hessian.matrix).any()


def test_one_token_that_only_one_model_makes_large_does_not_rule():
    wanted = noise(400, 8, seed=0)
    inputs = wanted + 0.1 * noise(400, 8, seed=1)
    hessian, drift = sums(wanted, inputs, relative=True)
    calm = drift.correction(hessian.matrix)
    wanted[7] *= 1e4
    hessian, drift = sums(wanted, inputs, relative=True)
    torch.testing.assert_close(drift.correction(hessian.matrix), calm, rtol=0, atol=0.02)


def test_few_tokens_change_little():
    wanted = noise(16, 64, seed=0)
    inputs = wanted + noise(16, 64, seed=1)
    hessian, drift = sums(wanted, inputs, relative=False)
    fewer = drift.correction(hessian.matrix).norm()
    wanted = noise(6400, 64, seed=0)
    inputs = wanted + noise(6400, 64, seed=1)
    hessian, drift = sums(wanted, inputs, relative=False)
    assert fewer < drift.correction(hessian.matrix).norm()
