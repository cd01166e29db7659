"""The affine quantizer against plain autograd, its start and what it packs."""

import pytest
import torch

from ulbq.formats import affine
from ulbq.formats.affine import AffineScheme
from ulbq.quantizers.affine import AffineQuantizer
from ulbq.solvers.rtn import round_to_nearest

SCHEMES = [
    AffineScheme(bits=bits, group_size=16, symmetric=symmetric)
    for bits in (1, 2, 3, 4, 8)
    for symmetric in (False, True)
]


def weights(seed: int = 0, rows: int = 6, columns: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Skewed groups: half of the symmetric grids want the mirrored orientation.
    return 0.05 * torch.randn(rows, columns, generator=generator) + 0.03 * torch.randn(rows, 1, generator=generator)


def quantizer(scheme: AffineScheme, **options: bool) -> AffineQuantizer:
    start = round_to_nearest(weights(), scheme)
    return AffineQuantizer(weights(), start.scales, start.zeros, scheme, **options)


def plain(made: AffineQuantizer) -> torch.Tensor:
    """The same weight through torch's own autograd, straight-through by detach."""
    top = 2**made.scheme.bits - 1
    if made.scheme.symmetric:
        scales, zeros = made.scales, torch.full_like(made.scales, made.scheme.centre)
    else:
        low, high = made.ends
        scales = (high - low) / top
        exact = -low / scales
        zeros = (exact + (exact.round() - exact).detach()).clamp(0, top)
    scale, zero = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    position = made.latents / scale
    rounded = position + ((position + zero).round() - zero - position).detach()
    codes = (rounded + zero).clamp(0, top)
    return ((codes - zero) * scale * made.step).flatten(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_value_and_gradients_are_those_of_plain_autograd(scheme: AffineScheme) -> None:
    made = quantizer(scheme)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    incoming = torch.randn(6, 48, generator=torch.Generator().manual_seed(4))
    found, wanted = made(), plain(made)
    torch.testing.assert_close(found, wanted)
    parameters = list(made.parameters())
    ours = torch.autograd.grad(found, parameters, incoming)
    theirs = torch.autograd.grad(wanted, parameters, incoming)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_it_starts_where_rounding_ended_and_packs_the_same(scheme: AffineScheme) -> None:
    start = round_to_nearest(weights(), scheme)
    packed = quantizer(scheme).finalize()
    codes, scales, zeros = affine.unpack(scheme, packed, 48)
    assert torch.equal(codes, start.codes)
    assert torch.equal(scales, start.scales)
    assert scheme.symmetric or torch.equal(zeros, start.zeros)
    torch.testing.assert_close(affine.dequantize(scheme, packed, 48), quantizer(scheme)().detach())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_going_on_from_packed_tensors_gives_them_back(scheme: AffineScheme) -> None:
    made = quantizer(scheme)
    with torch.no_grad():
        made.latents.add_(0.7 * torch.randn(made.latents.shape, generator=torch.Generator().manual_seed(5)))
        for parameter in made.trainable()["scales"]:
            parameter.mul_(1.1)
    packed = made.finalize()
    again = AffineQuantizer.from_packed(weights(), packed, scheme)
    assert all(torch.equal(value, packed[name]) for name, value in again.finalize().items())
    # Where the stored code is the weight's own, the latent is the weight itself.
    same = (again.latents * again.step).flatten(1) == weights()
    assert same.float().mean() > 0.2


def test_both_orientations_of_the_two_bit_grid_are_used() -> None:
    scales = round_to_nearest(weights(), AffineScheme(bits=2, group_size=16, symmetric=True)).scales
    assert (scales > 0).any()
    assert (scales < 0).any()


def test_only_the_clip_ends_train_where_weights_are_frozen() -> None:
    scheme = AffineScheme(bits=2, group_size=16)
    start = round_to_nearest(weights(), scheme, search=False)
    made = AffineQuantizer(weights(), start.scales, start.zeros, scheme, train_weights=False)
    assert made.trainable()["weights"] == []
    before = made.latents.clone()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.05, weight_decay=0.0)
    errors = []
    for _ in range(40):
        loss = (made() - weights()).square().sum()
        errors.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(made.latents, before)
    assert min(errors) < 0.9 * errors[0]
