"""What Humming is given, checked with a stand-in that reads it bit by bit. No product of Humming's own is tested."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.matrices import assert_near, exact, in_layout, multiply, named, random_matrix, unpacked
from ulbq import kernels
from ulbq.formats import AffineScheme, AnyScheme, DualBinaryScheme
from ulbq.kernels import dispatch, triton_launch
from ulbq.kernels.layouts import humming

OUTS, COLUMNS = 64, 128
SCHEMES = [AffineScheme(bits=bits, group_size=size) for bits in (1, 2, 3, 4) for size in (32, -1)]
SCHEMES += [AffineScheme(bits=bits, group_size=64, symmetric=True) for bits in (2, 3, 4)]


def read(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of int32 words ``[n, words]``, by Python's integers."""
    rows = []
    for words in stream.tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        rows.append([(whole >> (bits * i)) & ((1 << bits) - 1) for i in range(32 * len(words) // bits)])
    return torch.tensor(rows, dtype=torch.float64)


def schema(b_dtype: str, weight_scale_group_size: int, has_zero_point: bool) -> SimpleNamespace:
    return SimpleNamespace(bits=int(b_dtype.removeprefix("uint")), group=weight_scale_group_size, zeros=has_zero_point)


def prepare_layer_config(
    shape_n: int, shape_k: int, *, weight_schema: Any, torch_dtype: torch.dtype, device: torch.device
) -> SimpleNamespace:
    assert torch_dtype == torch.bfloat16
    return SimpleNamespace(outs=shape_n, columns=shape_k, schema=weight_schema)


def prepare_and_transform_humming_tensors(
    tensors: dict[str, torch.Tensor], shape_n: int, shape_k: int, *, weight_schema: Any, **rest: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    groups = shape_k // weight_schema.group if weight_schema.group else 1
    assert tensors["weight"].shape == (shape_n, shape_k * weight_schema.bits // 32)
    assert tensors["weight"].dtype == torch.int32
    assert tensors["weight_scale"].shape == (shape_n, groups)
    assert tensors["weight_scale"].dtype == torch.bfloat16
    assert ("zero_point" in tensors) == weight_schema.zeros
    if weight_schema.zeros:
        assert tensors["zero_point"].shape == (shape_n * weight_schema.bits // 32, groups)
        assert tensors["zero_point"].dtype == torch.int32
    return prepare_layer_config(shape_n, shape_k, weight_schema=weight_schema, **rest), tensors


def humming_forward(
    config: Any,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    locks: torch.Tensor,
) -> torch.Tensor:
    bits = config.schema.bits
    zeros = 2.0 ** (bits - 1) if zero_point is None else read(zero_point.T, bits).T.unsqueeze(-1)
    codes = read(weight, bits).unflatten(1, (weight_scale.shape[1], -1))
    dense = ((codes - zeros) * weight_scale.double().unsqueeze(-1)).flatten(1)
    return (inputs.double() @ dense.T).to(inputs.dtype)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, as far as it is used."""
    parts = {
        "schema": {"HummingWeightSchema": schema},
        "transform": {
            "prepare_layer_config": prepare_layer_config,
            "prepare_and_transform_humming_tensors": prepare_and_transform_humming_tensors,
        },
        "forward": {"humming_forward": humming_forward},
    }
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    for name, functions in parts.items():
        module = ModuleType(f"humming.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"humming.{name}", module)
    humming._config.cache_clear()
    yield
    humming._config.cache_clear()


def ready(scheme: AffineScheme, stored: dict[str, torch.Tensor]) -> kernels.Ready:
    return in_layout("humming", scheme, stored, OUTS, COLUMNS)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_it_is_given_the_same_weight(scheme: AffineScheme) -> None:
    stored = random_matrix(scheme, OUTS, COLUMNS)
    made = ready(scheme, stored)
    x = torch.randn(2, 5, COLUMNS).bfloat16()
    # Scales are rounded to bfloat16.
    assert_near(multiply(scheme, made, x, OUTS), exact(scheme, stored, x), torch.bfloat16, slack=2)
    spoiled = made.tensors | {"humming_codes": made.tensors["humming_codes"].roll(1, 0)}
    result = multiply(scheme, made._replace(tensors=spoiled), x, OUTS)
    with pytest.raises(AssertionError):
        assert_near(result, exact(scheme, stored, x), torch.bfloat16, slack=2)
    back = unpacked(scheme, made, OUTS, COLUMNS)
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())


@pytest.mark.usefixtures("installed")
@pytest.mark.skipif(not triton_launch.interpreted(), reason="kernels are not interpreted in this process")
def test_vectors_other_floats_and_gradients_take_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SCHEMES[2]
    stored = random_matrix(scheme, OUTS, COLUMNS)
    made = ready(scheme, stored)
    monkeypatch.setattr(sys.modules["humming.forward"], "humming_forward", None)
    for x in (torch.randn(2, COLUMNS), torch.randn(5, COLUMNS).half(), torch.randn(5, COLUMNS).requires_grad_()):
        assert_near(multiply(scheme, made, x, OUTS), exact(scheme, stored, x), x.dtype, slack=2)
    assert not humming.takes(torch.randn(4, COLUMNS).bfloat16())
    assert not humming.takes(torch.randn(5, COLUMNS).bfloat16().requires_grad_())
    assert humming.takes(torch.randn(5, COLUMNS).bfloat16())


@pytest.mark.usefixtures("installed")
def test_opcheck() -> None:
    scheme = SCHEMES[2]
    made = ready(scheme, random_matrix(scheme, OUTS, COLUMNS)).tensors
    given = (made["humming_codes"], made["humming_scales"], made["humming_zeros"], made["humming_locks"])
    x = torch.randn(5, COLUMNS).bfloat16()
    torch.library.opcheck(humming.humming_linear, (x, *given, OUTS, scheme.bits, scheme.group_size))


@pytest.mark.parametrize(
    ("scheme", "outs", "reason"),
    [
        (DualBinaryScheme(), 64, "affine only"),
        (AffineScheme(bits=8), 64, "8 bits"),
        (AffineScheme(bits=1, symmetric=True), 64, "between two codes"),
        (AffineScheme(bits=2, symmetric=True, mid_rise=True), 64, "between two codes"),
        (AffineScheme(bits=2, group_size=16), 64, "groups of 16"),
        (AffineScheme(bits=2), 70, "70 × 128"),
        (AffineScheme(bits=2), 64, ""),
    ],
)
def test_what_it_does_not_take(scheme: AnyScheme, outs: int, reason: str) -> None:
    refused = dispatch.unsupported_reason(named("humming"), scheme, outs, 128, "cuda")
    assert reason in (refused or "")
    assert bool(reason) == (refused is not None)


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "not installed"), ("0.2.0", "humming-kernels 0.2.0"), ("0.1.19", "CUDA GPU")]
)
def test_why_it_is_missing(version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(_: str) -> str:
        if version is None:
            raise humming.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(humming.metadata, "version", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in str(humming.unavailable_reason.__wrapped__())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": 4}, "4 rows"),
        ({"dtype": torch.float16}, "float16 activations"),
        ({"differentiable": True}, "no gradient"),
        ({"device": "cpu"}, "runs on CUDA GPUs"),
        ({}, ""),
    ],
)
def test_the_row_of_the_table(changes: dict[str, Any], reason: str) -> None:
    case = kernels.Case(AffineScheme(bits=2), 64, 128, "cuda", torch.bfloat16, 16)._replace(**changes)
    layout = named("humming")
    refused = dispatch.unsupported_reason(layout, case.scheme, 64, 128, case.device) or layout.call_reason(case)
    assert reason in (refused or "")
    assert bool(reason) == (refused is not None)
