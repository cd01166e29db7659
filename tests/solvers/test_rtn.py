from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulbq.errors import NumericsError
from ulbq.formats import affine
from ulbq.formats.affine import AffineScheme
from ulbq.solvers.rtn import round_to_nearest


def gaussian(seed: int = 0, rows: int = 16, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def decoded(weight: torch.Tensor, scheme: AffineScheme, **options: Any) -> torch.Tensor:
    codes, scales, zeros = round_to_nearest(weight, scheme, **options)
    packed = affine.pack(scheme, codes, scales, None if scheme.symmetric else zeros)
    return affine.dequantize(scheme, packed, weight.shape[1])


@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    group_size=st.sampled_from([16, 32, 128, -1]),
    seed=st.integers(0, 1000),
    offset=st.floats(-0.3, 0.3),
)
@settings(max_examples=40, deadline=None)
def test_plain_rounding_is_off_by_at_most_half_a_step(bits: Any, group_size: int, seed: int, offset: float) -> None:
    weight = gaussian(seed) + offset
    scheme = AffineScheme(bits=bits, group_size=group_size)
    _, scales, _ = round_to_nearest(weight, scheme, search=False)
    error = (decoded(weight, scheme, search=False) - weight).abs().unflatten(1, (scales.shape[1], -1))
    # The zero point is an integer, so one end of the range may be cut by half a step more; float16 adds its share.
    assert (error <= 1.01 * scales.unsqueeze(-1) + 1e-4).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_on_a_grid_come_back_exactly(bits: Any, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (8, 64), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    scheme = AffineScheme(bits=bits, group_size=64, symmetric=symmetric)
    weight = (codes - 2 ** (bits - 1)) * 0.125
    torch.testing.assert_close(decoded(weight, scheme, search=False), weight)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_lowers_the_error_and_never_raises_a_groups(bits: Any, symmetric: bool) -> None:
    weight = gaussian(4)
    scheme = AffineScheme(bits=bits, group_size=32, symmetric=symmetric)

    def errors(search: bool) -> torch.Tensor:
        off = (decoded(weight, scheme, search=search) - weight).square()
        return off.unflatten(1, (-1, 32)).sum(-1)

    assert (errors(True) <= errors(False) + 1e-7).all()
    assert errors(True).sum() < (0.9 if bits <= 2 else 1.0) * errors(False).sum()


def test_the_search_weighs_columns_by_importance() -> None:
    weight, importance = gaussian(5), torch.ones(128)
    importance[::8] = 50.0
    scheme = AffineScheme(bits=2, group_size=64)

    def weighted(dense: torch.Tensor) -> torch.Tensor:
        return ((dense - weight).square() * importance).sum()

    assert weighted(decoded(weight, scheme, importance=importance)) < weighted(decoded(weight, scheme))


def test_the_symmetric_grid_turns_towards_the_longer_tail() -> None:
    weight = torch.tensor([[-0.1, 0.0, 0.1, 0.2] * 16])
    scheme = AffineScheme(bits=2, group_size=64, symmetric=True)
    _, scales, _ = round_to_nearest(weight, scheme)
    assert (scales < 0).all()
    torch.testing.assert_close(decoded(weight, scheme), weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_grid_without_a_zero_has_the_nearest_odd_half_steps(bits: Any) -> None:
    weight = gaussian()
    scheme = AffineScheme(bits=bits, group_size=64, symmetric=True, mid_rise=True)
    codes, scales, zeros = round_to_nearest(weight, scheme)
    odd = torch.arange(1 - 2**bits, 2**bits, 2) / 2
    levels = scales.unsqueeze(-1) * odd
    grouped = weight.unflatten(1, (-1, 64))
    nearest = (grouped.unsqueeze(-1) - levels.unsqueeze(2)).abs().argmin(-1)
    assert torch.equal(codes.long(), nearest.flatten(1))
    assert (zeros == (2**bits - 1) / 2).all()
    # No other scale of a fine grid of them does better than the 32 that were tried allow for.
    error = (levels.gather(2, nearest) - grouped).square().sum(-1)
    for share in torch.linspace(0.1, 1.0, 91):
        step = share * grouped.abs().amax(-1, keepdim=True) / odd[-1]
        rounded = ((grouped / step - 0.5).round() + 0.5).clamp(odd[0], odd[-1]) * step
        assert (error <= 1.05 * (rounded - grouped).square().sum(-1)).all()


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_group_keeps_its_value(value: float, symmetric: bool) -> None:
    scheme = AffineScheme(bits=4, group_size=64, symmetric=symmetric)
    dense = decoded(torch.full((2, 64), value), scheme)
    torch.testing.assert_close(dense, torch.full((2, 64), value), atol=1e-3, rtol=0)


@pytest.mark.parametrize("search", [False, True])
def test_weights_beyond_the_range_of_the_scales_are_refused(search: bool) -> None:
    weight = gaussian()
    weight[3] *= 1e37
    with pytest.raises(NumericsError):
        round_to_nearest(weight, AffineScheme(bits=4, group_size=64), search=search)
