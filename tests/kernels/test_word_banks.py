"""Several matrices in words in one launch, in Triton's interpreter here, and under ``-m gpu`` on a real GPU."""

import pytest
import torch

from tests.kernels import test_triton_launch
from tests.kernels.matrices import assert_near, exact, in_layout, random_matrix
from tests.kernels.test_banks import far_apart
from ulbq import kernels
from ulbq.formats import AffineScheme, AnyScheme, CodebookScheme, DualBinaryScheme, TrellisScheme
from ulbq.kernels import banks, word_banks
from ulbq.kernels.banks import Routes
from ulbq.kernels.layouts.words import WordsLayout

on_devices, poisoned = test_triton_launch.on_devices, test_triton_launch.poisoned
dtypes = test_triton_launch.dtypes

MATRICES, SHARE = 3, 2
SCHEMES: list[tuple[AnyScheme, int, int]] = [
    (AffineScheme(bits=2, group_size=64), 70, 192),
    (AffineScheme(bits=3, group_size=32, symmetric=True), 70, 96),
    (DualBinaryScheme(group_size=-1), 70, 75),
    (TrellisScheme(bits=2), 64, 128),
    (TrellisScheme(bits=3, state_bits=16), 128, 64),
]


def gathered(scheme: AnyScheme, outs: int, columns: int, device: str) -> list[tuple[AnyScheme, kernels.Ready]]:
    found = []
    for number in range(MATRICES):
        stored = random_matrix(scheme, outs, columns, seed=number)
        moved = {name: tensor.to(device) for name, tensor in stored.items()}
        found.append((scheme, in_layout("triton", scheme, moved, outs, columns)))
    return found


def routed(tokens: int) -> torch.Tensor:
    """Choices of tokens; the second matrix has more rows than the others."""
    scores = torch.rand(tokens, MATRICES, generator=torch.Generator().manual_seed(tokens))
    scores[:, 1] += 0.5
    return scores.topk(SHARE).indices.flatten()


def wanted(scheme: AnyScheme, outs: int, each: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    columns = each.shape[1]
    y = torch.empty(len(chosen), outs, dtype=torch.float64)
    for number in range(MATRICES):
        rows = (chosen == number).nonzero().flatten()
        y[rows] = exact(scheme, random_matrix(scheme, outs, columns, seed=number), each[rows])
    return y


@on_devices
@pytest.mark.parametrize("tokens", [1, 3, 24])
@pytest.mark.parametrize(("scheme", "outs", "columns"), SCHEMES, ids=lambda v: getattr(v, "label", str(v)))
def test_products(scheme: AnyScheme, outs: int, columns: int, tokens: int, device: str) -> None:
    bank = kernels.gathered(gathered(scheme, outs, columns, device), outs, columns)
    chosen = routed(tokens)
    routes = Routes.of(chosen.to(device), MATRICES)
    alone = Routes([(number, at, at + 1) for at, number in enumerate(chosen.tolist())], None, len(chosen))
    for dtype in dtypes(device):
        assert bank[0].takes(dtype, routes.most)
        x = torch.randn(tokens, columns).to(device, dtype)
        each = x.repeat_interleave(SHARE, 0)
        should = wanted(scheme, outs, each.cpu(), chosen)
        for way in (routes, alone) if tokens == 1 else (routes,):
            assert_near(banks.multiply(bank, x, way, SHARE).cpu(), should, dtype, slack=2)
        assert_near(banks.multiply(bank, each, routes, 1).cpu(), should, dtype, slack=2)


@pytest.mark.skipif(not test_triton_launch.triton_launch.interpreted(), reason=test_triton_launch.NO_INTERPRETER)
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize(("scheme", "outs", "columns"), [SCHEMES[0], SCHEMES[3]], ids=lambda v: getattr(v, "label", ""))
def test_matrices_may_lie_further_apart_than_32_bits_count(
    scheme: AnyScheme, outs: int, columns: int, tokens: int
) -> None:
    bank = kernels.gathered(far_apart(gathered(scheme, outs, columns, "cpu"), "word_codes"), outs, columns)
    assert isinstance(bank[0], word_banks.WordsBank | word_banks.TrellisWordsBank)
    assert bank[0].offsets[:, 0].diff().gt(2**31).all()
    x, chosen = torch.randn(tokens, columns), routed(tokens)
    found = banks.multiply(bank, x, Routes.of(chosen, MATRICES), SHARE)
    assert_near(found, wanted(scheme, outs, x.repeat_interleave(SHARE, 0), chosen), x.dtype, slack=2)


def test_what_has_no_bank() -> None:
    layout = WordsLayout()
    assert layout.bank(CodebookScheme()) is None
    assert layout.bank(TrellisScheme()) is word_banks.TrellisWordsBank
    two = [gathered(AffineScheme(bits=bits, group_size=32), 64, 64, "cpu")[0] for bits in (2, 3)]
    assert kernels.gathered(two, 64, 64) == []
    mixed = TrellisScheme(bits=2)
    assert not kernels.gathered(gathered(mixed, 48, 192, "cpu"), 48, 192)[0].takes(torch.float32, 1)
    unaligned = gathered(AffineScheme(bits=2, group_size=32), 64, 64, "cpu")
    tensors = unaligned[0][1].tensors
    tensors["word_codes"] = torch.cat([torch.zeros(1, dtype=torch.int32), tensors["word_codes"].flatten()])[1:].view(
        tensors["word_codes"].shape
    )
    assert not kernels.gathered(unaligned, 64, 64)[0].takes(torch.float32, 1)
