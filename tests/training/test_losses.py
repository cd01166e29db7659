import pytest
import torch

from ulbq.training.losses import TokenWeighting, output_loss, token_weights


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighting", TokenWeighting)
def test_outputs_of_zero_cost_one_and_equal_outputs_nothing(weighting: TokenWeighting) -> None:
    targets = hidden()
    weights = token_weights(targets, weighting)
    assert output_loss(torch.zeros_like(targets), targets, weights).item() == pytest.approx(1.0, abs=1e-6)
    assert output_loss(targets, targets, weights).item() == 0


@pytest.mark.parametrize("weighting", TokenWeighting)
def test_the_loss_does_not_depend_on_the_activations_scale(weighting: TokenWeighting) -> None:
    targets, outputs = hidden(), hidden() + 0.1 * hidden(1)
    small = output_loss(outputs, targets, token_weights(targets, weighting)).item()
    large = output_loss(1e3 * outputs, 1e3 * targets, token_weights(1e3 * targets, weighting)).item()
    assert large == pytest.approx(small, rel=1e-4)


def test_energy_weighting_sees_the_text_beside_a_sink_and_uniform_weighting_does_not() -> None:
    targets = hidden()
    targets[:, 0] *= 1000  # a sink
    outputs = targets.clone()
    outputs[:, 1:] = 0  # all of the text is lost
    lost = {w: output_loss(outputs, targets, token_weights(targets, w)).item() for w in TokenWeighting}
    assert lost[TokenWeighting.ENERGY] == pytest.approx(5 / 6, abs=1e-4)
    assert lost[TokenWeighting.UNIFORM] < 1e-4


def test_a_token_of_zeros_does_not_make_the_loss_infinite() -> None:
    targets = hidden()
    targets[0, 3] = 0
    weights = token_weights(targets, TokenWeighting.ENERGY)
    assert torch.isfinite(output_loss(targets, targets, weights))
    assert torch.isfinite(weights).all()
