import pytest
import torch

from ulbq import formats
from ulbq.formats import KQuantScheme, k_quant
from ulbq.formats.k_quant import KQuant
from ulbq.kernels import build
from ulbq.quantizers.k_quant import FixedKQuant, KQuantizer
from ulbq.solvers.k_quant import find_grids

SCHEMES = [KQuantScheme.model_validate({"bits": bits}) for bits in (2, 3, 4)]
labels = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


def weight() -> torch.Tensor:
    return torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.1


def start(scheme: KQuantScheme) -> KQuant:
    found = find_grids(weight(), scheme)
    assert isinstance(found, KQuant)
    return found


@labels
def test_training_begins_with_what_was_found(scheme: KQuantScheme) -> None:
    found = start(scheme)
    quantizer = KQuantizer(weight(), found, scheme)
    torch.testing.assert_close(quantizer(), found.values(), rtol=1e-5, atol=1e-6)
    packed = quantizer.finalize()
    assert torch.equal(formats.dequantize(scheme, packed, 512), found.values())


@labels
def test_weights_learn_outputs_on_grids_that_stay(scheme: KQuantScheme) -> None:
    dense, found = weight(), start(scheme)
    inputs = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    inputs = inputs + inputs[:, :1]  # what all columns share is made good together

    def loss(values: torch.Tensor) -> torch.Tensor:
        return (inputs @ (values - dense).T).square().mean()

    quantizer = KQuantizer(dense, found, scheme)
    assert quantizer.trainable() == {"weights": [quantizer.latents], "scales": []}
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss(quantizer()).backward()
        optimizer.step()
    packed = quantizer.finalize()
    before = k_quant.pack(scheme, found)
    assert {name for name in packed if not torch.equal(packed[name], before[name])} == {"codes"}
    trained = formats.dequantize(scheme, packed, 512)
    torch.testing.assert_close(trained, quantizer().detach(), rtol=1e-5, atol=1e-6)
    assert loss(trained) < 0.7 * loss(found.values())


@labels
def test_packed_matrices_go_back_into_training(scheme: KQuantScheme) -> None:
    packed = k_quant.pack(scheme, start(scheme))
    other = weight() + 0.05 * torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
    again = KQuantizer.from_packed(other, packed, scheme).finalize()
    assert all(torch.equal(tensor, packed[name]) for name, tensor in again.items())


@labels
@pytest.mark.parametrize("compiled", [True, False])
def test_factors_train_under_codes_that_stay(
    scheme: KQuantScheme, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(build, "unavailable_reason", lambda: "not here")
    packed = k_quant.pack(scheme, start(scheme))
    quantizer = FixedKQuant.from_packed(weight(), packed, scheme, train_weights=False)
    torch.testing.assert_close(quantizer(), formats.dequantize(scheme, packed, 512), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in quantizer.finalize().items())
    with torch.no_grad():
        for parameter in quantizer.trainable()["scales"]:
            parameter.mul_(torch.linspace(0.5, 2, parameter.numel()).view(parameter.shape))
    after = quantizer.finalize()
    changed = {name for name in after if not torch.equal(after[name], packed[name])}
    assert changed == {"scales"} | (set() if scheme.symmetric else {"minima"})
    torch.testing.assert_close(quantizer(), formats.dequantize(scheme, after, 512), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=lambda scheme: scheme.label)
def test_gradients_of_factors_are_what_they_multiply(scheme: KQuantScheme) -> None:
    packed = k_quant.pack(scheme, start(scheme))
    quantizer = FixedKQuant.from_packed(weight(), packed, scheme, train_weights=False)
    incoming = torch.randn(6, 512, generator=torch.Generator().manual_seed(4))
    (quantizer() * incoming).sum().backward()
    matrix = k_quant.unpack(scheme, packed, 512)
    levels = (matrix.codes.float() - scheme.centre).unflatten(
        1, (matrix.scales.shape[1], -1)
    ) * matrix.scales.unsqueeze(-1)
    expected = (levels.flatten(1) * incoming).unflatten(1, (2, 256)).sum(2)
    torch.testing.assert_close(quantizer.factors.grad, expected, rtol=1e-3, atol=1e-4)
    if quantizer.minima is not None:
        below = (matrix.offsets.repeat_interleave(scheme.group_size, 1) * incoming).unflatten(1, (2, 256)).sum(2)
        torch.testing.assert_close(quantizer.minima.grad, -below, rtol=1e-3, atol=1e-4)


@labels
def test_factors_that_shrink_to_nothing_stay_above_it(scheme: KQuantScheme) -> None:
    quantizer = FixedKQuant.from_packed(weight(), k_quant.pack(scheme, start(scheme)), scheme, train_weights=False)
    with torch.no_grad():
        quantizer.factors.mul_(1e-6)
    after = quantizer.finalize()
    assert after["scales"].ne(0).all()
    assert FixedKQuant.from_packed(weight(), after, scheme, train_weights=False)().isfinite().all()


def test_codes_that_would_train_are_refused() -> None:
    packed = k_quant.pack(SCHEMES[0], start(SCHEMES[0]))
    with pytest.raises(ValueError, match="fixed"):
        FixedKQuant.from_packed(weight(), packed, SCHEMES[0])
