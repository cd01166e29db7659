"""Scales in two levels: products and gradients, compiled and of dense weights, and one token in compiled decoding."""

import pytest
import torch

from tests.formats.test_k_quant import random_matrix
from tests.kernels.matrices import assert_near
from ulbq import formats, kernels
from ulbq.formats import KQuantScheme, k_quant
from ulbq.kernels import Case, build, choose, decode, super_blocks, tiles

labels = pytest.mark.parametrize("bits", [2, 3, 4])
compiled = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))


@labels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [pytest.param("super_blocks", marks=compiled), "dense"])
@pytest.mark.parametrize("slab", [1, tiles.SLAB])
def test_products_and_gradients_are_those_of_the_dense_weight(
    bits: int, dtype: torch.dtype, layout: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SLAB", slab)
    if layout == "dense":
        monkeypatch.setattr(build, "unavailable_reason", lambda: "none")
    scheme = KQuantScheme.model_validate({"bits": bits})
    stored = k_quant.pack(scheme, random_matrix(scheme))
    ready = kernels.prepare(scheme, stored, 3, 512)
    assert ready.layout.name == layout
    weight = formats.dequantize(scheme, stored, 512, torch.float64)
    for rows in (1, 5, super_blocks.FEW_ROWS, super_blocks.FEW_ROWS + 1):
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        with torch.no_grad():
            assert_near(ready.layout.multiply(scheme, ready.tensors, x, 3), x.double() @ weight.T, dtype, slack=4)
        found = ready.layout.multiply(scheme, ready.tensors, x, 3)
        incoming = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
        found.backward(incoming)
        assert x.grad is not None
        assert_near(x.grad, incoming.double() @ weight, dtype, slack=2)
    assert all(map(torch.equal, ready.layout.unpack(scheme, ready.tensors, 3, 512).values(), stored.values()))


@compiled
def test_torchs_default_dtype_says_nothing() -> None:
    scheme = KQuantScheme(bits=4)
    stored, x = k_quant.pack(scheme, random_matrix(scheme)), torch.randn(64, 512)
    wanted = super_blocks.multiply(scheme, stored, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = super_blocks.multiply(scheme, stored, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@compiled
@labels
def test_a_token(bits: int) -> None:
    scheme = KQuantScheme.model_validate({"bits": bits})
    stored, bias = k_quant.pack(scheme, random_matrix(scheme)), torch.randn(3)
    layout, tensors = kernels.prepare(scheme, stored, 3, 512)
    product = layout.product(scheme, tensors, (3, 512), bias, exact=True)
    assert product is not None
    x = torch.randn(512, generator=torch.Generator().manual_seed(3))
    x = x / x.square().mean().sqrt()
    sizes = decode.CompiledSizes(512, 16, 1, 1, 16, epsilon=0.0, scaling=1.0)
    blocks = decode.CompiledBlocks([], sizes, torch.ones(512), (product, 3), torch.empty(0, 2, 1, 1, 16))
    wanted = formats.dequantize(scheme, stored, 512, torch.float64) @ x.double() + bias
    assert_near(blocks.finish(x.clone()), wanted, torch.float32, slack=4)


@compiled
def test_every_kernel_tells_why_it_is_not_taken() -> None:
    few = Case(KQuantScheme(), 64, 256, "cpu", torch.bfloat16, 1)
    assert choose(few).layout.name == "super_blocks"
    many = choose(few._replace(rows=65))
    assert many.layout.name == "dense"
    assert "affine" in many.passed_over["tiles"]
    assert many.passed_over["super_blocks"].startswith("65 rows")
