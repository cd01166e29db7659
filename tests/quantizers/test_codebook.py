"""The trainable codebook against plain autograd, its start and what it packs."""

import pytest
import torch

from ulbq.formats import codebook
from ulbq.formats.codebook import CodebookScheme, Columns, Outliers
from ulbq.formats.levels import assign
from ulbq.quantizers.codebook import CodebookQuantizer
from ulbq.solvers.kmeans import kmeans_1d

ROWS, WIDTHS = 19, torch.tensor([2, 4, 2, 3, 2, 3, 4, 2])


def weight() -> torch.Tensor:
    return torch.randn(ROWS, len(WIDTHS), generator=torch.Generator().manual_seed(0))


def columns(widths: torch.Tensor, outliers: int) -> Columns:
    values, books = weight().T.contiguous(), torch.zeros(len(widths), 2 ** int(widths.max()))
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    for j, width in enumerate(widths.tolist()):
        own = kmeans_1d(values[j : j + 1], 2**width).centroids.half().float()
        books[j, : 2**width], codes[j] = own[0], assign(values[j : j + 1], own)[0]
    mask = torch.zeros(ROWS, len(widths), dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(2))[:outliers]] = True
    return Columns(codes, widths, books, Outliers.where(mask, 3 * weight()) if outliers else None)


def made(mixed: bool, outliers: int, *, train_weights: bool) -> tuple[CodebookQuantizer, dict[str, torch.Tensor]]:
    widths = WIDTHS if mixed else torch.full_like(WIDTHS, 2)
    scheme = CodebookScheme.of(2, widths, outliers)
    packed = codebook.pack(scheme, columns(widths, outliers))
    return CodebookQuantizer.from_packed(weight(), packed, scheme, train_weights=train_weights), packed


CASES = [(False, 0), (False, 5), (True, 0), (True, 7)]


@pytest.mark.parametrize("train_weights", [False, True])
@pytest.mark.parametrize(("mixed", "outliers"), CASES)
def test_it_starts_where_the_pass_ended_and_packs_the_same(mixed: bool, outliers: int, train_weights: bool) -> None:
    quantizer, packed = made(mixed, outliers, train_weights=train_weights)
    dense = codebook.dequantize(quantizer.scheme, packed, len(WIDTHS))
    torch.testing.assert_close(quantizer(), dense)
    again = quantizer.finalize()
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())


@pytest.mark.parametrize(("mixed", "outliers"), CASES)
def test_levels_that_pass_each_other_are_packed_as_what_was_multiplied(mixed: bool, outliers: int) -> None:
    for train_weights in (False, True):
        quantizer, _ = made(mixed, outliers, train_weights=train_weights)
        with torch.no_grad():
            quantizer.levels.add_(torch.randn(quantizer.levels.shape, generator=torch.Generator().manual_seed(3)))
        stored = codebook.dequantize(quantizer.scheme, quantizer.finalize(), len(WIDTHS))
        torch.testing.assert_close(stored, quantizer(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("mixed", "outliers"), CASES)
def test_gradients_are_those_of_plain_autograd(mixed: bool, outliers: int) -> None:
    quantizer, packed = made(mixed, outliers, train_weights=True)
    assert quantizer.latents is not None
    incoming = torch.randn(ROWS, len(WIDTHS), generator=torch.Generator().manual_seed(4))
    levels, latents = torch.autograd.grad(quantizer(), [quantizer.levels, quantizer.latents], incoming)
    # Each column by itself, in the order that the parameters have.
    _, widths, _, stored = codebook.unpack(quantizer.scheme, packed, len(WIDTHS))
    served = torch.ones(len(WIDTHS), ROWS)
    if stored is not None:
        served.view(-1)[stored.positions] = 0
    first = 0
    for row, j in enumerate(widths.long().argsort(descending=True, stable=True).tolist()):
        own = quantizer.levels.detach()[first : first + 2 ** int(widths[j])].clone().requires_grad_(True)
        value = quantizer.latents.detach()[row]
        codes = (value.unsqueeze(1) - own).abs().argmin(1)
        (own[codes] * quantizer.step[row] * incoming.T[j] * served[j]).sum().backward()
        assert own.grad is not None
        torch.testing.assert_close(levels[first : first + len(own)], own.grad)
        reach = (own[0] - (own[1] - own[0]) / 2, own[-1] + (own[-1] - own[-2]) / 2)
        inside = (value >= reach[0]) & (value <= reach[1])
        torch.testing.assert_close(latents[row], incoming.T[j] * quantizer.step[row] * inside * served[j])
        first += len(own)
    assert (latents != 0).any()


def test_a_column_of_equal_values_survives() -> None:
    flat = Columns(torch.zeros(2, 8, dtype=torch.uint8), torch.tensor([2, 2]), torch.full((2, 4), 0.5))
    scheme = CodebookScheme(bits=2)
    packed = codebook.pack(scheme, flat)
    quantizer = CodebookQuantizer.from_packed(torch.full((8, 2), 0.5), packed, scheme, train_weights=True)
    assert torch.isfinite(quantizer()).all()
    torch.testing.assert_close(codebook.dequantize(scheme, quantizer.finalize(), 2), torch.full((8, 2), 0.5))
