"""The Triton kernels: values, gradients, opcheck. In the interpreter here, and under ``-m gpu`` on a real GPU.

The interpreter gets bfloat16 arithmetic wrong without a word, so that it is tested on GPUs only, and is slow: matrices
are small, and one of each kind.
"""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from tests.formats.columns import random_columns
from tests.kernels.matrices import assert_near, exact, in_layout, multiply, named, random_matrix
from ulbq import kernels
from ulbq.formats import (
    AffineScheme,
    AnyScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    TrellisScheme,
    codebook,
    dequantize,
    trellis,
)
from ulbq.kernels import block_sizes, dispatch, solvers, trellis_launch, triton_launch, words
from ulbq.kernels.block_sizes import DenseRows
from ulbq.kernels.ops import binary_mos, linear
from ulbq.nn.quant_linear import QuantLinear

NO_INTERPRETER = (
    triton_launch.unavailable_reason() or "kernels are compiled in this process: TRITON_INTERPRET=1 is not set"
)
NO_GPU = triton_launch.unavailable_reason() or "no CUDA device"
GPU = bool(torch.cuda.is_available() and not triton_launch.unavailable_reason() and not triton_launch.interpreted())
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not triton_launch.interpreted(), reason=NO_INTERPRETER)),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason=NO_GPU)]),
]
on_devices = pytest.mark.parametrize("device", DEVICES)

OUTS = 70
MIXED = [2] * 31 + [4] * 5 + [3] * 7 + [2] * 20
# The columns of each: whole spans where groups want it, else neither whole words nor whole bytes.
SCHEMES: list[tuple[AnyScheme, int]] = [
    (AffineScheme(bits=1, group_size=32), 96),
    (AffineScheme(bits=1, group_size=64, symmetric=True), 128),
    (AffineScheme(bits=2, group_size=64), 192),
    (AffineScheme(bits=2, group_size=-1), 75),
    (AffineScheme(bits=2, group_size=32, symmetric=True, mid_rise=True), 96),
    (AffineScheme(bits=3, group_size=32), 96),
    (AffineScheme(bits=3, group_size=128), 256),
    (AffineScheme(bits=4, group_size=128, symmetric=True), 128),
    (AffineScheme(bits=4, group_size=-1), 203),
    (DualBinaryScheme(group_size=32), 96),
    (DualBinaryScheme(group_size=-1), 75),
    (BinaryMosScheme(experts=4, zeros="output"), 75),
    (BinaryMosScheme(experts=3, zeros="input"), 128),
    (BinaryMosScheme(experts=1), 64),
]
ROWS = (1, 3, 17, 70)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing wrote to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def in_words(scheme: AnyScheme, stored: dict[str, torch.Tensor], columns: int, device: str = "cpu") -> kernels.Ready:
    moved = {name: tensor.to(device) for name, tensor in stored.items()}
    return in_layout("triton", scheme, moved, OUTS, columns)


def fresh(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(rows, columns).to(device, dtype)


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.float16] + [torch.bfloat16] * (device == "cuda")


def codebooks(outliers: int) -> tuple[CodebookScheme, dict[str, torch.Tensor]]:
    scheme, made = random_columns(OUTS, MIXED, outliers)
    return scheme, codebook.pack(scheme, made)


def check(scheme: AnyScheme, stored: dict[str, torch.Tensor], columns: int, device: str, rows: int) -> None:
    """Values and the gradient of the input against float64, in every dtype."""
    ready = in_words(scheme, stored, columns, device)
    # Dense tiles of floating weights are rounded to the dtype of the activations, and a mixture's at several places.
    slack = 4 if isinstance(scheme, BinaryMosScheme) else 2
    for dtype in dtypes(device):
        x = fresh(rows, columns, dtype, device)
        assert_near(multiply(scheme, ready, x, OUTS).cpu(), exact(scheme, stored, x.cpu()), dtype, slack)


