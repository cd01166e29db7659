"""Several matrices in one call: the bits that each of them gives by itself, wherever they lie."""

import mmap

import pytest
import torch

from tests.formats.columns import random_columns
from tests.kernels.matrices import multiply, random_matrix
from ulbq import kernels
from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    TrellisScheme,
    codebook,
)
from ulbq.kernels import banks, build, tiles
from ulbq.kernels.banks import Routes

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

MATRICES, OUTS, COLUMNS, SHARE = 5, 80, 192, 2
APART = 9 << 30
"""Bytes: more words of 32 bits than 32 bits count."""
SCHEMES: list[AnyScheme] = [
    *(AffineScheme(bits=bits, group_size=64) for bits in (1, 2, 3, 4)),
    AffineScheme(bits=2, group_size=32, symmetric=True),
    DualBinaryScheme(group_size=64),
    DualBinaryScheme(group_size=32),
    CodebookScheme(),
    CodebookScheme(outliers=40),
    *(TrellisScheme(bits=bits) for bits in (1, 2, 3, 4)),
]


def stored(scheme: AnyScheme, seed: int) -> tuple[AnyScheme, dict[str, torch.Tensor]]:
    if not isinstance(scheme, CodebookScheme):
        return scheme, random_matrix(scheme, OUTS, COLUMNS, seed=seed)
    widths = [2] * 150 + [4] * 20 + [3] * 22
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed)).tolist()
    own, made = random_columns(OUTS, [widths[at] for at in order], scheme.outliers, seed=seed)
    return own, codebook.pack(own, made)


def some(scheme: AnyScheme) -> list[tuple[AnyScheme, kernels.Ready]]:
    found = (stored(scheme, seed) for seed in range(MATRICES))
    return [(own, kernels.prepare(own, tensors, OUTS, COLUMNS)) for own, tensors in found]


def far_apart(matrices: list[tuple[AnyScheme, kernels.Ready]], name: str) -> list[tuple[AnyScheme, kernels.Ready]]:
    """The same, one tensor of each so far from the next; of all the memory between them nothing is ever touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python knows from 3.13 on
    memory = mmap.mmap(-1, APART * len(matrices), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    whole, found = torch.frombuffer(memory, dtype=torch.uint8), []
    for number, (scheme, ready) in enumerate(matrices):
        tensor = ready.tensors[name]
        begin = APART * number
        moved = whole[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        found.append((scheme, kernels.Ready(ready.layout, ready.tensors | {name: moved})))
    return found


def gathered(matrices: list[tuple[AnyScheme, kernels.Ready]]) -> list[banks.Bank]:
    return kernels.gathered(matrices, OUTS, COLUMNS)


def routed(tokens: int) -> torch.Tensor:
    """Choices of tokens; nobody takes the last matrix, and one has many more rows than the others."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, MATRICES - 1, generator=generator)
    scores[:, 1] += 0.5
    return scores.topk(SHARE).indices.flatten()


def one_by_one(matrices: list[tuple[AnyScheme, kernels.Ready]], x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(len(chosen), OUTS)
    for number in chosen.unique().tolist():
        rows = (chosen == number).nonzero().flatten()
        y[rows] = multiply(*matrices[number], x[rows], OUTS)
    return y


@pytest.mark.parametrize("dtype", tiles.FLOATS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.label}")
def test_they_give_the_bits_that_each_gives_alone(scheme: AnyScheme, dtype: torch.dtype) -> None:
    matrices = some(scheme)
    bank = gathered(matrices)
    for tokens in (1, 2, 7, 60):
        chosen = routed(tokens)
        routes = Routes.of(chosen, MATRICES)
        assert all(one.takes(dtype, routes.most) for one in bank)
        x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        each = x.repeat_interleave(SHARE, 0)
        wanted = one_by_one(matrices, each, chosen)
        assert torch.equal(banks.multiply(bank, x, routes, SHARE), wanted)
        assert torch.equal(banks.multiply(bank, each, routes, 1), wanted)


@pytest.mark.parametrize("scheme", [SCHEMES[3], SCHEMES[7], SCHEMES[10]], ids=lambda s: s.format)
def test_any_number_of_threads_gives_them(scheme: AnyScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "_WORTH_A_THREAD", 0)
    bank, chosen = gathered(some(scheme)), routed(40)
    x = torch.randn(40, COLUMNS).bfloat16()
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found += [banks.multiply(bank, x, Routes.of(chosen, MATRICES), SHARE) for _ in range(2)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_matrices_of_several_schemes_are_several_banks() -> None:
    matrices = [some(TrellisScheme(bits=1 + number % 3))[number] for number in range(MATRICES)]
    bank = gathered(matrices)
    assert [sorted(one.matrices) for one in bank] == [[0, 3], [1, 4], [2]]
    x, chosen = torch.randn(9, COLUMNS), routed(9)
    found = banks.multiply(bank, x, Routes.of(chosen, MATRICES), SHARE)
    assert torch.equal(found, one_by_one(matrices, x.repeat_interleave(SHARE, 0), chosen))


def test_rows_of_no_matrix_are_left_alone() -> None:
    matrices = some(SCHEMES[3])
    chosen = torch.tensor([1, MATRICES, 0, 1])
    routes = Routes.of(chosen, MATRICES)
    assert (routes.jobs, routes.places, routes.most) == ([(0, 0, 1), (1, 1, 3)], 4, 2)
    x = torch.randn(4, COLUMNS)
    found = banks.multiply(gathered(matrices), x, routes, 1)
    kept = [0, 2, 3]
    assert torch.equal(found[kept], one_by_one(matrices, x, chosen.clamp(max=1))[kept])


def test_what_has_no_bank() -> None:
    assert gathered(some(BinaryMosScheme(experts=2))) == []
    assert gathered([*some(SCHEMES[3])[1:], *some(BinaryMosScheme())[:1]]) == []
    bank, columns = gathered(some(SCHEMES[3]))[0], gathered(some(SCHEMES[7]))[0]
    assert not bank.takes(torch.float64, 1)
    assert not bank.takes(torch.float32, tiles.MANY_ROWS)
    assert not columns.takes(torch.float32, 65)


def test_matrices_may_lie_further_apart_than_32_bits_count() -> None:
    matrices = some(SCHEMES[3])
    x, chosen = torch.randn(6, COLUMNS), routed(6)
    wanted = one_by_one(matrices, x.repeat_interleave(SHARE, 0), chosen)
    far = far_apart(matrices, "tiled_codes")
    bank = gathered(far)
    assert bank[0].table[:, 0].diff().eq(APART).all()
    assert torch.equal(banks.multiply(bank, x, Routes.of(chosen, MATRICES), SHARE), wanted)
