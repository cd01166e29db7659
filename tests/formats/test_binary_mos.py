import json
import math

import pytest
import torch
from pydantic import ValidationError

from ulbq import formats
from ulbq.config.groups import Zeros
from ulbq.formats import BinaryMosScheme, binary_mos, read_scheme
from ulbq.formats.binary_mos import Mixture
from ulbq.formats.bits import stored_bits

CASES: list[tuple[int, Zeros, tuple[int, int]]] = [
    (4, "none", (5, 24)),
    (1, "none", (3, 7)),
    (2, "output", (6, 13)),
    (8, "input", (4, 16)),
    (1, "input", (9, 10)),
]


def random_matrix(experts: int, zeros: Zeros, shape: tuple[int, int]) -> tuple[BinaryMosScheme, Mixture]:
    """Values that float16 holds, so that nothing is lost in packing."""
    scheme = BinaryMosScheme(experts=experts, zeros=zeros)
    generator = torch.Generator().manual_seed(shape[1])

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).half().float()

    out_features, in_features = shape
    signs = draw(*shape).sign()
    count = {"none": 0, "output": out_features, "input": in_features}[zeros]
    return scheme, Mixture(
        signs,
        draw(experts, in_features),
        draw(experts, out_features),
        draw(experts, in_features) if experts > 1 else None,
        draw(count) if count else None,
    )


def by_hand(matrix: Mixture, zeros: Zeros, x: list[float]) -> list[float]:
    """The layer's answer to one token, one element at a time, in double precision."""
    experts, columns = matrix.in_scales.shape
    rows = matrix.out_scales.shape[1]
    gates = [1.0]
    if matrix.router is not None:
        logits = [sum(x[j] * float(matrix.router[k, j]) for j in range(columns)) for k in range(experts)]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        gates = [power / sum(powers) for power in powers]
    y = []
    for i in range(rows):
        total = 0.0
        for j in range(columns):
            inner = sum(gates[k] * float(matrix.in_scales[k, j]) for k in range(experts))
            zero = 0.0 if matrix.zeros is None else float(matrix.zeros[i if zeros == "output" else j])
            total += x[j] * inner * (float(matrix.signs[i, j]) + zero)
        y.append(total * sum(gates[k] * float(matrix.out_scales[k, i]) for k in range(experts)))
    return y


@pytest.mark.parametrize(("experts", "zeros", "shape"), CASES)
def test_the_product_is_the_equation(experts: int, zeros: Zeros, shape: tuple[int, int]) -> None:
    scheme, matrix = random_matrix(experts, zeros, shape)
    tensors = binary_mos.pack(scheme, *matrix)
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1)).double()
    expected = torch.tensor([[by_hand(matrix, zeros, token) for token in row] for row in x.tolist()])
    factor = formats.matrix(scheme, tensors, shape[1], torch.float64)
    found = formats.multiply(scheme, tensors, x, factor)
    # The gates alone are float32.
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("experts", "zeros", "shape"), CASES)
def test_unpacked_as_packed(experts: int, zeros: Zeros, shape: tuple[int, int]) -> None:
    scheme, matrix = random_matrix(experts, zeros, shape)
    found = binary_mos.unpack(scheme, binary_mos.pack(scheme, *matrix), shape[1])
    for value, wanted in zip(found, matrix, strict=True):
        assert (value is None and wanted is None) or torch.equal(value, wanted)