def check_gradient(scheme: AnyScheme, stored: dict[str, torch.Tensor], columns: int, device: str) -> None:
    ready = in_words(scheme, stored, columns, device)
    for dtype in dtypes(device):
        x = fresh(17, columns, dtype, device).requires_grad_()
        y = multiply(scheme, ready, x, OUTS)
        wide = x.detach().cpu().double().requires_grad_()
        wanted = exact(scheme, stored, wide)
        assert_near(y.cpu(), wanted, dtype, slack=4)
        grad = torch.randn(y.shape).to(dtype)
        (found,) = torch.autograd.grad(y, x, grad.to(device))
        (should,) = torch.autograd.grad(wanted, wide, grad.double())
        assert_near(found.cpu(), should, dtype, slack=8 if isinstance(scheme, BinaryMosScheme) else 2)


@on_devices
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("scheme", "columns"), SCHEMES, ids=lambda v: getattr(v, "label", str(v)))
def test_products(scheme: AnyScheme, columns: int, rows: int, device: str) -> None:
    check(scheme, random_matrix(scheme, OUTS, columns, seed=rows), columns, device, rows)


@on_devices
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outliers", [0, 40])
def test_products_with_column_codebooks(outliers: int, rows: int, device: str) -> None:
    scheme, stored = codebooks(outliers)
    check(scheme, stored, len(MIXED), device, rows)


@on_devices
@pytest.mark.parametrize(("scheme", "columns"), SCHEMES[::2], ids=lambda v: getattr(v, "label", str(v)))
def test_the_gradient_of_the_input(scheme: AnyScheme, columns: int, device: str) -> None:
    check_gradient(scheme, random_matrix(scheme, OUTS, columns), columns, device)


@on_devices
@pytest.mark.parametrize("outliers", [0, 40])
def test_the_gradient_through_column_codebooks(outliers: int, device: str) -> None:
    scheme, stored = codebooks(outliers)
    check_gradient(scheme, stored, len(MIXED), device)


# Blocks of 16, 64 and 128 columns; neither whole programs across nor whole shares down.
TRELLISES = [(1, 16, 80, 192), (2, 12, 48, 576), (2, 16, 128, 48), (3, 12, 80, 80), (4, 16, 48, 128)]


@on_devices
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("bits", "state_bits", "outs", "columns"), TRELLISES)
def test_products_with_trellis_codes(
    bits: int, state_bits: int, outs: int, columns: int, rows: int, device: str
) -> None:
    scheme = TrellisScheme(bits=bits, state_bits=state_bits)
    stored = random_matrix(scheme, outs, columns, seed=rows)
    moved = {name: tensor.to(device) for name, tensor in stored.items()}
    ready = in_layout("triton", scheme, moved, outs, columns)
    for dtype in dtypes(device):
        x = fresh(rows, columns, dtype, device)
        # Between the transforms inputs and weights are rounded to their dtype.
        assert_near(multiply(scheme, ready, x, outs).cpu(), exact(scheme, stored, x.cpu()), dtype, slack=2)


@on_devices
@pytest.mark.parametrize(("bits", "state_bits", "outs", "columns"), TRELLISES)
def test_the_gradient_through_trellis_codes(bits: int, state_bits: int, outs: int, columns: int, device: str) -> None:
    scheme = TrellisScheme(bits=bits, state_bits=state_bits)
    stored = random_matrix(scheme, outs, columns)
    moved = {name: tensor.to(device) for name, tensor in stored.items()}
    ready = in_layout("triton", scheme, moved, outs, columns)
    for dtype in dtypes(device):
        x = fresh(17, columns, dtype, device).requires_grad_()
        y = multiply(scheme, ready, x, outs)
        wide = x.detach().cpu().double().requires_grad_()
        grad = torch.randn(y.shape).to(dtype)
        (found,) = torch.autograd.grad(y, x, grad.to(device))
        (should,) = torch.autograd.grad(exact(scheme, stored, wide), wide, grad.double())
        assert_near(found.cpu(), should, dtype, slack=2)


