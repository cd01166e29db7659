"""Compiled decoding: what its products give for one token, in every format, with one thread and with two."""

from collections.abc import Iterator

import pytest
import torch

from tests.formats.columns import random_columns
from tests.kernels.matrices import assert_near, exact, random_matrix
from ulbq import kernels
from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    DualBinaryScheme,
    TrellisScheme,
    codebook,
)
from ulbq.kernels import build, decode

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

OUTS, COLUMNS = 208, 192
SCHEMES: list[AnyScheme] = [
    *(AffineScheme(bits=bits, group_size=size) for bits, size in ((1, 64), (2, 32), (3, 64), (4, -1))),
    *(AffineScheme(bits=bits, group_size=size) for bits, size in ((6, 32), (8, 64), (8, -1))),
    *(AffineScheme(bits=2, group_size=64, symmetric=True, mid_rise=mid_rise) for mid_rise in (False, True)),
    DualBinaryScheme(group_size=64),
    *(BinaryMosScheme(experts=experts, zeros=zeros) for experts, zeros in ((1, "none"), (4, "input"), (3, "output"))),
    *(TrellisScheme(bits=bits, state_bits=size) for bits, size in ((1, 12), (2, 16), (3, 12), (4, 12))),
]


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def product_of(
    scheme: AnyScheme, stored: dict[str, torch.Tensor], bias: torch.Tensor | None, *, whole: bool
) -> kernels.Product:
    layout, tensors = kernels.prepare(scheme, stored, OUTS, COLUMNS)
    found = layout.product(scheme, tensors, (OUTS, COLUMNS), bias, exact=whole)
    assert found is not None
    return found


def multiply(product: kernels.Product, x: torch.Tensor) -> torch.Tensor:
    """The product of a token whose root mean square is one, as the head of a model without blocks."""
    sizes = decode.CompiledSizes(len(x), 16, 1, 1, 16, epsilon=0.0, scaling=1.0)
    return decode.CompiledBlocks([], sizes, torch.ones(len(x)), (product, OUTS), torch.empty(0, 2, 1, 1, 16)).finish(
        x.clone()
    )


def token() -> torch.Tensor:
    x = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(3))
    return x / x.square().mean().sqrt()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.label}")
def test_products(scheme: AnyScheme, whole: bool) -> None:
    stored, x = random_matrix(scheme, OUTS, COLUMNS), token()
    bias = torch.randn(OUTS, generator=torch.Generator().manual_seed(1))
    wanted = exact(scheme, stored, x) + bias
    found = multiply(product_of(scheme, stored, bias, whole=whole), x)
    # Inputs of 16 bits lose far less than what is rounded to bfloat16.
    assert_near(found, wanted, torch.float32, slack=4 if whole else 1200)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "scheme",
    [*SCHEMES[:1], *SCHEMES[-1:], AffineScheme(bits=8, group_size=64)],
    ids=lambda s: f"{s.format}-{s.label}",
)
def test_torchs_default_dtype_says_nothing(scheme: AnyScheme, default: torch.dtype) -> None:
    """Engines set another while they load a model; kernels write float32."""
    stored, x = random_matrix(scheme, OUTS, 256), torch.randn(3, 256)
    ready = kernels.prepare(scheme, stored, OUTS, 256)
    wanted = ready.layout.multiply(scheme, ready.tensors, x, OUTS)
    torch.set_default_dtype(default)
    try:
        found = ready.layout.multiply(scheme, ready.tensors, x, OUTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[8], SCHEMES[-3]], ids=lambda s: f"{s.format}-{s.label}")
def test_products_by_two_threads(scheme: AnyScheme) -> None:
    stored, x = random_matrix(scheme, OUTS, COLUMNS), token()
    found = multiply(product_of(scheme, stored, None, whole=True), x)
    assert_near(found, exact(scheme, stored, x), torch.float32, slack=4)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("outliers", [0, 9])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("of", [(2, 3, 4), (2,), (3,), (4, 2)])
def test_products_with_codebooks(of: tuple[int, ...], whole: bool, outliers: int) -> None:
    widths = [of[index % len(of)] for index in range(COLUMNS)]
    scheme, columns = random_columns(OUTS, widths, outliers)
    stored, x = codebook.pack(scheme, columns), token()
    found = multiply(product_of(scheme, stored, None, whole=whole), x)
    assert_near(found, exact(scheme, stored, x), torch.float32, slack=4 if whole else 200)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_codebooks_make_no_number_of_what_is_none(value: float, whole: bool) -> None:
    scheme, columns = random_columns(OUTS, [2] * COLUMNS, 0)
    x = token()
    x[70] = value
    assert not multiply(product_of(scheme, codebook.pack(scheme, columns), None, whole=whole), x).isfinite().any()


@pytest.mark.parametrize("scheme", [SCHEMES[0], DualBinaryScheme(group_size=64)], ids=lambda s: f"{s.format}-{s.label}")
def test_one_wrong_sign_is_seen(scheme: AnyScheme) -> None:
    stored, x = random_matrix(scheme, OUTS, COLUMNS), token()
    wanted = exact(scheme, stored, x)
    stored["codes"][0, 3, 5] ^= 16
    with pytest.raises(AssertionError):
        assert_near(multiply(product_of(scheme, stored, None, whole=False), x), wanted, torch.float32, slack=1200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outs", [64, 205])
def test_dense_products(outs: int, dtype: torch.dtype) -> None:
    weight = torch.randn(outs, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    sizes = decode.CompiledSizes(COLUMNS, 16, 1, 1, 16, epsilon=0.0, scaling=1.0)
    head = (decode.dense(weight, None), outs)
    found = decode.CompiledBlocks([], sizes, torch.ones(COLUMNS), head, torch.empty(0, 2, 1, 1, 16)).finish(token())
    assert_near(found, weight.double() @ token().double(), torch.float32, slack=2)
