"""The affine quantizer against plain autograd, its start and what it packs."""

from typing import Any

import pytest
import torch

from ulbq.formats import affine
from ulbq.formats.affine import AffineScheme
from ulbq.quantizers.affine import AffineForm, AffineQuantizer, _FakeQuantize
from ulbq.solvers.rtn import round_to_nearest

SCHEMES = [
    AffineScheme(bits=bits, group_size=16, symmetric=symmetric)
    for bits in (1, 2, 3, 4, 8)
    for symmetric in (False, True)
]
SCHEMES += [AffineScheme(bits=bits, group_size=16, symmetric=True, mid_rise=True) for bits in (2, 3)]


def weights(seed: int = 0, rows: int = 6, columns: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Skewed groups: half of the symmetric grids want the mirrored orientation.
    return 0.05 * torch.randn(rows, columns, generator=generator) + 0.03 * torch.randn(rows, 1, generator=generator)


FORMS = {
    "ends": AffineForm(),
    "scales": AffineForm(grid="scales"),
    "fixed": AffineForm(grid="fixed"),
    "ends, weight": AffineForm(unit="weight"),
    "scales, weight": AffineForm(grid="scales", unit="weight"),
    "reach": AffineForm(grid="scales", reach=0.5),
}


def quantizer(scheme: AffineScheme, **options: Any) -> AffineQuantizer:
    start = round_to_nearest(weights(), scheme)
    return AffineQuantizer(weights(), start.scales, start.zeros, scheme, **options)


def plain(made: AffineQuantizer) -> torch.Tensor:
    """The same weight through torch's own autograd, straight-through by detach."""
    top = 2**made.scheme.bits - 1
    if made.scheme.symmetric:
        scales, zeros = made.scales, torch.full_like(made.scales, made.scheme.centre)
    elif made.form.grid != "ends":
        scales, zeros = made.scales, (made.zeros + (made.zeros.round() - made.zeros).detach()).clamp(0, top)
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


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_value_and_gradients_are_those_of_plain_autograd(scheme: AffineScheme, form: AffineForm) -> None:
    made = quantizer(scheme, form=form)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_back_is_that_of_masks_over_the_range(scheme: AffineScheme, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    top = 2**scheme.bits - 1
    latent = (3 * torch.randn(6, 3, 16, generator=generator)).requires_grad_()
    scales = (1 + 0.1 * torch.randn(6, 3, generator=generator)).requires_grad_()
    zeros = torch.randint(0, top + 1, (6, 3), generator=generator).float().requires_grad_()
    step = torch.randn(6, 3, 1, generator=generator)
    incoming = torch.randn(6, 48, generator=generator).to(dtype)
    found = _FakeQuantize.apply(latent, scales, zeros, step, top, dtype)
    assert found.dtype == dtype
    ours = torch.autograd.grad(found, (latent, scales, zeros), incoming)

    scale, zero = scales.detach().unsqueeze(-1), zeros.detach().unsqueeze(-1)
    position = latent.detach() / scale + zero
    inside = (position > -0.5) & (position < top + 0.5)
    codes = position.round().clamp(0, top)
    gradient = incoming.float().view(6, 3, 16) * step
    slope = torch.where(inside, codes - position, codes - zero)
    torch.testing.assert_close(found.float(), ((codes - zero) * scale * step).flatten(1).to(dtype).float())
    torch.testing.assert_close(ours[0], torch.where(inside, gradient, 0.0))
    torch.testing.assert_close(ours[1], (gradient * slope).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[2], -(gradient * ~inside).sum(-1) * scales.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_it_starts_where_rounding_ended_and_packs_the_same(scheme: AffineScheme, form: AffineForm) -> None:
    start = round_to_nearest(weights(), scheme)
    packed = quantizer(scheme, form=form).finalize()
    codes, scales, zeros = affine.unpack(scheme, packed, 48)
    assert torch.equal(codes, start.codes)
    assert torch.equal(scales, start.scales)
    assert scheme.symmetric or torch.equal(zeros, start.zeros)
    torch.testing.assert_close(affine.dequantize(scheme, packed, 48), quantizer(scheme, form=form)().detach())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_going_on_from_packed_tensors_gives_them_back(scheme: AffineScheme, form: AffineForm) -> None:
    made = quantizer(scheme, form=form)
    with torch.no_grad():
        step = made.finalize()["scales"].abs().float().unsqueeze(-1) / made.step.abs()
        made.latents.add_(0.7 * step * torch.randn(made.latents.shape, generator=torch.Generator().manual_seed(5)))
        for parameter in made.trainable()["scales"]:
            parameter.mul_(1.1)
    packed = made.finalize()
    again = AffineQuantizer.from_packed(weights(), packed, scheme, form=form)
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


@pytest.mark.parametrize("reach", [None, 0.5])
def test_a_weight_goes_no_further_than_its_reach(reach: float | None) -> None:
    scheme = AffineScheme(bits=2, group_size=16)
    start = round_to_nearest(weights(), scheme)
    form = AffineForm(grid="fixed", reach=reach)
    made = AffineQuantizer(weights(), start.scales, start.zeros, scheme, form=form)
    optimizer = torch.optim.SGD(made.trainable()["weights"], lr=0.2)
    for _ in range(10):
        (
            (made() * torch.where(weights() > 0, -1.0, 1.0)) / made.step.abs().expand_as(made.latents).flatten(1)
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    made()
    moved = (made.latents.detach() - weights().view(made.latents.shape) / made.step).abs()
    assert moved.amax() == pytest.approx(0.5) if reach else moved.amax() > 0.9
    codes, _, _ = affine.unpack(scheme, made.finalize(), 48)
    jumps = (codes.float() - start.codes.float()).abs()
    assert jumps.amax() == (1 if reach else 2)


def test_where_a_weight_starts_is_within_its_reach() -> None:
    """Codes that errors were made good with lie further than half a step from the weight."""
    scheme = AffineScheme(bits=2, group_size=16)
    start = round_to_nearest(weights(), scheme)
    other = start.codes.flip(1)
    packed = affine.pack(scheme, other, start.scales, start.zeros)
    made = AffineQuantizer.from_packed(weights(), packed, scheme, form=AffineForm(grid="scales", reach=0.5))
    made()
    assert torch.equal(made.finalize()["codes"], packed["codes"])


def test_a_rate_counts_in_the_unit_that_was_asked_for() -> None:
    scheme = AffineScheme(bits=2, group_size=16)
    start = round_to_nearest(weights(), scheme)
    for unit, sizes in (("step", start.scales.unsqueeze(-1)), ("weight", torch.ones(6, 3, 1))):
        made = AffineQuantizer(weights(), start.scales, start.zeros, scheme, form=AffineForm(unit=unit))  # type: ignore[arg-type]
        before = made.latents.detach() * made.step
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=0.0)
        made().square().sum().backward()
        optimizer.step()
        moved = (made.latents.detach() * made.step - before).abs() / sizes
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 1e-3), rtol=0.05, atol=0)
