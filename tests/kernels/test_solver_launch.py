"""The solvers' Triton kernels against torch's column loops: in the interpreter, and under ``-m gpu`` on a real GPU."""

import pytest
import torch

from tests.kernels.test_triton_launch import on_devices
from tests.solvers.moments import solved
from ulbq.formats import AffineScheme
from ulbq.kernels import solver_launch, triton_launch
from ulbq.solvers import gptq, kmeans
from ulbq.solvers.gptq import GptqSettings
from ulbq.solvers.hessian import factorize

OUTS, COLUMNS = 40, 96


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take what is on the CPU, too, where they are interpreted."""
    if triton_launch.interpreted():
        monkeypatch.setattr(solver_launch, "takes", lambda tensor: tensor.dtype == torch.float32)


def problem(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(OUTS, COLUMNS, generator=generator)
    x = torch.randn(400, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    return weight.to(device), (x.T @ x / 400).to(device)


@on_devices
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(2, 32, False), (4, -1, True), (3, 48, False)])
def test_gptq_by_blocks_is_as_good_as_by_columns(
    bits: int, group_size: int, symmetric: bool, act_order: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem(device)
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    settings = GptqSettings(act_order=act_order, block_size=64)
    found = solved(weight, hessian, scheme, settings)
    monkeypatch.setattr(solver_launch, "takes", lambda tensor: False)
    monkeypatch.setattr("ulbq.kernels.solvers.take", lambda *tensors: False)
    wanted = solved(weight, hessian, scheme, settings)
    assert (found.codes.codes != wanted.codes.codes).float().mean() < 0.02
    assert found.loss == pytest.approx(wanted.loss, rel=0.01)
    # The loss told is that of the codes.
    error = weight - gptq._values(found.codes)
    factor = factorize(hessian, damping=settings.damping, order=None)
    damped = hessian + torch.eye(COLUMNS, device=device) * factor.damping * hessian.diagonal().mean()
    assert (error @ damped * error).sum().item() == pytest.approx(found.loss, rel=1e-3)


@on_devices
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [4, 16])
def test_refined_centroids_are_those_of_the_host(
    levels: int, weighted: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(levels)
    values = torch.randn(3, 1100, generator=generator)
    start = values[:, :levels].sort().values
    start[1, -1] = 50.0  # holds nothing, and stays
    weights = torch.rand(3, 1100, generator=generator).gt(0.2).float() if weighted else None
    found = kmeans.refine(values.to(device), start.to(device), 2, None if weights is None else weights.to(device)).cpu()
    monkeypatch.setattr(solver_launch, "takes", lambda tensor: False)
    wanted = kmeans.refine(values, start, 2, weights)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert found[1, -1] == 50.0
