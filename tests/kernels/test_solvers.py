"""The compiled loops of the solvers against their references in torch.

Sums are taken in another order, so where two ways to round a group are equally good to float32, either may be found.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.solvers.moments import moments, solved
from ulbq.errors import NumericsError
from ulbq.formats.affine import AffineScheme
from ulbq.kernels import build, solvers
from ulbq.quantizers.dual_binary import nearest, search_scales
from ulbq.solvers.gptq import GptqSettings
from ulbq.solvers.rtn import AffineCodes, round_to_nearest

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

COLUMNS = 96


def weights(rows: int = 33, seed: int = 0) -> torch.Tensor:
    """Rows of any number, their distributions skewed."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, COLUMNS, generator=generator)
    return 0.05 * (plain + 0.3 * plain.square() * torch.randn(rows, 1, generator=generator))


def costs(seed: int = 1) -> torch.Tensor:
    return torch.rand(COLUMNS, generator=torch.Generator().manual_seed(seed)).square() + 1e-3


def by_torch(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the reference finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "take", lambda *_: False)
        return function(*arguments, **options)


def group_errors(weight: torch.Tensor, found: AffineCodes, importance: torch.Tensor | None) -> torch.Tensor:
    """``[out, G]`` squared errors in float64."""
    grouped = weight.double().unflatten(1, (found.scales.shape[1], -1))
    steps = found.codes.view(grouped.shape).double() - found.zeros.double().unsqueeze(-1)
    off = (steps * found.scales.double().unsqueeze(-1) - grouped).square()
    return (off if importance is None else off * importance.double().view(grouped.shape[1:])).sum(-1)


def check_rounding(weight: torch.Tensor, scheme: AffineScheme, importance: torch.Tensor | None, search: bool) -> None:
    ours = round_to_nearest(weight, scheme, importance=importance, search=search)
    theirs = by_torch(round_to_nearest, weight, scheme, importance=importance, search=search)
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in theirs]
    same = (ours.scales == theirs.scales) & (ours.zeros == theirs.zeros)
    assert same.float().mean() >= 0.98
    codes = [found.codes.view(*same.shape, -1)[same] for found in (ours, theirs)]
    assert torch.equal(*codes)
    # Never above the reference's: what a group loses by a tie, another wins.
    left, right = (group_errors(weight, found, importance) for found in (ours, theirs))
    assert left.sum() <= right.sum() * (1 + 1e-5)
    assert (left <= right * 1.05 + 1e-12).all()


def check_all_scales() -> None:
    """Every float16 number, the borders between them and what lies beside: a group of one is its own scale at 1 bit."""
    numbers = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    borders = (numbers[1:] + numbers[:-1]) / 2
    around = [torch.nextafter(borders, towards) for towards in (torch.zeros_like(borders), numbers[1:])]
    weight = torch.cat([numbers, borders, *around]).unsqueeze(1)
    found = round_to_nearest(weight, AffineScheme(bits=1, group_size=1), search=False).scales
    assert torch.equal(found, weight.half().float().clamp_min(1e-8))


