"""The compiled products with tiles: values, gradients, layouts, and what happens without a compiler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.matrices import assert_near, exact, matrix, multiply, random_matrix, unpacked
from ulbq import formats, kernels
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme
from ulbq.kernels import build, tiles

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES: list[AnyScheme] = [
    *(AffineScheme(bits=bits, group_size=size) for bits in (1, 2, 3, 4) for size in (32, 64, 128, -1)),
    *(AffineScheme(bits=bits, group_size=64, symmetric=True) for bits in (1, 2, 3, 4)),
    *(AffineScheme(bits=bits, group_size=64, symmetric=True, mid_rise=True) for bits in (2, 4)),
    *(DualBinaryScheme(group_size=size) for size in (32, 64, 128, -1)),
    *(BinaryMosScheme(experts=experts, zeros=zeros) for experts in (1, 4) for zeros in ("none", "output", "input")),
]
# Outputs and columns: whole tiles, and neither whole tiles nor whole bytes.
SHAPES = {True: [(64, 256), (75, 384)], False: [(75, 203), (1, 9), (130, 1000)]}


def shapes(scheme: AnyScheme) -> list[tuple[int, int]]:
    return SHAPES[True] + (SHAPES[False] if scheme.group_size == -1 else [])


def ready(scheme: AnyScheme, stored: dict[str, torch.Tensor], outs: int, columns: int) -> kernels.Ready:
    made = kernels.prepare(scheme, stored, outs, columns)
    assert made.layout.name == "tiles"
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.label}")
def test_products(scheme: AnyScheme, dtype: torch.dtype) -> None:
    for outs, columns in shapes(scheme):
        stored = random_matrix(scheme, outs, columns)
        tiled = ready(scheme, stored, outs, columns)
        for rows in (1, 2, 3, 5, 7, 16, tiles.MANY_ROWS, 200):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
            # The scales of a mixture are rounded at several places.
            slack = 4 if isinstance(scheme, BinaryMosScheme) else 1
            assert_near(multiply(scheme, tiled, x, outs), exact(scheme, stored, x), dtype, slack)


@pytest.mark.parametrize("scheme", [SCHEMES[5], DualBinaryScheme(), BinaryMosScheme()], ids=lambda s: s.format)
def test_processors_without_pair_products_take_digits(scheme: AnyScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = random_matrix(scheme, 75, 384)
    x = torch.randn(7, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(build, "has_pairs", lambda: False)
    assert tiles.most_rows(torch.bfloat16) == tiles.MANY_ROWS - 1
    assert_near(multiply(scheme, ready(scheme, stored, 75, 384), x, 75), exact(scheme, stored, x), x.dtype, 4)


@pytest.mark.skipif(not build.has_pairs(), reason="no products of pairs")
def test_pairs_leave_codes_and_activations_as_they_are() -> None:
    """What several rows give differs from float64's result by the rounding of the result alone."""
    scheme = AffineScheme(bits=4, group_size=32)
    stored = random_matrix(scheme, 64, 256)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = exact(scheme, stored, x)
    found = multiply(scheme, ready(scheme, stored, 64, 256), x, 64)
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[:-6], ids=lambda s: f"{s.format}-{s.label}")
def test_slabs_are_the_dequantized_weight_to_the_bit(
    scheme: AnyScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SLAB", 1)  # one tile each
    for outs, columns in shapes(scheme):
        stored = random_matrix(scheme, outs, columns)
        tiled = ready(scheme, stored, outs, columns)
        dense = matrix(scheme, tiled, outs, columns, dtype)
        assert torch.equal(dense, formats.dequantize(scheme, stored, columns, dtype))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 140), st.integers(1, 300), st.integers(0, 9))
