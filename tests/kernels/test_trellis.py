"""Trellis codes decoded while they are multiplied: values, gradients, opcheck, and the dense weight."""

import pytest
import torch

from tests.kernels.matrices import assert_near, changed, exact, matrix, multiply, random_matrix
from ulbq import formats, kernels
from ulbq.formats import TrellisScheme
from ulbq.formats import trellis as form_of
from ulbq.kernels import build, trellis
from ulbq.kernels.ops import linear
from ulbq.nn.quant_linear import QuantLinear

SCHEMES = [TrellisScheme(bits=bits, state_bits=state) for bits in (1, 2, 3, 4) for state in (12, 16)]
# Whole units of 128 outputs, none, ragged ones; chunks of 64 columns that are not whole.
SHAPES = [(16, 16), (48, 576), (576, 192), (192, 1536), (272, 80)]
by_label = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
compiled = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@compiled
@by_label
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(scheme: TrellisScheme, shape: tuple[int, int]) -> None:
    outs, columns = shape
    stored = random_matrix(scheme, outs, columns)
    ready = kernels.prepare(scheme, stored, outs, columns)
    assert ready.layout.name == "trellis"
    for dtype in trellis.FLOATS:
        for rows in (1, 2, 4, 7, 200):
            x = inputs(rows, columns, dtype)
            assert_near(multiply(scheme, ready, x, outs), exact(scheme, stored, x), dtype)


@compiled
@by_label
def test_dense_weights_are_those_of_the_reference_bit_for_bit(scheme: TrellisScheme) -> None:
    for outs, columns in SHAPES:
        stored = random_matrix(scheme, outs, columns)
        ready = kernels.prepare(scheme, stored, outs, columns)
        inner = form_of.inner_matrix(scheme, form_of.unpack(scheme, stored).codes)
        mixed = form_of.is_mixed(outs) or form_of.is_mixed(columns)  # whose sums have another order
        for dtype in (*trellis.FLOATS, torch.float64):
            wanted = formats.dequantize(scheme, stored, columns, dtype)
            found = matrix(scheme, ready, outs, columns, dtype)
            if mixed and dtype != torch.float64:
                assert_near(found, wanted, dtype)
            else:
                assert torch.equal(found, wanted)
            if dtype in trellis.FLOATS:
                assert torch.equal(trellis.inner_matrix(scheme, stored["codes"], dtype), inner.to(dtype))


@compiled
def test_slabs_are_parts_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = TrellisScheme(bits=1)
    codes = random_matrix(scheme, 208, 96)["codes"]
    whole = trellis.inner_matrix(scheme, codes, torch.float32)
    monkeypatch.setattr(trellis, "SLAB", 1)
    parts = list(trellis.slabs(scheme, codes, torch.float32))
    assert len(parts) == 7
    assert torch.equal(torch.cat([some for _, some in parts]), whole)


@compiled
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", ["codes", "su", "sv"])
def test_one_wrong_word_or_scale_is_seen(name: str, rows: int) -> None:
    scheme, stored = SCHEMES[2], random_matrix(SCHEMES[2], 48, 64)
    ready = kernels.prepare(scheme, stored, 48, 64)
    spoiled = changed(ready.tensors, name, 255 - int(stored[name].view(-1)[0]) if name == "codes" else 0.5)
    x = inputs(rows, 64)
    with pytest.raises(AssertionError):
        assert_near(multiply(scheme, ready._replace(tensors=spoiled), x, 48), exact(scheme, stored, x), torch.float32)


@compiled
def test_inputs_of_very_different_sizes_and_shares_of_one_sign() -> None:
    """64 columns share a factor; what all inputs have in common is taken off the sums of bytes exactly."""
    scheme, stored = SCHEMES[3], random_matrix(SCHEMES[3], 128, 512)
    ready = kernels.prepare(scheme, stored, 128, 512)
    sizes = torch.logspace(-4, 4, 8).repeat_interleave(64)
    for x in (inputs(3, 512) * sizes, torch.ones(3, 512), torch.zeros(3, 512)):
        assert_near(multiply(scheme, ready, x, 128), exact(scheme, stored, x), torch.float32, slack=4)


@compiled
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_row_with_what_is_not_finite_is_nan_and_no_other(value: float, rows: int) -> None:
    scheme, stored = SCHEMES[3], random_matrix(SCHEMES[3], 48, 192)
    ready = kernels.prepare(scheme, stored, 48, 192)
    x = inputs(rows, 192)
    x[0, 100] = value
    found = multiply(scheme, ready, x, 48)
    assert found[0].isnan().all()
    assert not found[1:].isnan().any()


@compiled
@by_label
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_results(scheme: TrellisScheme, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, x = random_matrix(scheme, 576, 192), inputs(9, 192)
    ready = kernels.prepare(scheme, stored, 576, 192)
    alone = multiply(scheme, ready, x, 576)
    for name in ("_WORTH_A_THREAD", "_WORTH_A_THREAD_TURNING"):
        monkeypatch.setattr(trellis, name, 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(multiply(scheme, ready, x, 576), alone)


FORMS = ["planes", pytest.param("compiled", marks=compiled)]


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    scheme = TrellisScheme(bits=3)
    given = linear.arguments(scheme, form, random_matrix(scheme, 48, 64), 64)
    x = inputs(6, 64).view(2, 3, 64).requires_grad_()
    torch.library.opcheck(linear.packed_linear, (x, *given, 48))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [1, 3])
def test_the_gradient_of_the_input(bits: int, dtype: torch.dtype, form: str) -> None:
    scheme = TrellisScheme(bits=bits)
    stored = random_matrix(scheme, 80, 192)
    x = inputs(6, 192, dtype).view(2, 3, 192).requires_grad_()
    y = torch.ops.ulbq.packed_linear(x, *linear.arguments(scheme, form, stored, 192), 80)
    wide = x.detach().double().requires_grad_()
    wanted = exact(scheme, stored, wide)
    assert_near(y, wanted, dtype)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found,) = torch.autograd.grad(y, x, grad)
    assert_near(found, torch.autograd.grad(wanted, wide, grad.double())[0], dtype, slack=2)


@pytest.mark.parametrize("ready", [False, True])
def test_a_layer_keeps_its_stored_tensors_and_compiles_to_one_graph(ready: bool) -> None:
    scheme, stored = SCHEMES[2], random_matrix(SCHEMES[2], 48, 64)
    layer = QuantLinear(scheme, 64, 48, bias=True)
    layer.assign(stored)
    x = inputs(3, 64)
    eager = layer(x) if ready else None
    torch._dynamo.reset()  # it compiles a forward pass so many times and no more, over all tests
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    result = compiled_layer(x)
    assert_near(result, layer(x) if eager is None else eager, torch.float32, slack=8)
    assert layer.state_dict().keys() - {"bias"} == stored.keys()
    assert all(torch.equal(layer.tensors()[name], tensor) for name, tensor in stored.items())


@compiled
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_a_layer_that_keeps_its_dense_weight(rows: int) -> None:
    scheme, stored = SCHEMES[2], random_matrix(SCHEMES[2], 48, 64)
    layer = QuantLinear(scheme, 64, 48, cache=True)
    layer.assign(stored)
    x = inputs(rows, 64, torch.bfloat16)
    assert_near(layer(x), exact(scheme, stored, x), torch.bfloat16)
    assert bool(layer.cached_bytes) == (rows >= trellis.MANY_ROWS)