@on_devices
@pytest.mark.skipif(solvers.slow_reason(torch.device("cpu")) is not None, reason="no compiled solvers here")
@pytest.mark.parametrize(("bits", "state_bits"), [(1, 12), (2, 12), (3, 12), (4, 12), (2, 16)])
def test_the_search_for_trellis_codes_finds_those_of_the_cpu(bits: int, state_bits: int, device: str) -> None:
    sequences = torch.randn(2, 24 if device == "cpu" else 256, generator=torch.Generator().manual_seed(bits))
    values = trellis.values(state_bits)
    found = trellis_launch.search(sequences.to(device), bits, state_bits, values.to(device))
    wanted = solvers.trellis_codes(sequences, bits, state_bits, values)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@on_devices
def test_zero_points_between_the_codes(device: str) -> None:
    scheme = AffineScheme(bits=2, group_size=32)
    stored = random_matrix(scheme, OUTS, 96) | {"zeros": 3 * torch.rand(OUTS, 3)}
    ready = in_words(scheme, stored, 96, device)
    codes = dequantize(
        AffineScheme(bits=2, group_size=-1, symmetric=True), stored | {"scales": torch.ones(OUTS, 1)}, 96
    )
    weight = ((codes + 2).view(OUTS, 3, 32) - stored["zeros"][..., None]).double() * stored["scales"][
        ..., None
    ].double()
    for rows in (2, 20):
        x = fresh(rows, 96, torch.float32, device)
        found = multiply(scheme, ready, x, OUTS)
        assert_near(found.cpu(), x.cpu().double() @ weight.flatten(1).T, torch.float32)


@on_devices
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("scheme", [*(AffineScheme(bits=bits, group_size=64) for bits in (1, 2, 3, 4)), SCHEMES[-5][0]])
def test_pairs_of_activations_lose_next_to_nothing(scheme: AnyScheme, rows: int, device: str) -> None:
    """Codes keep what lies in front of them in a mantissa until the end. Before the result is rounded it shows."""
    stored = random_matrix(scheme, OUTS, 128)
    packed = in_words(scheme, stored, 128, device).tensors
    part = linear.matrix(scheme, "words", packed, OUTS, 128).part
    # One behind the beginning of a word no two are in one.
    apart = fresh(1, rows * 128 + 1, torch.float16, device)[0, 1:].view(rows, 128)
    for x, pairs in ((apart.clone(), True), (apart, False)):
        cut = triton_launch.cut_of(part, "vector", [rows], OUTS, x)
        assert triton_launch.loads(x, part, cut)["PAIRS"] == pairs
        found = triton_launch.multiply(x, [part], OUTS, dtype=torch.float32).cpu()
        wanted = exact(scheme, stored, x.cpu())
        # Up to 1e-5 was measured; float16 rounds to 3e-4.
        assert (found - wanted).norm() <= (3e-5 if pairs else 5e-7) * wanted.norm()