@pytest.mark.skipif(build.solvers_unavailable_reason() is not None, reason="switched off")
class TestRounding:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("search", [False, True])
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("group_size", [1, 6, 32, 48, -1])
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_codes_scales_and_zeros_are_the_references(
        self, bits: Any, group_size: int, symmetric: bool, search: bool, weighted: bool
    ) -> None:
        scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
        check_rounding(weights(), scheme, costs() if weighted else None, search)

    def test_grids_without_a_zero_are_the_references(self) -> None:
        scheme = AffineScheme(bits=2, group_size=32, symmetric=True, mid_rise=True)
        check_rounding(weights(), scheme, costs(), True)

    def test_scales_are_rounded_to_float16_as_torch_rounds_them(self) -> None:
        check_all_scales()

    @pytest.mark.parametrize("rows", [1, 15, 16, 17])
    def test_any_number_of_rows(self, rows: int) -> None:
        check_rounding(weights(rows), AffineScheme(bits=3, group_size=32), None, True)

    def test_whole_rows_longer_than_a_partial_sum(self) -> None:
        weight = torch.randn(7, 1003, generator=torch.Generator().manual_seed(3))
        check_rounding(weight, AffineScheme(bits=2, group_size=-1), None, True)

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_zeros_constants_and_tiny_groups(self, bits: Any, symmetric: bool) -> None:
        weight = weights(8)
        weight[0, :32], weight[1, :32], weight[2, :32] = 0, 0.25, -0.25
        weight[3] *= 1e-6  # float16 holds their scales only as multiples of 2^-24, or not at all
        weight[4] *= 1e-9
        weight[5, 7] = 60.0
        weight[6] *= 1e5
        check_rounding(weight, AffineScheme(bits=bits, group_size=32, symmetric=symmetric), None, True)

    @pytest.mark.parametrize("search", [False, True])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
    def test_groups_without_a_finite_error_are_refused(self, value: float, search: bool) -> None:
        weight, scheme = weights(), AffineScheme(bits=4, group_size=32)
        weight[3, 40] = value
        for function in (round_to_nearest, lambda *given, **options: by_torch(round_to_nearest, *given, **options)):
            with pytest.raises(NumericsError, match="float16"):
                function(weight, scheme, search=search)

    def test_an_importance_of_zeros(self) -> None:
        check_rounding(weights(), AffineScheme(bits=2, group_size=32), torch.zeros(COLUMNS), True)

    @pytest.mark.parametrize(
        "view",
        [
            lambda weight: weight.t().contiguous().t(),
            lambda weight: torch.cat([weight, weight], 1)[:, :COLUMNS],
            lambda weight: weight.repeat_interleave(2, 0)[::2],
            lambda weight: weight.repeat_interleave(3, 1)[:, 1::3],
            lambda weight: weight[:1].expand(len(weight), -1),
        ],
        ids=["transposed", "columns", "rows", "every third", "expanded"],
    )
    def test_views_are_read_where_they_lie(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        strided, scheme = view(weights()), AffineScheme(bits=2, group_size=32)
        importance = costs().repeat_interleave(2)[::2]
        plain = round_to_nearest(strided.contiguous(), scheme, importance=costs())
        for ours, theirs in zip(round_to_nearest(strided, scheme, importance=importance), plain, strict=True):
            assert torch.equal(ours, theirs)

    def test_the_number_of_threads_changes_nothing(self) -> None:
        weight, scheme = weights(50), AffineScheme(bits=2, group_size=32)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = round_to_nearest(weight, scheme)
            torch.set_num_threads(3)
            assert all(map(torch.equal, alone, round_to_nearest(weight, scheme)))
        finally:
            torch.set_num_threads(threads)

    def test_other_dtypes_are_left_to_torch(self) -> None:
        assert not solvers.take(weights().double())
        assert not solvers.take(weights(), costs().bfloat16())
        assert not solvers.take(weights().to("meta"))
        found = round_to_nearest(weights().double(), AffineScheme(bits=4, group_size=32))
        assert torch.equal(found.codes, round_to_nearest(weights(), AffineScheme(bits=4, group_size=32)).codes)


def dual_errors(weight: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    grouped = weight.double().unflatten(1, (scales.shape[2], -1))
    off = (nearest(grouped, scales.double()) - grouped).square()
    return (off * importance.double().view(grouped.shape[1:])).sum(-1)


def check_dual_binary(weight: torch.Tensor, importance: torch.Tensor, group_size: int) -> None:
    ours = search_scales(weight, importance, group_size)
    theirs = by_torch(search_scales, weight, importance, group_size)
    same = ((ours - theirs).abs() <= 1e-4 * theirs.abs()).all(0)
    assert same.float().mean() >= 0.98
    left, right = (dual_errors(weight, scales, importance) for scales in (ours, theirs))
    assert left.sum() <= right.sum() * (1 + 1e-5)
    assert (left <= right * 1.05 + 1e-12).all()


@pytest.mark.skipif(build.solvers_unavailable_reason() is not None, reason="switched off")
class TestDualBinary:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("group_size", [6, 32, 48, 96])
    def test_scales_are_the_references(self, group_size: int, weighted: bool) -> None:
        check_dual_binary(weights(), costs() if weighted else torch.ones(COLUMNS), group_size)

    @pytest.mark.parametrize("options", [{"candidates": 3}, {"candidates": 13}, {"refits": 0}, {"refits": 1}])
    def test_any_number_of_candidates_and_refits(self, options: dict[str, int]) -> None:
        weight = weights()
        ours = search_scales(weight, costs(), 32, **options)
        theirs = by_torch(search_scales, weight, costs(), 32, **options)
        assert ((ours - theirs).abs() <= 1e-4 * theirs.abs()).all(0).float().mean() >= 0.98

    def test_odd_groups(self) -> None:
        weight = weights(8)
        weight[0, :32], weight[1, :32], weight[2, :32] = 0, 0.25, -0.25
        weight[3] *= 1e-9
        weight[4, 40], weight[5, 40], weight[6, 40] = float("nan"), float("inf"), 1e30
        ours, theirs = search_scales(weight, costs(), 32), by_torch(search_scales, weight, costs(), 32)
        torch.testing.assert_close(ours, theirs, equal_nan=True)

    def test_views_are_read_where_they_lie(self) -> None:
        weight = weights()
        plain = search_scales(weight, costs(), 32)
        assert torch.equal(search_scales(weight.t().contiguous().t(), costs().repeat_interleave(2)[::2], 32), plain)


def check_compensation(scheme: AffineScheme, settings: GptqSettings) -> None:
    weight, hessian = weights(50), moments(COLUMNS, 600)
    ours = solved(weight, hessian, scheme, settings)
    theirs = by_torch(solved, weight, hessian, scheme, settings)
    # One code on the border between two sends the rest of its row another way.
    assert (ours.codes.codes == theirs.codes.codes).all(1).float().mean() >= 0.9
    assert ours.loss == pytest.approx(theirs.loss, rel=0.01)
    assert [tensor.dtype for tensor in ours.codes] == [tensor.dtype for tensor in theirs.codes]
    assert all(tensor.is_contiguous() for tensor in ours.codes)


@pytest.mark.skipif(build.solvers_unavailable_reason() is not None, reason="switched off")
class TestCompensation:
    @pytest.mark.parametrize("search", [False, True])
    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("group_size", [16, 48, -1])
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_codes_are_the_references(
        self, bits: Any, group_size: int, symmetric: bool, act_order: bool, search: bool
    ) -> None:
        scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
        check_compensation(scheme, GptqSettings(act_order=act_order, search=search, block_size=32))

    @pytest.mark.parametrize("rows", [1, 31, 32, 33])
    @pytest.mark.parametrize("block_size", [1, 7, 96, 200])
    def test_any_number_of_rows_and_columns(self, rows: int, block_size: int) -> None:
        weight, hessian, scheme = weights(rows), moments(COLUMNS, 600), AffineScheme(bits=4, group_size=32)
        settings = GptqSettings(search=False, block_size=block_size)
        ours = solved(weight, hessian, scheme, settings).codes
        assert torch.equal(ours.codes, by_torch(solved, weight, hessian, scheme, settings).codes.codes)

    @pytest.mark.parametrize("act_order", [False, True])
    def test_a_group_without_a_finite_error_is_refused(self, act_order: bool) -> None:
        weight = weights()
        weight[3, 40] = float("inf")
        with pytest.raises(NumericsError, match="float16"):
            solved(
                weight, moments(COLUMNS, 600), AffineScheme(bits=4, group_size=32), GptqSettings(act_order=act_order)
            )


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """An empty cache, and what has the process look for the library anew."""

    def forget() -> None:
        for function in (build.solvers, build.solvers_unavailable_reason, build._load_solvers):
            function.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield forget
    monkeypatch.undo()
    forget()


@pytest.fixture
def mutated(
    unbuilt: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, str, str], None]:
    """Compiles the sources with one place of a file changed."""

    def mutate(file: str, old: str, new: str) -> None:
        folder = tmp_path / "sources"
        shutil.copytree(build._PORTABLE, folder)
        text = (folder / file).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(build, "_PORTABLE", folder)
        unbuilt()

    return mutate


@pytest.mark.slow
@pytest.mark.skipif(build.solvers_unavailable_reason() is not None, reason="switched off")
@pytest.mark.parametrize("features", [(), ("avx2", "fma")], ids=["baseline", "avx2"])
def test_other_processors_find_the_same_to_the_bit(
    unbuilt: Callable[[], None], monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...]
) -> None:
    if not build.cpu_features().issuperset(features):
        pytest.skip("this processor has no AVX2")

    def found() -> list[torch.Tensor]:
        plain = [
            *round_to_nearest(weights(), AffineScheme(bits=2, group_size=48), importance=costs()),
            *round_to_nearest(weights(), AffineScheme(bits=1, group_size=6, symmetric=True)),
            search_scales(weights(), costs(), 48),
        ]
        compensated = [
            solved(weights(), moments(COLUMNS, 600), AffineScheme(bits=3, group_size=32), GptqSettings(act_order=order))
            for order in (False, True)
        ]
        return plain + [tensor for one in compensated for tensor in one.codes]

    here = found()
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(features))
    unbuilt()
    assert not build.solvers_unavailable_reason()
    assert all(map(torch.equal, here, found()))


