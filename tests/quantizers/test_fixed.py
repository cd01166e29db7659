import pytest
import torch

from tests.kernels.matrices import random_matrix
from ulbq import formats
from ulbq.config.groups import Zeros
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme, TrellisScheme, affine, dual_binary
from ulbq.kernels import build, fake_quantize, trellis
from ulbq.methods.rtn import pack_codes
from ulbq.quantizers.base import Quantizer
from ulbq.quantizers.binary_mos import BinaryMosQuantizer, closed_form_start
from ulbq.quantizers.fixed import FixedAffine, FixedBinaryMos, FixedDualBinary, FixedTrellis
from ulbq.solvers.rtn import round_to_nearest

AFFINE = [
    AffineScheme(bits=bits, group_size=16, symmetric=symmetric) for bits in (1, 2, 3, 4, 8) for symmetric in (0, 1)
]
AFFINE += [AffineScheme(bits=2, group_size=16, symmetric=True, mid_rise=True)]


def weight() -> torch.Tensor:
    return torch.randn(12, 32, generator=torch.Generator().manual_seed(0))


def packed(scheme: AnyScheme) -> dict[str, torch.Tensor]:
    if isinstance(scheme, AffineScheme):
        return pack_codes("up", scheme, round_to_nearest(weight(), scheme))
    assert isinstance(scheme, DualBinaryScheme)
    planes = torch.rand(2, 12, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    return dual_binary.pack(scheme, planes, torch.stack([weight()[:, :2].abs() + 1, -weight()[:, 2:4].abs() - 0.1]))


def made(scheme: AnyScheme) -> Quantizer:
    kind: type[Quantizer] = FixedAffine if isinstance(scheme, AffineScheme) else FixedDualBinary
    return kind.from_packed(weight(), packed(scheme), scheme, train_weights=False)


@pytest.mark.parametrize("scheme", [*AFFINE, DualBinaryScheme(group_size=16)], ids=lambda scheme: scheme.label)
def test_codes_stay_and_scales_train(scheme: AnyScheme) -> None:
    quantizer, before = made(scheme), packed(scheme)
    torch.testing.assert_close(quantizer(), formats.dequantize(scheme, before, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.finalize().items())
    [scales] = quantizer.trainable()["scales"]
    assert quantizer.trainable()["weights"] == []
    # Far more than rounding to other codes would survive.
    with torch.no_grad():
        scales.mul_(torch.linspace(0.5, 2, scales.numel()).view(scales.shape))
    after = quantizer.finalize()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"scales"}
    torch.testing.assert_close(quantizer(), formats.dequantize(scheme, after, 32), rtol=2e-3, atol=2e-3)  # float16


@pytest.mark.parametrize("scheme", [AFFINE[2], AFFINE[3], DualBinaryScheme(group_size=16)], ids=lambda s: s.label)
def test_the_gradient_of_a_scale_is_what_it_multiplies(scheme: AnyScheme) -> None:
    quantizer = made(scheme).double()
    [scales] = quantizer.trainable()["scales"]

    def product(values: torch.Tensor) -> torch.Tensor:
        result = torch.func.functional_call(quantizer, {"scales": values}, (torch.float64,))
        assert isinstance(result, torch.Tensor)
        return result

    assert torch.autograd.gradcheck(product, scales.detach().requires_grad_(True))


def test_codes_that_would_train_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed"):
        FixedAffine.from_packed(weight(), packed(AFFINE[0]), AFFINE[0])


ASYMMETRIC = [scheme for scheme in AFFINE if not scheme.symmetric]


def with_zeros(scheme: AffineScheme) -> FixedAffine:
    return FixedAffine.from_packed(weight(), packed(scheme), scheme, train_weights=False).let_zeros_train()


@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=lambda scheme: scheme.label)
def test_zero_points_that_moved_are_packed_as_the_nearest_integers(scheme: AffineScheme) -> None:
    quantizer, before, top = with_zeros(scheme), packed(scheme), 2**scheme.bits - 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.finalize().items())
    [zeros] = quantizer.trainable()["zeros"]
    stored = zeros.detach().clone()
    with torch.no_grad():
        zeros.add_(torch.linspace(-2, 2, zeros.numel()).view(zeros.shape))
    after = quantizer.finalize()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"zeros"}
    expected = (stored + torch.linspace(-2, 2, zeros.numel()).view(zeros.shape)).round().clamp(0, top)
    assert torch.equal(affine.unpack(scheme, after, 32)[2], expected)
    torch.testing.assert_close(quantizer(), formats.dequantize(scheme, after, 32), rtol=2e-3, atol=2e-3)
    again = FixedAffine.from_packed(weight(), after, scheme, train_weights=False).let_zeros_train()
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.finalize().items())