@on_devices
@pytest.mark.parametrize("slab", [1 << 26, 1])
@pytest.mark.parametrize(("scheme", "columns"), [*SCHEMES[2::2], (None, len(MIXED))], ids=str)
def test_many_rows_take_a_dense_weight(
    scheme: AnyScheme | None, columns: int, slab: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and some outputs at a time."""
    monkeypatch.setattr(triton_launch, "dense_rows", lambda *_: DenseRows(16, 8))
    monkeypatch.setattr(triton_launch, "SLAB", slab)
    kind, stored = codebooks(40) if scheme is None else (scheme, random_matrix(scheme, OUTS, columns))
    with patch.object(triton_launch, "_matrix", side_effect=AssertionError):
        check(kind, stored, columns, device, 17)
        check_gradient(kind, stored, columns, device)


@on_devices
@pytest.mark.parametrize("slab", [1 << 26, 1])
def test_many_rows_take_the_elements_of_a_trellis(slab: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = TrellisScheme(bits=2)
    outs, columns = 144, 96
    stored = random_matrix(scheme, outs, columns)
    moved = {name: tensor.to(device) for name, tensor in stored.items()}
    ready = in_layout("triton", scheme, moved, outs, columns)
    x = fresh(17, columns, torch.float32, device).requires_grad_()
    wide = x.detach().cpu().double().requires_grad_()
    wanted = exact(scheme, stored, wide)
    (should,) = torch.autograd.grad(wanted.sum(), wide)
    monkeypatch.setattr(triton_launch, "dense_rows", lambda *_: DenseRows(16, 8))
    monkeypatch.setattr(trellis_launch, "SLAB", slab)
    with patch.object(trellis_launch, "cut_of", side_effect=AssertionError):
        product = multiply(scheme, ready, x, outs)
        (found,) = torch.autograd.grad(product.sum(), x)
    assert_near(product.cpu(), wanted, torch.float32, slack=2)
    assert_near(found.cpu(), should, torch.float32, slack=2)


@on_devices
@pytest.mark.parametrize("scheme", [TrellisScheme(bits=2), BinaryMosScheme(experts=2, zeros="none")], ids=str)
def test_many_large_rows_of_float16(scheme: AnyScheme, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs and elements of a trellis make sums of them that are beyond float16, before scales make these small."""
    outs, columns = 144, 96
    stored = random_matrix(scheme, outs, columns)
    if isinstance(scheme, TrellisScheme):
        stored |= {"su": stored["su"].sign(), "sv": torch.full((outs,), 0.02).half()}
    else:
        shapes = {name: stored[name].shape for name in ("in_scales", "out_scales")}
        stored |= {"in_scales": torch.ones(shapes["in_scales"]).half()}
        stored |= {"out_scales": torch.full(shapes["out_scales"], 0.02).half()}
    ready = in_layout("triton", scheme, {name: tensor.to(device) for name, tensor in stored.items()}, outs, columns)
    x = (6000 * fresh(17, columns, torch.float32, device)).half()
    monkeypatch.setattr(triton_launch, "dense_rows", lambda *_: DenseRows(16, 8))
    assert_near(multiply(scheme, ready, x, outs).cpu(), exact(scheme, stored, x.cpu()), torch.float16, slack=4)


def test_a_dense_weight_that_is_kept_is_taken_from_fewer_rows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept = block_sizes.dense_rows("", 2)
    assert kept < made
    monkeypatch.setattr(dispatch, "best", lambda *_: named("triton"))
    scheme = AffineScheme(bits=2, group_size=64)
    stored = random_matrix(scheme, OUTS, 64)
    layer = QuantLinear(scheme, 64, OUTS, cache=True)
    layer.assign(stored)
    with patch.object(triton_launch, "multiply", side_effect=AssertionError):
        with pytest.raises(AssertionError):
            layer(torch.zeros(kept - 1, 64))
        assert layer.cached_bytes == 0
        x = torch.randn(kept, 64)
        assert_near(layer(x), exact(scheme, stored, x), torch.float32)
    assert layer.cached_bytes == 4 * 64 * OUTS


@on_devices
def test_opcheck(device: str) -> None:
    """One operator has all formats: with as few tensors as any and with most of them."""
    x = fresh(3, 128, torch.float32, device).requires_grad_()
    scheme = AffineScheme(bits=2, group_size=64)
    packed = in_words(scheme, random_matrix(scheme, OUTS, 128), 128, device).tensors
    torch.library.opcheck(linear.packed_linear, (x, *linear.arguments(scheme, "words", packed, 128), OUTS))
    signs = BinaryMosScheme(experts=2, zeros="input")
    packed = in_words(signs, random_matrix(signs, OUTS, 128), 128, device).tensors
    names = "word_codes", "word_scales", "in_scales", "out_scales", "router", "zeros"
    torch.library.opcheck(binary_mos.binary_mos_linear, (x.detach(), *(packed[name] for name in names), "input"))
    columns, stored = codebooks(9)
    packed = in_words(columns, stored, len(MIXED), device).tensors
    x = fresh(3, len(MIXED), torch.float32, device).requires_grad_()
    torch.library.opcheck(linear.packed_linear, (x, *linear.arguments(columns, "words", packed, len(MIXED)), OUTS))


@on_devices
def test_other_shapes_of_inputs(device: str) -> None:
    scheme = AffineScheme(bits=3, group_size=32)
    stored = random_matrix(scheme, OUTS, 64)
    ready = in_words(scheme, stored, 64, device)
    x = torch.randn(64, 2, 3, device=device).permute(2, 1, 0)
    assert_near(multiply(scheme, ready, x, OUTS).cpu(), exact(scheme, stored, x.cpu()), torch.float32)
    assert multiply(scheme, ready, x[:0], OUTS).shape == (0, 2, OUTS)
    assert multiply(scheme, ready, x[0, 0], OUTS).shape == (OUTS,)
    wide = x.double().requires_grad_()
    product = multiply(scheme, ready, wide, OUTS)
    assert (product.cpu() - exact(scheme, stored, wide.cpu())).norm() < 1e-12 * product.norm()


@pytest.mark.skipif(not triton_launch.interpreted(), reason=NO_INTERPRETER)
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("broken", ["zero", "last span", "scale", "high bit"])
def test_a_broken_kernel_does_not_pass(broken: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks fail where a zero point is off by one, columns are left out, a scale or a bit is wrong."""
    scheme, columns = AffineScheme(bits=3, group_size=64), 192
    stored = random_matrix(scheme, OUTS, columns)
    check(scheme, stored, columns, "cpu", rows)
    whole, cut = triton_launch.part, triton_launch.cut_of

    def spoiled(*arguments: object) -> triton_launch.Part:
        made = whole(*arguments)  # type: ignore[arg-type]
        assert made.scales is not None
        assert made.zeros is not None
        if broken == "zero":
            return made._replace(zeros=made.zeros + (torch.arange(made.zeros.numel()).view_as(made.zeros) == 7))
        if broken == "scale":  # of the group before
            return made._replace(scales=made.scales.roll(1, 0))
        if broken == "high bit":
            codes = made.codes.clone()
            codes[0, 2, 5] ^= 1 << 3
            return made._replace(codes=codes)
        return made

    monkeypatch.setattr(triton_launch, "part", spoiled)
    if broken == "last span":
        monkeypatch.setattr(triton_launch, "cut_of", lambda *a: (found := cut(*a))._replace(spans=found.spans - 1))
    with pytest.raises(AssertionError):
        check(scheme, stored, columns, "cpu", rows)
    with pytest.raises(AssertionError):
        check_gradient(scheme, stored, columns, "cpu")


@pytest.mark.skipif(not triton_launch.interpreted(), reason=NO_INTERPRETER)
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("name", ["word_codes", "su", "sv"])
def test_one_wrong_word_or_scale_of_a_trellis_is_seen(name: str, rows: int) -> None:
    scheme = TrellisScheme(bits=2)
    stored = random_matrix(scheme, 48, 64)
    ready = in_layout("triton", scheme, stored, 48, 64)
    ready.tensors[name] = ready.tensors[name].clone()
    ready.tensors[name].view(-1)[3] = 5
    x = fresh(rows, 64, torch.float32, "cpu")
    with pytest.raises(AssertionError):
        assert_near(multiply(scheme, ready, x, 48), exact(scheme, stored, x), torch.float32, slack=2)


@pytest.mark.skipif(not triton_launch.interpreted(), reason=NO_INTERPRETER)
@pytest.mark.parametrize("broken", ["gate", "level", "outlier", "plane"])
def test_other_broken_kernels_do_not_pass_either(broken: str) -> None:
    if broken == "gate":
        scheme, columns = SCHEMES[-2]
        name, stored = "in_scales", random_matrix(scheme, OUTS, columns)
    elif broken == "plane":
        scheme, columns = SCHEMES[-5]
        name, stored = "word_scales", random_matrix(scheme, OUTS, columns)
    else:
        scheme, stored = codebooks(40)
        columns, name = len(MIXED), "word_levels" if broken == "level" else "outlier_deltas"
    ready = in_words(scheme, stored, columns)
    ready.tensors[name] = ready.tensors[name].clone()
    ready.tensors[name].view(-1)[3] += 0.25
    x = fresh(2, columns, torch.float32, "cpu")
    with pytest.raises(AssertionError):
        assert_near(multiply(scheme, ready, x, OUTS), exact(scheme, stored, x), torch.float32, slack=4)


@on_devices
@pytest.mark.parametrize("scheme", [SCHEMES[2][0], DualBinaryScheme(), BinaryMosScheme()], ids=lambda s: s.label)
def test_a_layer(scheme: AnyScheme, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the layout, gives its stored tensors back, and compiles to one graph."""
    monkeypatch.setattr(dispatch, "best", lambda *_: named("triton"))
    stored = random_matrix(scheme, OUTS, 128)
    layer = QuantLinear(scheme, 128, OUTS, bias=True)
    layer.assign(stored)
    layer.to(device)
    x = fresh(3, 128, torch.float32, device)
    eager = layer(x)
    assert layer._ready().layout.name == "triton"
    assert_near(eager.cpu(), exact(scheme, stored, x.cpu()), torch.float32, slack=4)
    assert layer.state_dict().keys() - {"bias"} == stored.keys()
    assert all(torch.equal(layer.tensors()[name].cpu(), tensor) for name, tensor in stored.items())
    assert_near(layer.weight_dense(torch.float32).cpu(), dequantize(scheme, stored, 128), torch.float32)
    torch._dynamo.reset()  # it compiles a forward pass so many times and no more, over all tests
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x).cpu(), eager.cpu(), torch.float32)