@pytest.mark.slow
@pytest.mark.skipif(build.solvers_unavailable_reason() is not None, reason="switched off")
class TestWrongKernelsFail:
    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            ("affine.h", "if (!(found[i] < best_.error))", "if (!(found[i] <= best_.error))"),
            ("affine.h", "offer(low * search_.factors[i], high_)", "offer(low_ * search_.factors[i], high_)"),
            ("affine.h", "offer(low_, high * search_.factors[i])", "offer(low, high * search_.factors[i])"),
            ("affine.h", "off * off * spread(cost[i])", "off * off"),
            ("affine.h", "candidates_.add(low, high, -scale", "candidates_.add(low, high, scale"),
            ("lanes.h", "(bits + 0xFFF + (bits >> 13 & 1))", "(bits + 0x1000)"),
            ("lanes.h", "if (scale < 0x1p-14f)", "if (false)"),
            ("dual_binary.cpp", "weight > (first + second) / 2", "weight > first / 2"),
            ("dual_binary.cpp", "boths[p] += rounded.upper > 0 ? lower : none", "boths[p] += none"),
            ("dual_binary.cpp", "sign[lane] = lane % 2 ? -1 : 1", "sign[lane] = 1"),
            ("compensate.cpp", "factors[column]", "factors[0]"),
            ("compensate.cpp", "* scales[row]) / pivot", "* scales[row])"),
            ("compensate.cpp", "importance + column, size", "importance, size"),
        ],
    )
    def test_of_any_loop(self, mutated: Callable[[str, str, str], None], file: str, old: str, new: str) -> None:
        mutated(file, old, new)
        with pytest.raises(AssertionError):
            check_all_kinds()


def check_all_kinds() -> None:
    check_all_scales()
    for bits in (1, 2, 4):
        for symmetric in (False, True):
            scheme = AffineScheme(bits=bits, group_size=32, symmetric=symmetric)
            check_rounding(weights(64), scheme, costs(), True)
            check_rounding(1e-6 * weights(64), scheme, None, False)
            check_rounding((weights(64) * 64).round() / 64, scheme, None, True)
    for weight in (weights(64), -weights(64)):
        check_dual_binary(weight, costs(), 32)
    for act_order in (False, True):
        check_compensation(AffineScheme(bits=2, group_size=16), GptqSettings(act_order=act_order, block_size=32))
