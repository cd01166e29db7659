"""The operators as torch sees them: opcheck, gradients, tracing."""

import pytest
import torch

from tests.kernels.matrices import assert_near, exact, multiply, random_matrix
from ulbq import formats, kernels
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme
from ulbq.formats.bits import unpack_planes
from ulbq.kernels import build, tiles
from ulbq.kernels.layouts import int4
from ulbq.kernels.ops import linear
from ulbq.nn.quant_linear import QuantLinear

OUTS, COLUMNS = 70, 128
AFFINE = [AffineScheme(bits=bits, group_size=size) for bits, size in ((1, 64), (2, 32), (3, 128), (4, -1), (8, 16))]
AFFINE += [AffineScheme(bits=2, group_size=64, symmetric=True, mid_rise=mid_rise) for mid_rise in (False, True)]
TILES = pytest.param(
    "tiles", marks=pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
)


def operands(scheme: AnyScheme, layout: str) -> tuple[list[torch.Tensor], list[int], str, str]:
    """What the operator takes of a random matrix in a layout."""
    stored = random_matrix(scheme, OUTS, COLUMNS)
    tensors = stored if layout == "planes" else tiles.pack(scheme, stored, OUTS, COLUMNS)
    return linear.arguments(scheme, layout, tensors, COLUMNS)


def inputs(rows: int = 3, *, grad: bool = False) -> torch.Tensor:
    x = torch.randn(2, rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
    return x.requires_grad_(grad)


@pytest.mark.parametrize("layout", ["planes", TILES])
@pytest.mark.parametrize("scheme", [*AFFINE, DualBinaryScheme(group_size=32)], ids=lambda s: f"{s.format}-{s.label}")
def test_opcheck(scheme: AnyScheme, layout: str) -> None:
    if layout == "tiles" and (reason := tiles.unsupported_reason(scheme, COLUMNS)) is not None:
        pytest.skip(reason)
    torch.library.opcheck(linear.packed_linear, (inputs(grad=True), *operands(scheme, layout), OUTS))


def test_opcheck_int4() -> None:
    scheme = AffineScheme(bits=2, group_size=32)
    packed = int4.to_int4(scheme, random_matrix(scheme, 64, COLUMNS), COLUMNS)
    x = inputs().to(torch.bfloat16)
    torch.library.opcheck(int4.int4_linear, (x, packed["int4_codes"], packed["int4_scales"], 32))


@pytest.mark.parametrize("rows", [3, tiles.MANY_ROWS])
@pytest.mark.parametrize("layout", ["planes", TILES])
@pytest.mark.parametrize("scheme", [*AFFINE, DualBinaryScheme(group_size=32)], ids=lambda s: f"{s.format}-{s.label}")
def test_values_and_the_gradient_of_the_input(scheme: AnyScheme, layout: str, rows: int) -> None:
    if layout == "tiles" and (reason := tiles.unsupported_reason(scheme, COLUMNS)) is not None:
        pytest.skip(reason)
    stored = random_matrix(scheme, OUTS, COLUMNS)
    ready = (
        kernels.prepare(scheme, stored, OUTS, COLUMNS) if layout == "tiles" else kernels.Ready(kernels.STORED, stored)
    )
    x = inputs(rows, grad=True)
    y = multiply(scheme, ready, x, OUTS)
    wide = x.detach().double().requires_grad_()
    wanted = exact(scheme, stored, wide)
    assert_near(y, wanted, torch.float32)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(y, x, grad)
    assert_near(found, torch.autograd.grad(wanted, wide, grad.double())[0], torch.float32, slack=2)


@pytest.mark.parametrize("layout", ["planes", TILES])
@pytest.mark.parametrize("zeros", ["none", "output", "input"])
def test_the_gradient_through_a_mixture(zeros: str, layout: str) -> None:
    scheme = BinaryMosScheme(experts=4, zeros=zeros)
    stored = random_matrix(scheme, OUTS, COLUMNS)
    ready = (
        kernels.prepare(scheme, stored, OUTS, COLUMNS) if layout == "tiles" else kernels.Ready(kernels.STORED, stored)
    )
    x = inputs(grad=True)
    y = multiply(scheme, ready, x, OUTS)
    wanted = formats.multiply(scheme, stored, x, formats.matrix(scheme, stored, COLUMNS))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (found,), (should,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(wanted, x, grad)
    assert_near(found, should, torch.float32, slack=8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", int4.GROUPS)
def test_torchs_int4_product_has_the_same_weights(bits: int, size: int) -> None:
    """Scales and shifts are rounded to bfloat16, twice the rounding of a bfloat16 weight."""
    scheme = AffineScheme(bits=bits, group_size=size)
    stored = random_matrix(scheme, 64, 512)
    packed = int4.to_int4(scheme, stored, 512)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = torch.ops.ulbq.int4_linear(x, packed["int4_codes"], packed["int4_scales"], size)
    assert_near(y, exact(scheme, stored, x), torch.bfloat16, slack=2)
    rolled = torch.ops.ulbq.int4_linear(x, packed["int4_codes"], packed["int4_scales"].roll(1, 0), size)
    with pytest.raises(AssertionError):
        assert_near(rolled, exact(scheme, stored, x), torch.bfloat16, slack=2)


@pytest.mark.parametrize(
    "scheme", [AFFINE[1], DualBinaryScheme(group_size=32), BinaryMosScheme()], ids=lambda s: s.label
)
@pytest.mark.parametrize("ready", [False, True])
def test_a_layer_compiles_to_one_graph(scheme: AnyScheme, ready: bool) -> None:
    layer = QuantLinear(scheme, COLUMNS, OUTS, bias=True)
    layer.assign(random_matrix(scheme, OUTS, COLUMNS))
    eager = layer(inputs()) if ready else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    result = compiled(inputs())
    assert_near(result, layer(inputs()) if eager is None else eager, torch.float32, slack=8)


def test_packed_codes_are_what_unpack_planes_reads() -> None:
    stored = random_matrix(AFFINE[2], OUTS, COLUMNS)
    weight = formats.affine.weight(stored["codes"], torch.ones(OUTS, 1), torch.zeros(OUTS, 1), COLUMNS, torch.float32)
    assert torch.equal(weight, unpack_planes(stored["codes"], COLUMNS).float())