def test_the_stored_tensors_come_back(scheme: AnyScheme, outs: int, columns: int, seed: int) -> None:
    if scheme.group_size != -1:
        columns = -(-columns // scheme.group_size) * scheme.group_size
    stored = random_matrix(scheme, outs, columns, seed)
    back = unpacked(scheme, ready(scheme, stored, outs, columns), outs, columns)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tiles_take_the_bits_that_they_hold(bits: int) -> None:
    scheme = AffineScheme(bits=bits, group_size=64)
    stored = random_matrix(scheme, 128, 256)
    tiled = tiles.pack(scheme, stored, 128, 256)
    assert tiled["tiled_codes"].nbytes == 128 * 256 * bits // 8
    assert tiled["tiled_scales"].nbytes == stored["scales"].nbytes
    assert tiled["tiled_zeros"].nbytes == 128 * 4 // 2


def test_activations_of_any_size_and_outliers_among_them() -> None:
    """A block's largest value sets the step of its rounding; that of other blocks does not matter."""
    scheme, outs, columns = AffineScheme(bits=2, group_size=64), 64, 256
    stored = random_matrix(scheme, outs, columns)
    tiled = ready(scheme, stored, outs, columns)
    x = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1, 7] = 1000
    x[2] *= 1e-20
    x[3] *= 1e20
    x[4, :64] *= 1e-6
    for dtype in (torch.float32, torch.bfloat16):
        for row in x.to(dtype).unsqueeze(1):
            result = multiply(scheme, tiled, row, outs)
            assert_near(result, exact(scheme, stored, row), dtype, slack=4)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_spoils_its_row_and_no_other(bad: float, dtype: torch.dtype) -> None:
    scheme = AffineScheme(bits=2, group_size=64)
    stored = random_matrix(scheme, 64, 128)
    x = torch.randn(4, 128).to(dtype)
    x[2, 70] = bad
    y = multiply(scheme, ready(scheme, stored, 64, 128), x, 64)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_inputs_that_are_not_contiguous_or_have_no_rows() -> None:
    scheme = AffineScheme(bits=3, group_size=32)
    stored = random_matrix(scheme, 70, 64)
    tiled = ready(scheme, stored, 70, 64)
    x = torch.randn(64, 2, 3).permute(2, 1, 0)
    assert_near(multiply(scheme, tiled, x, 70), exact(scheme, stored, x), torch.float32)
    assert multiply(scheme, tiled, x[:0], 70).shape == (0, 2, 70)
    assert multiply(scheme, tiled, x[0, 0], 70).shape == (70,)


def test_other_floats_than_those_of_the_kernel() -> None:
    scheme = AffineScheme(bits=2, group_size=64)
    stored = random_matrix(scheme, 64, 128)
    x = torch.randn(3, 128, dtype=torch.float64)
    result = multiply(scheme, ready(scheme, stored, 64, 128), x, 64)
    assert (result - exact(scheme, stored, x)).norm() < 1e-6 * result.norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_does_not_change_a_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = AffineScheme(bits=2, group_size=64)
    stored = random_matrix(scheme, 700, 256)
    tiled = ready(scheme, stored, 700, 256)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    alone = multiply(scheme, tiled, x, 700)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(multiply(scheme, tiled, x, 700), alone)


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[8], DualBinaryScheme()], ids=lambda s: s.label)
@pytest.mark.parametrize("broken", ["digit", "zeros", "output", "tile"])
def test_a_broken_kernel_does_not_pass(scheme: AnyScheme, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests compare with is sharp enough to see a lost low digit, zero point, output or tile."""
    outs, columns = 75, 256
    stored = random_matrix(scheme, outs, columns)
    tiled = ready(scheme, stored, outs, columns)
    whole = tiles.multiply

    def spoiled(x: torch.Tensor, packed: dict[str, torch.Tensor], shape: tiles.Shape) -> torch.Tensor:
        if broken == "digit":  # activations of 8 bits
            step = x.abs().amax(1, keepdim=True) / 127
            return whole((x / step).round() * step, packed, shape)
        if broken == "zeros":
            packed = packed | {"tiled_scales": packed["tiled_scales"] * (1 + 2**-8)}
        y = whole(x, packed, shape)
        if broken == "output":
            y[:, 7] = y[:, 8]
        if broken == "tile":
            y[:, 64:] = 0
        return y

    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    assert_near(multiply(scheme, tiled, x, outs), exact(scheme, stored, x), torch.float32)
    monkeypatch.setattr(tiles, "multiply", spoiled)
    with pytest.raises(AssertionError):
        assert_near(multiply(scheme, tiled, x, outs), exact(scheme, stored, x), torch.float32)