@pytest.mark.parametrize(("experts", "zeros", "shape"), CASES)
def test_what_is_stored_is_what_was_announced_and_counted(experts: int, zeros: Zeros, shape: tuple[int, int]) -> None:
    scheme, matrix = random_matrix(experts, zeros, shape)
    tensors = binary_mos.pack(scheme, *matrix)
    specs = scheme.tensors(*shape)
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()} == {
        name: (spec.shape, f"torch.{spec.dtype}") for name, spec in specs.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert sum(stored_bits(specs).values()) == stored
    assert formats.bits_per_weight(scheme, *shape) == stored / (shape[0] * shape[1])


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_bits_as_published(experts: int) -> None:
    found = formats.bits_per_weight(BinaryMosScheme(experts=experts), 4096, 11008)
    assert found == 1 + 16 * experts * (2 * 11008 + 4096) / (11008 * 4096)
    assert stored_bits(BinaryMosScheme(experts=experts).tensors(8, 16))["router"] == 16 * experts * 16


def test_one_expert_stores_no_router_and_is_a_dense_weight() -> None:
    scheme, matrix = random_matrix(1, "output", (6, 13))
    tensors = binary_mos.pack(scheme, *matrix)
    x = torch.randn(4, 13, dtype=torch.float64)
    product = formats.multiply(scheme, tensors, x, formats.matrix(scheme, tensors, 13, torch.float64))
    torch.testing.assert_close(
        product, x @ formats.dequantize(scheme, tensors, 13, torch.float64).T, rtol=1e-5, atol=1e-5
    )
    assert "router" not in tensors
    assert scheme.is_one_matrix


def test_many_experts_are_dequantized_at_uniform_gates() -> None:
    scheme, matrix = random_matrix(4, "input", (5, 24))
    still = matrix._replace(router=torch.zeros_like(matrix.in_scales))
    tensors = binary_mos.pack(scheme, *still)
    x = torch.randn(3, 24)
    product = formats.multiply(scheme, tensors, x, formats.matrix(scheme, tensors, 24))
    torch.testing.assert_close(product, x @ formats.dequantize(scheme, tensors, 24).T)
    assert not scheme.is_one_matrix


def test_golden_bytes_and_the_sign_of_zero() -> None:
    """Bit 0 is column 0; zero counts as +1, a one bit. In float16 1.0 is 0x3c00 and -0.5 is 0xb800."""
    scheme = BinaryMosScheme(experts=1)
    signs = torch.tensor([[0.0, -0.0, 2.0, -2.0, -1.0, -1.0, -1.0, 1.0, -1.0]])
    tensors = binary_mos.pack(scheme, signs, torch.ones(1, 9), torch.tensor([[-0.5]]))
    assert tensors["codes"].tolist() == [[[0b10000111, 0]]]
    assert tensors["in_scales"].view(torch.int16).tolist() == [[0x3C00] * 9]
    assert tensors["out_scales"].view(torch.int16).tolist() == [[0xB800 - 0x10000]]
    assert binary_mos.dequantize(scheme, tensors, 9).tolist() == [[-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, -0.5, 0.5]]


@pytest.mark.parametrize(
    ("experts", "zeros", "change", "name"),
    [
        (2, "none", {"router": None}, "router"),
        (1, "none", {"router": torch.ones(1, 24)}, "router"),
        (2, "none", {"zeros": torch.ones(5)}, "zeros"),
        (2, "output", {"zeros": torch.ones(24)}, "zeros"),
        (2, "input", {"zeros": None}, "zeros"),
        (2, "none", {"in_scales": torch.ones(3, 24)}, "in_scales"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    experts: int, zeros: Zeros, change: dict[str, torch.Tensor | None], name: str
) -> None:
    scheme, matrix = random_matrix(experts, zeros, (5, 24))
    with pytest.raises(ValueError, match=name):
        binary_mos.pack(scheme, *matrix._replace(**change))


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (BinaryMosScheme(), "w1e4"),
        (BinaryMosScheme(experts=8, zeros="output"), "w1e8-zo"),
        (BinaryMosScheme(experts=1, zeros="input"), "w1e1-zi"),
    ],
)
def test_label(scheme: BinaryMosScheme, label: str) -> None:
    assert (scheme.label, scheme.bits, scheme.group_size) == (label, 1, -1)


def test_a_stored_scheme_finds_its_class() -> None:
    scheme = BinaryMosScheme(experts=2, zeros="input")
    assert read_scheme(json.loads(scheme.model_dump_json())) == scheme
    for wrong in ({"experts": 0}, {"zeros": "both"}, {"bits": 1}):
        with pytest.raises(ValidationError):
            read_scheme({"format": "binary_mos", **wrong})