def test_the_gradient_of_a_zero_point_passes_straight_through() -> None:
    quantizer = with_zeros(AFFINE[2])
    [zeros], [scales] = quantizer.trainable()["zeros"], quantizer.trainable()["scales"]
    with torch.no_grad():
        zeros[0, 0] = 9.0  # beyond the border, from where it must find back
        scales.mul_(1.5)
    incoming = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    (quantizer() * incoming).sum().backward()
    absolute = packed(AFFINE[2])["scales"].float() * 1.5
    torch.testing.assert_close(zeros.grad, -incoming.view(12, 2, 16).sum(-1) * absolute)


def test_symmetric_grids_have_no_zero_points_to_train() -> None:
    with pytest.raises(ValueError, match="no zero points"):
        with_zeros(AFFINE[3])


def test_a_group_of_zeros_stays_one() -> None:
    scheme, dense = AFFINE[2], weight()
    dense[0, :16] = 0
    before = pack_codes("up", scheme, round_to_nearest(dense, scheme))
    before["scales"][0, 0] = 0
    quantizer = FixedAffine.from_packed(dense, before, scheme, train_weights=False)
    assert torch.equal(quantizer.finalize()["scales"], before["scales"])
    assert (quantizer()[0, :16].abs() < 1e-6).all()


def test_nothing_unpacked_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        made(AFFINE[2])(torch.bfloat16)
    assert sum(kept) < weight().numel() / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [*AFFINE, DualBinaryScheme(group_size=16)], ids=lambda scheme: scheme.label)
def test_compiled_and_torch_agree(scheme: AnyScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.unavailable_reason():
        pytest.skip(str(build.unavailable_reason()))
    incoming = torch.randn(12, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(fake_quantize, "takes_planes", lambda *given, now=compiled: now)
        quantizer = made(scheme)
        if isinstance(quantizer, FixedAffine) and not scheme.symmetric:
            quantizer.let_zeros_train()
        result = quantizer(dtype)
        result.backward(incoming)
        found.append([result, *(p.grad for parameters in quantizer.trainable().values() for p in parameters)])
    (result, *gradients), (expected, *others) = found
    assert torch.equal(result, expected)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [8, 16])
def test_groups_that_are_not_whole_lanes_are_torchs(group_size: int) -> None:
    quantizer = made(AffineScheme(bits=2, group_size=group_size))
    planes, [scales] = quantizer.get_buffer("packed_codes"), quantizer.trainable()["scales"]
    served = fake_quantize.takes_planes(planes, scales, 32, torch.bfloat16)
    assert served == (group_size == 16 and not build.unavailable_reason())
    assert not fake_quantize.takes_planes(planes, scales.double(), 32, torch.bfloat16)
    assert not fake_quantize.takes_planes(planes, scales, 31, torch.bfloat16)


@pytest.mark.parametrize("zeros", ["none", "output", "input"])
@pytest.mark.parametrize("experts", [1, 3])
def test_signs_that_stay_are_held_packed_and_compute_the_same(zeros: Zeros, experts: int) -> None:
    torch.manual_seed(3)
    scheme, weight, x = BinaryMosScheme(experts=experts, zeros=zeros), torch.randn(24, 40), torch.randn(5, 40)
    generator = torch.Generator().manual_seed(0)
    start = closed_form_start(weight, scheme, generator=generator)
    packed = BinaryMosQuantizer(weight, start, scheme).finalize()
    frozen = BinaryMosQuantizer.from_packed(weight, packed, scheme, train_weights=False)
    fixed = FixedBinaryMos.from_packed(weight, packed, scheme, train_weights=False)
    gradients = []
    for quantizer in (frozen, fixed):
        product = quantizer.multiply(x, quantizer())
        product.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in quantizer.named_parameters()})
    assert torch.equal(frozen.multiply(x, frozen()), fixed.multiply(x, fixed()))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name]), name
    assert [*map(len, fixed.trainable().values())] == [*map(len, frozen.trainable().values())]
    stored = fixed.finalize()
    assert stored.keys() == packed.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in packed.items())
    fixed.check_product("layer", stored)
    assert not any(buffer.is_floating_point() and buffer.shape == weight.shape for buffer in fixed.buffers())
    with pytest.raises(ValueError, match="fixed"):
        FixedBinaryMos.from_packed(weight, packed, scheme, train_weights=True)