def test_without_triton_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_launch.unavailable_reason.cache_clear()
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda _: None)
    case = kernels.Case(AffineScheme(bits=2), 64, 128, "cuda", torch.float16, 1)
    choice = kernels.choose(case)
    monkeypatch.undo()
    triton_launch.unavailable_reason.cache_clear()
    assert choice.layout.name == "dense"
    assert choice.passed_over["triton"] == "the package triton is not installed"


@pytest.mark.skipif(
    triton_launch.unavailable_reason() is not None, reason=triton_launch.unavailable_reason() or "installed"
)
@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        (AffineScheme(bits=2), torch.bfloat16, ""),
        (CodebookScheme(), torch.float32, ""),
        (AffineScheme(bits=8), torch.float16, "8 bits: at most 4"),
        (AffineScheme(bits=2, group_size=16), torch.float16, "groups of 16: a multiple of 32"),
        (AffineScheme(bits=2), torch.float64, "float64 activations: float32, bfloat16 or float16"),
    ],
)
def test_the_row_of_the_table(scheme: AnyScheme, dtype: torch.dtype, reason: str) -> None:
    choice = kernels.choose(kernels.Case(scheme, 64, 128, "cuda", dtype, 1))
    assert choice.passed_over.get("triton", "") == reason
    assert choice.layout.name == ("dense" if reason else "triton")


def test_words_of_padded_columns_hold_nothing_else() -> None:
    scheme = AffineScheme(bits=2, group_size=-1)
    made = words.pack(scheme, random_matrix(scheme, OUTS, 75), OUTS, 75)
    assert made["word_codes"].shape == (128 // 32, 2, 128)
    assert not made["word_codes"][3].any()
    assert not made["word_codes"][..., OUTS:].any()
