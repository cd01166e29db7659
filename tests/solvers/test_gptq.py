from typing import Any

import pytest
import torch

from tests.solvers.moments import damped, moments, solved
from ulbq.formats.affine import AffineScheme
from ulbq.solvers.gptq import GptqSettings, compensate, factored, gptq
from ulbq.solvers.gptq import parts as split
from ulbq.solvers.hessian import activation_order, factorize
from ulbq.solvers.rtn import AffineCodes, round_to_nearest

COLUMNS = 64
PLAIN = GptqSettings(act_order=False, search=False)


def matrix(rows: int = 12, seed: int = 3) -> torch.Tensor:
    return 0.1 * torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def decoded(found: AffineCodes) -> torch.Tensor:
    steps = found.codes.view(*found.scales.shape, -1) - found.zeros.unsqueeze(-1)
    return (steps * found.scales.unsqueeze(-1)).flatten(1)


def cost(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr((W − Q) H (W − Q)ᵀ)`` in float64."""
    error = (weight - quantized).double()
    return ((error @ hessian.double()) * error).sum().item()


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: AffineScheme, order: list[int], *, moving: bool
) -> AffineCodes:
    """The optimal brain surgeon, one column at a time in float64: no Cholesky factor, no blocks.

    After each column, the inverse Hessian loses it (one step of Gaussian elimination).
    """
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    work, inverse = weight.double(), torch.linalg.inv(damped(hessian, 0.01))
    # It decides between the two orientations of a symmetric grid.
    importance = factorize(hessian, order=torch.tensor(order)).importance
    found = round_to_nearest(weight, scheme, search=False, importance=importance)
    codes, scales, zeros = (tensor.double() for tensor in found)
    for column in order:
        group = column // size
        if moving and column % size == 0:
            row = scheme.model_copy(update={"group_size": -1})
            columns = slice(column, column + size)
            grid = round_to_nearest(work[:, columns].float(), row, search=False, importance=importance[columns])
            scales[:, group], zeros[:, group] = grid.scales[:, 0].double(), grid.zeros[:, 0].double()
        scale, zero = scales[:, group], zeros[:, group]
        codes[:, column] = (work[:, column] / scale + zero).round().clamp(0, 2**scheme.bits - 1)
        error = (work[:, column] - (codes[:, column] - zero) * scale) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return AffineCodes(codes.to(torch.uint8), scales.float(), zeros.float())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_loop_is_the_textbooks(bits: Any, group_size: int, symmetric: bool) -> None:
    weight, hessian = matrix(), moments(COLUMNS, 600)
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    plain = solved(weight, hessian, scheme, PLAIN).codes
    expected = textbook(weight, hessian, scheme, list(range(COLUMNS)), moving=group_size == 16)
    # A scale that rounds to the next float16 number sends its row another way.
    same = (plain.codes == expected.codes).all(1)
    assert same.float().mean() >= (0.8 if group_size == 16 else 1)
    torch.testing.assert_close(plain.scales[same], expected.scales[same], rtol=1e-3, atol=0)
    assert torch.equal(plain.zeros[same], expected.zeros[same])
    order = activation_order(hessian).tolist()
    ordered = solved(weight, hessian, scheme, GptqSettings(search=False)).codes
    for ours, theirs in zip(ordered, textbook(weight, hessian, scheme, order, moving=False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_it_beats_rounding_in_the_layers_output(bits: Any, act_order: bool) -> None:
    weight, hessian = matrix(), moments(COLUMNS, 600)
    scheme = AffineScheme(bits=bits, group_size=32)
    ours = cost(weight, decoded(solved(weight, hessian, scheme, GptqSettings(act_order=act_order)).codes), hessian)
    rounded = decoded(round_to_nearest(weight, scheme, importance=hessian.diagonal()))
    assert ours < (0.6 if bits > 1 else 0.9) * cost(weight, rounded, hessian)


def test_order_and_search_pay() -> None:
    weight, hessian, scheme = matrix(64), moments(COLUMNS, 600), AffineScheme(bits=2, group_size=32)

    def loss(**settings: Any) -> float:
        return solved(weight, hessian, scheme, GptqSettings(**settings)).loss

    assert loss() < 0.9 * loss(act_order=False)
    assert loss() < 0.9 * loss(search=False)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_the_loss_is_the_error_of_the_output(act_order: bool, search: bool) -> None:
    weight, hessian, scheme = matrix(), moments(COLUMNS, 600), AffineScheme(bits=3, group_size=32)
    settings = GptqSettings(damping=0.05, act_order=act_order, search=search)
    found = solved(weight, hessian, scheme, settings)
    assert found.loss == pytest.approx(cost(weight, decoded(found.codes), damped(hessian, 0.05)), rel=1e-4)


def test_the_second_search_is_kept_only_where_it_is_better() -> None:
    hessian, scheme = moments(COLUMNS, 600), AffineScheme(bits=2, group_size=32)
    better = 0
    for seed in range(8):
        weight = matrix(4, seed)
        factor = factorize(hessian, order=activation_order(hessian))
        grids = round_to_nearest(weight, scheme, importance=factor.importance)
        first = compensate(weight, factor, _Grids(grids, factor.order.tolist(), 32, 3)).loss
        both = solved(weight, hessian, scheme, GptqSettings()).loss
        assert both <= first * (1 + 1e-6)
        better += both < 0.999 * first
    assert better


class _Grids:
    """A quantizer of columns as others may write one."""

    def __init__(self, grids: AffineCodes, order: list[int], group_size: int, top: int) -> None:
        self.grids, self.order, self.size, self.top = grids, order, group_size, top
        self.blocks: list[tuple[int, torch.Tensor]] = []
        self.agreed = True

    def begin(self, first: int, columns: torch.Tensor) -> None:
        self.blocks.append((first, columns))

    def quantize(self, index: int, column: torch.Tensor) -> torch.Tensor:
        first, columns = self.blocks[-1]
        self.agreed &= torch.equal(columns[:, index - first], column)
        group = self.order[index] // self.size
        scale, zero = self.grids.scales[:, group], self.grids.zeros[:, group]
        return ((column / scale + zero).round().clamp(0, self.top) - zero) * scale


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, 64, 100])
def test_blocks_change_nothing_and_are_seen_as_they_change(block_size: int, ordered: bool) -> None:
    weight, hessian = matrix(), moments(COLUMNS, 600)
    kept = weight.clone()
    factor = factorize(hessian, order=activation_order(hessian) if ordered else None)
    grids = round_to_nearest(weight, AffineScheme(bits=4, group_size=32))

    def run(size: int) -> tuple[_Grids, torch.Tensor, float]:
        quantizer = _Grids(grids, factor.order.tolist(), 32, 15)
        return quantizer, *compensate(weight, factor, quantizer, size)

    quantizer, quantized, loss = run(block_size)
    assert quantizer.agreed
    assert [first for first, _ in quantizer.blocks] == list(range(0, COLUMNS, block_size))
    assert sum(columns.shape[1] for _, columns in quantizer.blocks) == COLUMNS
    _, expected, other = run(16)
    torch.testing.assert_close(quantized, expected)
    assert loss == pytest.approx(other, rel=1e-4)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("column_block", [1, 48, 1000])
def test_groups_are_whole_whatever_the_block(column_block: int) -> None:
    weight, hessian, scheme = matrix(), moments(COLUMNS, 600), AffineScheme(bits=3, group_size=32)
    found = solved(weight, hessian, scheme, GptqSettings(act_order=False, block_size=column_block))
    expected = solved(weight, hessian, scheme, GptqSettings(act_order=False))
    assert torch.equal(found.codes.codes, expected.codes.codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_know_nothing_of_each_other_leave_rounding(act_order: bool) -> None:
    weight, scheme = matrix(), AffineScheme(bits=2, group_size=16)
    for hessian in (torch.eye(COLUMNS), torch.zeros(COLUMNS, COLUMNS)):
        found = solved(weight, hessian, scheme, GptqSettings(act_order=act_order)).codes
        for ours, theirs in zip(found, round_to_nearest(weight, scheme), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_dead_column_is_rounded_and_changes_no_other() -> None:
    weight, hessian = matrix(), moments(COLUMNS, 600)
    hessian[9], hessian[:, 9] = 0, 0
    scheme, settings = AffineScheme(bits=4, group_size=16), GptqSettings(search=False)
    found = solved(weight, hessian, scheme, settings).codes
    rounded = round_to_nearest(weight, scheme, search=False).codes
    assert torch.equal(found.codes[:, 9], rounded[:, 9])
    assert not torch.equal(found.codes, rounded)
    other = weight.clone()
    weight[:, 9], other[:, 9] = 0.01, -0.01
    first, second = (solved(matrix, hessian, scheme, settings).codes.codes for matrix in (weight, other))
    assert (first != second).any(0).nonzero().flatten().tolist() == [9]


def test_the_damping_that_was_used_is_told() -> None:
    rows = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(0))
    assert factored(rows.t() @ rows, GptqSettings(damping=0.0)).damping > 0
    assert factored(rows.t() @ rows, GptqSettings()).damping == 0.01


def test_stacked_matrices_are_quantized_as_each_by_itself() -> None:
    first, second, hessian = matrix(4), matrix(8, 9), moments(COLUMNS, 600)
    scheme = AffineScheme(bits=3, group_size=32)
    # Without the second search, which is kept or not for all rows together.
    settings = GptqSettings(search=False)
    both = solved(torch.cat([first, second]), hessian, scheme, settings).codes.codes
    alone = [solved(weight, hessian, scheme, settings).codes.codes for weight in (first, second)]
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("act_order", [True, False])
def test_rows_in_parts_are_quantized_as_all_together(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, scheme = matrix(), moments(COLUMNS), AffineScheme(bits=3, group_size=16)
    settings = GptqSettings(act_order=act_order, search=False)
    whole = solved(weight, hessian, scheme, settings)
    monkeypatch.setattr("ulbq.solvers.gptq.AT_ONCE", 5 * COLUMNS)
    parts = solved(weight, hessian, scheme, settings)
    assert parts.codes.codes.shape == weight.shape
    assert torch.equal(parts.codes.codes, whole.codes.codes)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    apart = gptq([weight[:3], weight[3:4], weight[4:]], factored(hessian, settings), scheme, settings)
    assert all(map(torch.equal, apart.codes, parts.codes))


def test_parts_go_over_the_ends_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ulbq.solvers.gptq.AT_ONCE", 5 * COLUMNS)
    weights = [matrix(rows) for rows in (3, 9, 1, 2)]
    parts = list(split(weights))
    assert list(map(len, parts)) == [5, 5, 5]
    assert torch.equal(torch.cat(parts), torch.cat(weights))
    assert parts[1].data_ptr() == weights[1][2:].data_ptr()
    assert [len(part) for part in split([matrix(4)])] == [4]


def test_the_symmetric_grid_turns_towards_the_longer_tail() -> None:
    weight = matrix().abs() * 2 - 0.05
    found = solved(weight, moments(COLUMNS, 600), AffineScheme(bits=2, group_size=32, symmetric=True), GptqSettings())
    assert (found.codes.scales < 0).any()
    assert (found.codes.zeros == 2).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_rows_that_cost_nothing_together_are_quantized_as_ever(act_order: bool) -> None:
    weight, hessian = matrix(40), moments(COLUMNS, 600)
    scheme, settings = AffineScheme(bits=2, group_size=32), GptqSettings(act_order=act_order)
    plain = solved(weight, hessian, scheme, settings)
    for ours, theirs in zip(solved(weight, hessian, scheme, settings, torch.eye(40)).codes, plain.codes, strict=True):
        assert torch.equal(ours, theirs)


def test_later_rows_make_good_what_earlier_ones_leave() -> None:
    weight, hessian, outputs = matrix(64), moments(COLUMNS, 600), moments(64, 600, seed=5)
    scheme = AffineScheme(bits=2, group_size=32)

    def error(found: AffineCodes) -> float:
        left = (weight - decoded(found)).double()
        return ((outputs.double() @ left @ hessian.double()) * left).sum().item()

    plain = error(solved(weight, hessian, scheme, GptqSettings()).codes)
    assert error(solved(weight, hessian, scheme, GptqSettings(), outputs).codes) < 0.8 * plain