TRELLIS = TrellisScheme(bits=2)


def trellis_of(stored: dict[str, torch.Tensor]) -> FixedTrellis:
    return FixedTrellis.from_packed(torch.empty(48, 64, device="meta"), stored, TRELLIS, train_weights=False)


@pytest.fixture(params=["compiled", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(trellis, "unavailable_reason", lambda: "not wanted")
    elif reason := build.unavailable_reason():
        pytest.skip(reason)


@pytest.mark.usefixtures("either")
def test_trellis_codes_stay_and_both_vectors_train() -> None:
    before = random_matrix(TRELLIS, 48, 64)
    quantizer = trellis_of(before)
    assert {name: list(t.shape) for name, t in quantizer.finalize().items()} == {
        n: list(t.shape) for n, t in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.finalize().items())
    torch.testing.assert_close(quantizer.dense(quantizer()), formats.dequantize(TRELLIS, before, 64))
    vectors = quantizer.trainable()["scales"]
    assert quantizer.trainable()["weights"] == []
    with torch.no_grad():
        for vector in vectors:
            vector.mul_(torch.linspace(0.5, 2, len(vector)))
    after = quantizer.finalize()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"su", "sv"}
    weight = formats.dequantize(TRELLIS, after, 64)
    torch.testing.assert_close(quantizer.dense(quantizer()), weight, rtol=2e-3, atol=2e-3)  # float16
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quantizer.multiply(x, quantizer()), x @ weight.T, rtol=2e-3, atol=2e-3)
    # All that lies in memory is as large as what is stored.
    assert sum(buffer.nbytes for buffer in quantizer.buffers()) == sum(tensor.nbytes for tensor in before.values())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_the_transforms_are_those_of_the_dense_weight(dtype: torch.dtype) -> None:
    quantizer = trellis_of(random_matrix(TRELLIS, 48, 64))
    leaves = [torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()]
    leaves += quantizer.trainable()["scales"]
    grad = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(quantizer.multiply(leaves[0], quantizer(dtype)), leaves, grad)
    wanted = torch.autograd.grad(leaves[0].float() @ quantizer.dense(quantizer()).T, leaves, grad.float())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * other.norm()


def test_a_vector_of_zeros_trains_from_a_floor_and_no_code_trains() -> None:
    stored = random_matrix(TRELLIS, 48, 64)
    quantizer = trellis_of(stored | {"su": torch.zeros_like(stored["su"])})
    assert not quantizer.finalize()["su"].any()
    assert quantizer.dense(quantizer()).abs().max() > 0
    with pytest.raises(ValueError, match="fixed"):
        FixedTrellis.from_packed(torch.empty(48, 64, device="meta"), stored, TRELLIS)
