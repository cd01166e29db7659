"""Lookups in column codebooks: values, gradients, opcheck, and what they do not take."""

import pytest
import torch

from tests.formats.columns import random_columns
from tests.kernels.matrices import assert_near, exact, multiply
from ulbq import kernels
from ulbq.formats import CodebookScheme, codebook
from ulbq.kernels import build, columns
from ulbq.kernels.ops import linear
from ulbq.nn.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

MIXED = [2] * 31 + [4] * 5 + [3] * 7 + [2] * 20
CASES = [([2] * 64, 0), ([2] * 33, 5), ([3] * 40, 0), ([4] * 17, 9), (MIXED, 0), (MIXED, 40)]
OUTS = [8, 256, 328, 576]


def matrix(outs: int, widths: list[int], outliers: int) -> tuple[CodebookScheme, dict[str, torch.Tensor]]:
    scheme, made = random_columns(outs, widths, outliers)
    return scheme, codebook.pack(scheme, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("widths", "outliers"), CASES)
def test_products(widths: list[int], outliers: int, dtype: torch.dtype) -> None:
    for outs in OUTS:
        scheme, stored = matrix(outs, widths, outliers)
        ready = kernels.prepare(scheme, stored, outs, len(widths))
        assert ready.layout.name == "columns"
        for rows in (1, 2, 5, columns.FEW_ROWS, columns.FEW_ROWS + 1, 200):
            x = torch.randn(rows, len(widths), generator=torch.Generator().manual_seed(rows)).to(dtype)
            assert_near(multiply(scheme, ready, x, outs), exact(scheme, stored, x), dtype)


@pytest.mark.parametrize(("rows", "dtype"), [(2, torch.float32), (7, torch.bfloat16)])
def test_one_wrong_level_or_outlier_is_seen(rows: int, dtype: torch.dtype) -> None:
    scheme, stored = matrix(256, MIXED, 40)
    ready = kernels.prepare(scheme, stored, 256, len(MIXED))
    x = torch.randn(rows, len(MIXED), generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in ("codebooks", "outlier_deltas"):
        spoiled = ready.tensors[name].clone()
        spoiled[3] += 0.25
        result = multiply(scheme, ready._replace(tensors=ready.tensors | {name: spoiled}), x, 256)
        with pytest.raises(AssertionError):
            assert_near(result, exact(scheme, stored, x), dtype)


def test_outputs_that_fill_no_byte_take_the_dense_way() -> None:
    scheme, stored = matrix(13, MIXED, 4)
    ready = kernels.prepare(scheme, stored, 13, len(MIXED))
    assert ready.layout.name == "dense"
    x = torch.randn(2, len(MIXED))
    assert_near(multiply(scheme, ready, x, 13), exact(scheme, stored, x), torch.float32)


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize(("outs", "outliers"), [(64, 0), (64, 30), (13, 4)])
def test_opcheck_and_the_gradient(outs: int, outliers: int, derived: bool) -> None:
    scheme, stored = matrix(outs, MIXED, outliers)
    if derived and outs % 8:
        pytest.skip("not looked up")
    beside = columns.derive(scheme, stored, outs, len(MIXED)) if derived else {}
    x = torch.randn(2, 3, len(MIXED), generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (x, *linear.arguments(scheme, "planes", stored | beside, len(MIXED)), outs)
    torch.library.opcheck(linear.packed_linear, arguments)
    y = linear.packed_linear(*arguments)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(scheme, stored, wide), wide, grad.double())
    assert_near(found, wanted, torch.float32)


def test_a_layer_keeps_its_stored_tensors_and_compiles_to_one_graph() -> None:
    scheme, stored = matrix(64, MIXED, 30)
    layer = QuantLinear(scheme, len(MIXED), 64)
    layer.assign(stored)
    x = torch.randn(3, len(MIXED))
    eager = layer(x)
    assert layer.state_dict().keys() == stored.keys()
    assert all(torch.equal(layer.tensors()[name], tensor) for name, tensor in stored.items())
    assert_near(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), eager, torch.float32)
