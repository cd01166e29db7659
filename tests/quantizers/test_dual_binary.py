import pytest
import torch

from ulbq.formats import dual_binary
from ulbq.formats.dual_binary import DualBinaryScheme
from ulbq.quantizers.dual_binary import DualBinaryQuantizer, nearest, search_scales

SCHEME = DualBinaryScheme(group_size=32)


def weights(seed: int = 0, rows: int = 24, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def error(weight: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    grouped = weight.unflatten(1, (scales.shape[2], -1))
    cost = importance.unflatten(0, (scales.shape[2], -1))
    return ((nearest(grouped, scales) - grouped).square() * cost).sum(-1)


def nearest_level(value: float, first: float, second: float) -> float:
    return min((0.0, first, second, first + second), key=lambda level: abs(level - value))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nearest_takes_the_closest_of_the_four_levels(sign: float) -> None:
    grouped = torch.linspace(-0.3, 0.5, 64).view(1, 1, 64)
    scales = sign * torch.tensor([0.2, -0.07]).view(2, 1, 1)
    rounded = nearest(grouped, scales).flatten().tolist()
    wanted = [nearest_level(v, *scales.flatten().tolist()) for v in grouped.flatten().tolist()]
    assert rounded == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_search_recovers_weights_that_lie_on_a_grid_of_either_orientation(sign: float) -> None:
    levels = sign * torch.tensor([-0.03, 0.0, 0.05, 0.08])
    weight = levels[torch.randint(4, (8, 64), generator=torch.Generator().manual_seed(1))]
    scales = search_scales(weight, torch.ones(64), 32)
    assert error(weight, scales, torch.ones(64)).max() < 1e-10


def test_search_beats_the_start_from_the_largest_weight_in_every_group() -> None:
    weight, importance = weights(), torch.rand(96, generator=torch.Generator().manual_seed(2))
    largest = weight.unflatten(1, (3, 32)).abs().amax(-1)
    published = torch.stack([largest, -largest / 2])
    found = error(weight, search_scales(weight, importance, 32), importance)
    assert (found <= error(weight, published, importance) + 1e-9).all()
    assert found.sum() < 0.7 * error(weight, published, importance).sum()


def test_search_follows_the_importance() -> None:
    weight = weights()
    importance = torch.ones(96)
    importance[::4] = 100.0
    weighted, plain = search_scales(weight, importance, 32), search_scales(weight, torch.ones(96), 32)
    assert error(weight, weighted, importance).sum() < error(weight, plain, importance).sum()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = weights()
    weight[3, 32:64] = 0
    quantizer = DualBinaryQuantizer(weight, search_scales(weight, torch.ones(96), 32), SCHEME)
    dense = dual_binary.dequantize(SCHEME, quantizer.finalize(), 96)
    assert torch.isfinite(dense).all()
    assert dense[3, 32:64].abs().max() == 0


def test_the_gradient_of_the_scales_is_exact_and_that_of_the_weights_straight_through() -> None:
    weight = weights()
    quantizer = DualBinaryQuantizer(weight, search_scales(weight, torch.ones(96), 32), SCHEME)
    incoming = torch.randn(24, 96, generator=torch.Generator().manual_seed(3))
    (quantizer() * incoming).sum().backward()

    planes, _ = dual_binary.unpack(SCHEME, quantizer.finalize(), 96)
    reference = quantizer.scales.detach().double().requires_grad_()
    step = quantizer.step.double().squeeze(-1)
    grouped = planes.double().unflatten(2, (3, 32))
    dense = (grouped * (reference * step).unsqueeze(-1)).sum(0).flatten(1)
    (dense * incoming.double()).sum().backward()
    torch.testing.assert_close(quantizer.scales.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)

    first, second = quantizer.scales.detach().unsqueeze(-1)
    latents = quantizer.latents.detach()
    inside = (latents > 1.5 * second) & (latents < first - second / 2)
    expected = incoming.unflatten(1, (3, 32)) * quantizer.step * inside
    torch.testing.assert_close(quantizer.latents.grad, expected)
    assert 0.5 < inside.float().mean() < 1


def test_frozen_weights_have_no_gradient_and_are_no_parameter() -> None:
    quantizer = DualBinaryQuantizer(
        weights(), search_scales(weights(), torch.ones(96), 32), SCHEME, train_weights=False
    )
    quantizer().sum().backward()
    assert [name for name, _ in quantizer.named_parameters()] == ["scales"]
    assert quantizer.trainable()["weights"] == []


def test_what_is_packed_is_what_was_trained() -> None:
    weight = weights()
    quantizer = DualBinaryQuantizer(weight, search_scales(weight, torch.ones(96), 32), SCHEME)
    with torch.no_grad():
        quantizer.scales += 0.2 * torch.randn_like(quantizer.scales)
        quantizer.latents += torch.randn_like(quantizer.latents)
        simulated = quantizer()
    dense = dual_binary.dequantize(SCHEME, quantizer.finalize(), 96)
    assert (dense - simulated).abs().max() <= 2**-10 * simulated.abs().max()
