"""Compiled fake quantization against torch's operations: values and gradients, and that a broken one is seen."""

from collections.abc import Callable

import pytest
import torch

from ulbq.formats import AffineScheme, DualBinaryScheme
from ulbq.kernels import build, fake_quantize
from ulbq.quantizers.affine import AffineForm, AffineQuantizer
from ulbq.quantizers.base import Quantizer
from ulbq.quantizers.dual_binary import DualBinaryQuantizer, search_scales
from ulbq.solvers.rtn import round_to_nearest

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(7, 15, 5), (3, 100, 100), (9, 66, 33), (16, 128, 64), (33, 48, 16), (1, 1, 1)]
"""Outputs, columns and group size: ragged ones, and whole rows."""

Found = dict[str, torch.Tensor]


def weights(outs: int, columns: int) -> torch.Tensor:
    weight = torch.randn(outs, columns, generator=torch.Generator().manual_seed(outs))
    # Exact ties and zeros lie at the borders of cells.
    weight[:, ::3] = (weight[:, ::3] * 4).round() / 4
    return weight


def affine(outs: int, columns: int, group: int, bits: int, symmetric: bool, form: AffineForm) -> AffineQuantizer:
    scheme = AffineScheme(bits=bits, group_size=group, symmetric=symmetric)
    weight = weights(outs, columns)
    start = round_to_nearest(weight * 0.6, scheme, search=False)  # too narrow, so that some weights are clipped
    return AffineQuantizer(weight, start.scales, start.zeros, scheme, form=form)


def dual_binary(outs: int, columns: int, group: int, train_weights: bool = True) -> DualBinaryQuantizer:
    weight = weights(outs, columns)
    scales = search_scales(weight * 0.6, torch.ones(columns), group)
    return DualBinaryQuantizer(weight, scales, DualBinaryScheme(group_size=group), train_weights=train_weights)


def run(quantizer: Quantizer, dtype: torch.dtype) -> Found:
    """The weight, and the gradients of all that trains, of an incoming one that is the same each time."""
    quantizer.zero_grad()
    weight = quantizer(dtype)
    weight.backward(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    gradients = {name: p.grad.clone() for name, p in quantizer.named_parameters() if p.grad is not None}
    return {"weight": weight.detach()} | gradients


def torchs(quantizer: Quantizer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Found:
    with monkeypatch.context() as patch:
        patch.setattr(fake_quantize, "takes", lambda latents, dtype: False)
        return run(quantizer, dtype)


def assert_same(found: Found, wanted: Found) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if name in ("weight", "latents"):
            assert torch.equal(found[name], value), name
        else:  # sums in another order
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5 * float(value.abs().max()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("outs", "columns", "group"), SHAPES)
@pytest.mark.parametrize("train_weights", [True, False])
def test_dual_binary(
    outs: int, columns: int, group: int, train_weights: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = dual_binary(outs, columns, group, train_weights)
    assert_same(run(quantizer, dtype), torchs(quantizer, dtype, monkeypatch))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_affine(bits: int, symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for outs, columns, group in SHAPES:
        for form in (AffineForm(), AffineForm(grid="scales", unit="weight"), AffineForm(grid="fixed")):
            quantizer = affine(outs, columns, group, bits, symmetric, form)
            assert_same(run(quantizer, dtype), torchs(quantizer, dtype, monkeypatch))


def test_clip_ends_beyond_every_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that are too narrow, turned around, or on one side of zero."""
    quantizer = affine(5, 64, 4, 2, False, AffineForm())
    with torch.no_grad():
        quantizer.ends.copy_(4 * torch.randn(quantizer.ends.shape, generator=torch.Generator().manual_seed(3)))
        quantizer.ends[:, 0] = torch.tensor([[1.0], [1.0 + 1e-4]])
    wanted = torchs(quantizer, torch.float32, monkeypatch)
    assert (wanted["ends"] == 0).any()
    assert_same(run(quantizer, torch.float32), wanted)


@pytest.mark.parametrize("make", [dual_binary, lambda *shape: affine(*shape, 2, False, AffineForm())])
def test_any_number_of_threads_gives_the_same(make: Callable[..., Quantizer]) -> None:
    quantizer, before = make(33, 48, 16), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(quantizer, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("make", [dual_binary, lambda *shape: affine(*shape, 2, False, AffineForm(grid="scales"))])
def test_numbers_that_are_not_finite_show(make: Callable[..., Quantizer]) -> None:
    quantizer = make(4, 32, 16)
    with torch.no_grad():
        quantizer.get_parameter("scales").flatten()[0] = torch.nan
    assert quantizer(torch.bfloat16)[0, :16].isnan().all()
    quantizer = make(4, 32, 16)
    quantizer().backward(torch.full((4, 32), torch.inf))
    gradient = quantizer.get_parameter("latents").grad
    assert gradient is not None
    assert not gradient.isfinite().any()


@pytest.mark.parametrize("broken", ["border", "lane", "clip", "scale"])
def test_a_broken_kernel_does_not_pass(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = affine(9, 66, 33, 2, False, AffineForm())
    wanted = torchs(quantizer, torch.bfloat16, monkeypatch)
    forward, back = fake_quantize.affine, fake_quantize.affine_back

    def spoiled(latents: torch.Tensor, *rest: object) -> torch.Tensor:
        if broken == "border":  # cells that begin a little further up
            latents = latents - 0.01
        weight: torch.Tensor = forward(latents, *rest)  # type: ignore[arg-type]
        if broken == "lane":  # the last of a ragged group
            weight[0, 32] = weight[0, 31] + 1
        return weight

    def spoiled_back(*given: object, **wanted: bool) -> object:
        to_latents, to_scales, to_zeros = back(*given, **wanted)  # type: ignore[arg-type]
        if broken == "clip":  # a gradient where there is none
            assert to_latents is not None
            to_latents[to_latents == 0] = 1e-6
        return to_latents, to_scales * (1.001 if broken == "scale" else 1), to_zeros

    monkeypatch.setattr(fake_quantize, "affine", spoiled)
    monkeypatch.setattr(fake_quantize, "affine_back", spoiled_back)
    with pytest.raises(AssertionError):
        assert_same(run(quantizer, torch.bfloat16), wanted)
