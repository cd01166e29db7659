"""The search for trellis codes against exhaustive search and torch, and the solver around it."""

import dataclasses
import itertools

import pytest
import torch

from tests.solvers.moments import moments
from ulbq import formats
from ulbq.formats import trellis
from ulbq.formats.trellis import TrellisScheme
from ulbq.kernels import solvers, trellis_launch, triton_launch
from ulbq.solvers import trellis as solver
from ulbq.solvers.hessian import make_good

needs_compiler = pytest.mark.skipif(
    solvers.slow_reason(torch.device("cpu")) is not None, reason="no compiled solvers here"
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states_of(codes: torch.Tensor, bits: int, state_bits: int) -> torch.Tensor:
    found = torch.zeros(codes.shape, dtype=torch.int64)
    for back in range(-(-state_bits // bits)):
        found |= codes.long().roll(back, -1) << (back * bits)
    return found & ((1 << state_bits) - 1)


@pytest.mark.parametrize(
    "search",
    [
        pytest.param(solvers.trellis_codes, marks=needs_compiler, id="compiled"),
        pytest.param(
            trellis_launch.search,
            marks=pytest.mark.skipif(not triton_launch.interpreted(), reason="kernels are not interpreted here"),
            id="triton",
        ),
        pytest.param(solver.search_with_torch, id="torch"),
    ],
)
@pytest.mark.parametrize(("bits", "length"), [(1, 12), (2, 6), (2, 7), (3, 4)])
def test_codes_are_the_best_of_all_that_end_in_their_state(search, bits: int, length: int):
    state_bits = 6 + bits
    values = gaussian(1 << state_bits, seed=1)
    sequences = gaussian(24, length, seed=2)
    every = torch.tensor(list(itertools.product(range(1 << bits), repeat=length)), dtype=torch.uint8)
    states = states_of(every, bits, state_bits)
    reached = values[states]

    codes, found = search(sequences, bits, state_bits, values)

    assert torch.equal(found, values[states_of(codes, bits, state_bits)])
    own = states_of(codes, bits, state_bits)
    costs = (values[own] - sequences).square().sum(1)
    for sequence, last, cost in zip(sequences, own[:, -1], costs, strict=True):
        errors = (reached - sequence).square().sum(1)
        torch.testing.assert_close(cost, errors[states[:, -1] == last].min(), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("bits", "state_bits"), [(1, 12), (2, 12), (3, 12), (4, 12), (2, 16)])
def test_compiled_search_finds_what_torch_finds(bits: int, state_bits: int):
    sequences = gaussian(2 if state_bits == 16 else 6, 256, seed=bits)
    scheme = TrellisScheme(bits=bits, state_bits=state_bits)
    found, _ = solver.search(sequences, scheme)
    wanted, _ = solver.search_with_torch(sequences, bits, state_bits, trellis.values(state_bits))
    errors = [
        (trellis.values(state_bits)[trellis.states(scheme, codes)] - sequences).square().sum(1)
        for codes in (found, wanted)
    ]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=1e-4)
    assert (found != wanted).float().mean() < 0.01


@needs_compiler
# Of a table of 4096 Gaussian quantiles in random order.
@pytest.mark.parametrize(
    ("bits", "state_bits", "error"), [(1, 12, 0.277), (2, 12, 0.073), (3, 12, 0.0192), (2, 16, 0.0685)]
)
def test_error_on_gaussians_is_that_of_random_tables(bits: int, state_bits: int, error: float):
    sequences = gaussian(192 if state_bits == 12 else 24, 256, seed=7) * solver._BEST_SCALE[bits]
    scheme = TrellisScheme(bits=bits, state_bits=state_bits)
    _, values = solver.search(sequences, scheme)
    found = ((values - sequences).square().sum() / sequences.square().sum()).item()
    assert found < 1.02 * error
    if bits > 1 and state_bits == 12:
        assert found == pytest.approx(solver._ERRORS[bits], rel=0.02)


def test_later_tiles_make_good_what_earlier_ones_leave():
    weight, hessian = gaussian(48, 64), moments(64)
    scheme = TrellisScheme(bits=2)

    def output_error(moments: torch.Tensor) -> float:
        found = solver.solve(weight, moments, scheme, torch.Generator().manual_seed(0))
        error = weight - formats.dequantize(scheme, trellis.pack(scheme, found.trellis), 64)
        return (error @ hessian * error).sum().item()

    assert output_error(hessian) < 0.8 * output_error(hessian.diagonal().diag())


def test_loss_is_what_the_demand_foretells():
    weight, hessian = gaussian(128, 128), moments(128, 2000)
    hessian += 0.2 * hessian.diagonal().mean() * torch.eye(128)
    demand = solver.demand(weight, hessian, 1.0)
    for bits in (1, 2, 3, 4):
        scheme = TrellisScheme(bits=bits)
        found = solver.solve(weight, hessian, scheme, torch.Generator().manual_seed(0))
        error = weight - formats.dequantize(scheme, trellis.pack(scheme, found.trellis), 128)
        assert (error @ hessian * error).sum().item() == pytest.approx(demand.loss * solver._ERRORS[bits], rel=0.15)


def test_signs_come_from_the_generator_alone_and_the_weight_is_what_is_stored():
    weight, hessian, scheme = gaussian(32, 32), moments(32), TrellisScheme()
    first, again, other = (
        solver.solve(weight, hessian, scheme, torch.Generator().manual_seed(seed)).trellis for seed in (1, 1, 2)
    )
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    found = solver.solve(weight, hessian, scheme, torch.Generator().manual_seed(1))
    assert torch.equal(found.weight, formats.dequantize(scheme, trellis.pack(scheme, found.trellis), 32))
    assert not torch.equal(first.su.sign(), other.su.sign())


@pytest.mark.parametrize("weight", [torch.zeros(32, 32), torch.eye(32), gaussian(32, 32) * 1e-4], ids=str)
def test_strange_weights_have_finite_codes(weight: torch.Tensor):
    scheme = TrellisScheme(bits=3)
    found = solver.solve(weight, torch.eye(32), scheme, torch.Generator().manual_seed(0))
    dense = formats.dequantize(scheme, trellis.pack(scheme, found.trellis), 32)
    assert dense.isfinite().all()
    assert (dense - weight).norm() <= 0.25 * weight.norm() + 1e-6


def test_bits_go_where_they_pay_and_stay_in_the_budget():
    scheme = TrellisScheme(bits=1)
    demands = [solver.Demand((32, 32), 1.0), solver.Demand((32, 32), 30.0), solver.Demand((64, 64), 1.0)]
    weights = 2 * 32 * 32 + 64 * 64
    overhead = 16 * (4 * 32 + 2 * 64)

    def losses(widths: tuple[int, ...]) -> float:
        return sum(one.loss * solver._ERRORS[width] for one, width in zip(demands, widths, strict=True))

    def bits(widths: tuple[int, ...]) -> int:
        return overhead + sum(one.shape[0] * one.shape[1] * width for one, width in zip(demands, widths, strict=True))

    for target in (1.4, 1.75, 2.0, 2.6, 4.0):
        budget = target * weights + overhead
        found = tuple(one.bits for one in solver.allocate(demands, scheme, budget))
        assert bits(found) <= budget
        possible = [w for w in itertools.product((1, 2, 3, 4), repeat=3) if bits(w) <= budget]
        assert losses(found) <= 1.5 * min(map(losses, possible))
    assert found == (4, 4, 4)


def test_damping_is_raised_where_inputs_are_singular_and_told():
    inputs = torch.ones(32, 1)
    found = solver.solve(gaussian(32, 32), inputs @ inputs.T, TrellisScheme(), torch.Generator().manual_seed(0), 0.0)
    assert found.damping > 0
    assert found.weight.isfinite().all()


def output_error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    left = (weight - found).double()
    return ((left @ hessian.double()) * left).sum().item()


def test_rows_that_cost_nothing_together_are_coded_as_ever():
    weight, hessian, scheme = gaussian(48, 64), moments(64), TrellisScheme(bits=2)
    _, sv = solver.scales(weight, hessian, 2, torch.Generator().manual_seed(0))
    # Between the transforms that is an identity.
    alone = sv.square().reciprocal().diag()
    plain, other = (
        solver.solve(weight, hessian, scheme, torch.Generator().manual_seed(0), outputs=outputs)
        for outputs in (None, alone)
    )
    assert torch.equal(plain.trellis.codes, other.trellis.codes)
    torch.testing.assert_close(plain.trellis.sv, other.trellis.sv, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [48, 256], ids=["mixed", "blocks"])
def test_rows_of_other_scales_make_good_what_earlier_ones_leave(rows: int):
    weight, hessian, scheme = gaussian(rows, 64) * gaussian(rows, 1, seed=3).exp(), moments(64), TrellisScheme(bits=2)
    _, sv = solver.scales(weight, hessian, 2, torch.Generator().manual_seed(0), coupled=True)
    # Between the transforms that is an identity: rows that know nothing of each other.
    alone = sv.square().reciprocal().diag()
    together, apart = (
        solver.solve(
            weight, hessian, scheme, torch.Generator().manual_seed(0), outputs=outputs, row_feedback=True
        ).weight
        for outputs in (None, alone)
    )
    assert output_error(weight, together, hessian) < 0.93 * output_error(weight, apart, hessian)


def test_scales_follow_what_columns_cost(monkeypatch: pytest.MonkeyPatch):
    weight, hessian, scheme = gaussian(64, 128), moments(128), TrellisScheme(bits=2)
    sizes = torch.logspace(-2, 2, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(9))]
    hessian = hessian * sizes * sizes.unsqueeze(1)

    def error() -> float:
        found = solver.solve(weight, hessian, scheme, torch.Generator().manual_seed(0), row_feedback=True)
        return output_error(weight, found.weight, hessian)

    known, scales = error(), solver.scales
    monkeypatch.setattr(
        solver, "scales", lambda weight, _, *rest, **named: scales(weight, torch.eye(128), *rest, **named)
    )
    assert known < 0.8 * error()


def test_every_tile_makes_good_what_all_before_it_leave():
    inner, scheme = gaussian(32, 48), TrellisScheme(bits=2)
    costs, between = (solver.factorize(moments(size, seed=seed)) for size, seed in ((48, 1), (32, 2)))
    rows = solver._Rows(between.upper.unsqueeze(0), between.order)
    codes, _ = solver._by_tiles(inner, costs, rows, scheme)

    # The same as one vector of 6 tiles, whose errors cost what the Kronecker product says.
    tiles = [(row, column) for column in range(3) for row in range(2)]
    places = torch.cat(
        [(torch.arange(16) + 16 * row).unsqueeze(1) * 48 + torch.arange(16) + 16 * column for row, column in tiles]
    ).view(-1)
    upper = torch.kron(between.upper, costs.upper)[places][:, places]
    seen: list[torch.Tensor] = []

    def solve(tile: torch.Tensor) -> torch.Tensor:
        own, values = solver.search(trellis.sequences(tile.view(16, 16))[0], scheme)
        seen.append(own[0])
        return trellis.from_sequences(values.unsqueeze(0)).reshape(-1, 1)

    whole = dataclasses.replace(costs, upper=upper, order=torch.arange(len(upper)))
    make_good(inner.reshape(-1, 1)[places], whole, 256, solve)
    expected = torch.stack(seen).view(3, 2, 256)
    assert torch.equal(codes, expected)


def test_later_rows_make_good_what_earlier_ones_leave():
    weight, hessian, outputs, scheme = gaussian(64, 64), moments(64), moments(64, seed=5), TrellisScheme(bits=2)

    def error(given: torch.Tensor | None) -> float:
        found = solver.solve(weight, hessian, scheme, torch.Generator().manual_seed(0), outputs=given)
        left = (weight - found.weight).double()
        return ((outputs.double() @ left @ hessian.double()) * left).sum().item()

    assert error(outputs) < 0.8 * error(None)
