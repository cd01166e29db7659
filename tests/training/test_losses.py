import pytest
import torch

from ulbq.config.training import TokenWeighting
from ulbq.training.losses import bounded, output_loss, spurious_sinks, token_weights


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighting", TokenWeighting)
def test_outputs_of_zero_cost_one_and_equal_outputs_nothing(weighting: TokenWeighting) -> None:
    targets = hidden()
    weights = token_weights(targets, weighting)
    assert output_loss(torch.zeros_like(targets), targets, weights, weighting).item() == pytest.approx(1.0, abs=1e-6)
    assert output_loss(targets, targets, weights, weighting).item() == 0


@pytest.mark.parametrize("weighting", TokenWeighting)
def test_the_loss_does_not_depend_on_the_activations_scale(weighting: TokenWeighting) -> None:
    targets, outputs = hidden(), hidden() + 0.1 * hidden(1)
    small = output_loss(outputs, targets, token_weights(targets, weighting), weighting).item()
    large = output_loss(1e3 * outputs, 1e3 * targets, token_weights(1e3 * targets, weighting), weighting).item()
    assert large == pytest.approx(small, rel=1e-4)


def test_energy_weighting_sees_the_text_beside_a_sink_and_uniform_weighting_does_not() -> None:
    targets = hidden()
    targets[:, 0] *= 1000  # a sink
    outputs = targets.clone()
    outputs[:, 1:] = 0  # all of the text is lost
    lost = {w: output_loss(outputs, targets, token_weights(targets, w), w).item() for w in TokenWeighting}
    assert lost[TokenWeighting.ENERGY] == pytest.approx(5 / 6, abs=1e-4)
    assert lost[TokenWeighting.UNIFORM] < 1e-4


def test_a_token_of_zeros_does_not_make_the_loss_infinite() -> None:
    targets = hidden()
    targets[0, 3] = 0
    weights = token_weights(targets, TokenWeighting.ENERGY)
    assert torch.isfinite(output_loss(targets, targets, weights, TokenWeighting.ENERGY))
    assert torch.isfinite(weights).all()


def test_small_errors_count_as_they_are_and_large_ones_by_their_root() -> None:
    errors = torch.tensor([0.0, 0.25, 1.0, 4.0, 1300.0], requires_grad=True)
    counted = bounded(errors)
    assert counted.tolist() == pytest.approx([0.0, 0.25, 1.0, 3.0, 2 * 1300**0.5 - 1])
    counted.sum().backward()
    assert errors.grad is not None
    assert errors.grad.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.5, 1300**-0.5])


def test_one_spurious_sink_does_not_outweigh_the_text() -> None:
    targets = torch.randn(1, 2048, 16, generator=torch.Generator().manual_seed(0))
    weights = token_weights(targets, TokenWeighting.ENERGY)
    outputs = targets * 0.7  # an error of 0.09 everywhere
    outputs[0, 1] = 36 * targets[0, 1]
    assert output_loss(outputs, targets, weights, TokenWeighting.ENERGY).item() == pytest.approx(0.09, abs=0.04)
    assert spurious_sinks(outputs, targets) == 1
    assert spurious_sinks(targets, targets) == 0


def test_a_sink_pulls_no_harder_than_a_token_that_is_lost() -> None:
    targets = torch.ones(1, 2, 16)
    outputs = torch.stack([torch.zeros(16), torch.full((16,), 50.0)]).unsqueeze(0).requires_grad_()
    weights = token_weights(targets, TokenWeighting.ENERGY)
    output_loss(outputs, targets, weights, TokenWeighting.ENERGY).backward()
    assert outputs.grad is not None
    lost, sink = outputs.grad[0].norm(dim=-1).tolist()
    assert sink == pytest.approx(lost, rel=1e-5)
