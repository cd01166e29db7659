import pytest
import torch

from tests.solvers.moments import moments, solved
from ulbq import formats
from ulbq.errors import NumericsError
from ulbq.formats import AffineScheme, KQuantScheme, k_quant
from ulbq.formats.k_quant import KQuant
from ulbq.solvers import k_quant as solver
from ulbq.solvers.gptq import GptqSettings
from ulbq.solvers.k_quant import find_grids

SCHEMES = [KQuantScheme.model_validate({"bits": bits}) for bits in (2, 3, 4)]
labels = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)


def weight(rows: int = 8, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.rand(rows, columns // 64, generator=generator).repeat_interleave(64, 1) + 0.2
    return torch.randn(rows, columns, generator=generator) * sizes * 0.05


def importance(columns: int = 512) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(4)) + 0.1


def error(found: object, dense: torch.Tensor, cost: torch.Tensor | float = 1.0) -> float:
    assert isinstance(found, KQuant)
    return ((found.values() - dense).square() * cost).sum().item()


@labels
def test_what_is_found_is_stored_as_it_is(scheme: KQuantScheme) -> None:
    found = find_grids(weight(), scheme, importance=importance())
    assert isinstance(found, KQuant)
    packed = k_quant.pack(scheme, found)
    assert torch.equal(formats.dequantize(scheme, packed, 512), found.values())
    least, most = scheme.sub_range
    assert found.sub_scales.ne(0).all()
    assert least <= found.sub_scales.min()
    assert found.sub_scales.max() <= most


@labels
def test_codes_are_the_nearest(scheme: KQuantScheme) -> None:
    dense = weight()
    found = find_grids(dense, scheme)
    assert isinstance(found, KQuant)
    for codes in range(2**scheme.bits):
        other = found._replace(codes=torch.full_like(found.codes, codes)).values()
        assert ((found.values() - dense).abs() <= (other - dense).abs() + 1e-7).all()


@labels
def test_the_search_lowers_what_it_is_asked_to(scheme: KQuantScheme) -> None:
    dense, cost = weight(), importance()
    plain = error(find_grids(dense, scheme, search=False), dense, cost)
    searched = error(find_grids(dense, scheme), dense, cost)
    weighted = error(find_grids(dense, scheme, importance=cost), dense, cost)
    assert weighted < searched < plain
    assert weighted < {2: 0.65, 3: 0.95, 4: 0.85}[scheme.bits] * plain


def test_two_levels_lose_less_than_one_at_as_many_bits() -> None:
    dense = weight()
    one = AffineScheme(bits=2, group_size=32)  # 2.5625 bits, beside 2.625
    coarse = find_grids(dense, one)
    steps = coarse.codes.view(*coarse.scales.shape, -1) - coarse.zeros.unsqueeze(-1)
    values = (steps * coarse.scales.unsqueeze(-1)).flatten(1)
    assert error(find_grids(dense, SCHEMES[0]), dense) < 0.8 * (values - dense).square().sum().item()


@labels
def test_rows_are_found_alone(scheme: KQuantScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = find_grids(weight(), scheme)
    monkeypatch.setattr(solver, "_SLAB", 1)
    assert all(map(torch.equal, find_grids(weight(), scheme), whole))


@labels
def test_zeros_stay_zeros_and_what_float16_cannot_hold_is_refused(scheme: KQuantScheme) -> None:
    dense = weight()
    dense[0] = 0
    dense[1, :256] = 0
    found = find_grids(dense, scheme)
    assert isinstance(found, KQuant)
    assert found.values()[dense == 0].eq(0).all()
    assert found.scales.ne(0).all()
    with pytest.raises(NumericsError, match="float16 cannot hold"):
        find_grids(dense * 1e9, scheme)


@labels
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_makes_errors_good_on_these_grids(scheme: KQuantScheme, act_order: bool) -> None:
    dense = weight(16, 256)
    hessian = moments(256, 1000)
    found = solved(dense, hessian, scheme, GptqSettings(act_order=act_order))
    assert isinstance(found.codes, KQuant)

    def loss(codes: object) -> float:
        assert isinstance(codes, KQuant)
        off = codes.values() - dense
        return torch.einsum("oi,ij,oj", off, hessian, off).item()

    assert loss(found.codes) < 0.7 * loss(find_grids(dense, scheme, importance=hessian.diagonal()))
    packed = k_quant.pack(scheme, found.codes)
    assert torch.equal(formats.dequantize(scheme, packed, 256), found.codes.values())


def test_gptq_in_torch_finds_much_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, hessian = weight(16, 256), moments(256, 1000)
    compiled = solved(dense, hessian, SCHEMES[0], GptqSettings())
    monkeypatch.setattr("ulbq.kernels.solvers.take", lambda *tensors: False)
    plain = solved(dense, hessian, SCHEMES[0], GptqSettings())
    assert plain.loss == pytest.approx(compiled.loss, rel=0.02)
