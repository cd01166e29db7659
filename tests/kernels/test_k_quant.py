import pytest
import torch

from tests.formats.test_k_quant import random_matrix
from tests.kernels.matrices import assert_near
from ulbq import formats, kernels
from ulbq.formats import KQuantScheme, k_quant
from ulbq.kernels import STORED, Case, choose, tiles

labels = pytest.mark.parametrize("bits", [2, 3, 4])


@labels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slab", [1, tiles.SLAB])
def test_products_and_gradients_are_those_of_the_dense_weight(
    bits: int, dtype: torch.dtype, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SLAB", slab)
    scheme = KQuantScheme.model_validate({"bits": bits})
    stored = k_quant.pack(scheme, random_matrix(scheme))
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    ready = kernels.prepare(scheme, stored, 3, 512)
    assert ready.layout is STORED
    found = ready.layout.multiply(scheme, ready.tensors, x, 3)
    weight = formats.dequantize(scheme, stored, 512, torch.float64)
    assert_near(found, x.detach().double() @ weight.T, dtype)
    incoming = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    found.backward(incoming)
    assert x.grad is not None
    assert_near(x.grad, incoming.double() @ weight, dtype)


def test_every_kernel_tells_why_it_is_not_taken() -> None:
    choice = choose(Case(KQuantScheme(), 64, 256, "cpu", torch.bfloat16, 1))
    assert choice.layout is STORED
    assert "affine" in choice.passed_over["tiles"]
