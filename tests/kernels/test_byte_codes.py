"""Codes of a byte each: values, gradients, and what comes back."""

import pytest
import torch

from tests.kernels.matrices import assert_near, exact, matrix, multiply, random_matrix, unpacked
from ulbq import formats, kernels
from ulbq.formats import AffineScheme
from ulbq.kernels import build, byte_codes

SCHEMES = [
    AffineScheme(bits=bits, group_size=size, symmetric=symmetric)
    for bits in (6, 8)
    for size in (16, 64, -1)
    for symmetric in (False, True)
]
SHAPES = [(75, 384), (5, 200)]
BY_LABEL = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


def ready(scheme: AffineScheme, outs: int, columns: int) -> tuple[dict[str, torch.Tensor], kernels.Ready]:
    stored = random_matrix(scheme, outs, columns)
    made = kernels.prepare(scheme, stored, outs, columns)
    assert made.layout.name == "bytes"
    return stored, made


def shapes(scheme: AffineScheme) -> list[tuple[int, int]]:
    return SHAPES[:1] if scheme.group_size > 0 else SHAPES


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@BY_LABEL
def test_products(scheme: AffineScheme, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and build.unavailable_reason() is not None:
        pytest.skip(str(build.unavailable_reason()))
    if not compiled:
        monkeypatch.setattr(build, "unavailable_reason", lambda: "none")
    for outs, columns in shapes(scheme):
        stored, made = ready(scheme, outs, columns)
        for rows in (1, 3, 4, byte_codes.FEW_ROWS, byte_codes.FEW_ROWS + 1):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
            # Slabs of dense weights are rounded to the dtype as well.
            assert_near(multiply(scheme, made, x, outs), exact(scheme, stored, x), dtype, slack=2)


@BY_LABEL
def test_what_was_packed_comes_back_to_the_bit(scheme: AffineScheme) -> None:
    for outs, columns in shapes(scheme):
        stored, made = ready(scheme, outs, columns)
        assert unpacked(scheme, made, outs, columns).keys() == stored.keys()
        assert all(torch.equal(t, stored[name]) for name, t in unpacked(scheme, made, outs, columns).items())
        dense = matrix(scheme, made, outs, columns, torch.bfloat16)
        assert torch.equal(dense, formats.dequantize(scheme, stored, columns, torch.bfloat16))


def test_inputs_have_a_gradient() -> None:
    scheme = SCHEMES[1]
    stored, made = ready(scheme, 75, 384)
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(0), requires_grad=True)
    multiply(scheme, made, x, 75).sum().backward()
    wanted = formats.dequantize(scheme, stored, 384).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("device", ["cpu", "stored", "words"])
def test_rows_are_those_of_the_whole(bits: int, device: str) -> None:
    """In every layout that a table of tokens may lie in."""
    scheme = AffineScheme.model_validate({"bits": bits, "group_size": 32, "symmetric": True})
    stored = random_matrix(scheme, 300, 128)
    by_name = {layout.name: layout for layout in kernels.LAYOUTS}
    layout, tensors = kernels.prepare(scheme, stored, 300, 128)
    if device == "stored":
        layout, tensors = kernels.STORED, stored
    elif device == "words":
        if bits > 4:
            pytest.skip("words hold up to 4 bits")
        layout = by_name["triton"]
        tensors = layout.pack(scheme, stored, 300, 128)
    chosen = torch.tensor([299, 0, 64, 63, 64, 130])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = layout.rows(scheme, tensors, chosen, 128, dtype)
        assert torch.equal(rows, formats.dequantize(scheme, stored, 128, dtype)[chosen])
    with pytest.raises(IndexError):
        layout.rows(scheme, tensors, torch.tensor([384]), 128, torch.float32)
