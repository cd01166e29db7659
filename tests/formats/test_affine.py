import itertools

import pytest
import torch
from pydantic import ValidationError

from ulbq import formats
from ulbq.formats import AffineScheme, affine
from ulbq.formats.bits import stored_bits

BITS = (1, 2, 3, 4, 8)
CASES = list(itertools.product(BITS, (False, True), [(5, 24, 8), (3, 7, 7), (2, 30, 15), (4, 20, -1)]))


def random_matrix(
    scheme: AffineScheme, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales of both signs and zeros that use the whole range."""
    generator = torch.Generator().manual_seed(out_features * 100 + in_features + scheme.bits)
    groups = scheme.tensors(out_features, in_features)["scales"].shape[1]
    codes = torch.randint(2**scheme.bits, (out_features, in_features), generator=generator)
    scales = torch.randn(out_features, groups, generator=generator)
    zeros = torch.randint(2**scheme.bits, (out_features, groups), generator=generator)
    return codes, scales, None if scheme.symmetric else zeros


def by_hand(
    scheme: AffineScheme, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """``s · (q - z)`` one element at a time, in double precision, from the scales as float16 holds them."""
    rows, columns = codes.shape
    group = columns if scheme.group_size == -1 else scheme.group_size
    centre = 0.5 if scheme.bits == 1 else 2.0 ** (scheme.bits - 1)
    dense = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            zero = centre if zeros is None else float(zeros[i, j // group])
            dense[i, j] = float(scales[i, j // group].half()) * (float(codes[i, j]) - zero)
    return dense


@pytest.mark.parametrize(("bits", "symmetric", "shape"), CASES)
def test_dequantized_as_by_hand(bits: int, symmetric: bool, shape: tuple[int, int, int]) -> None:
    out_features, in_features, group_size = shape
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    codes, scales, zeros = random_matrix(scheme, out_features, in_features)
    tensors = affine.pack(scheme, codes, scales, zeros)
    expected = by_hand(scheme, codes, scales, zeros)
    # Eleven bits of scale times at most nine of code fit float32: not even the last bit may differ.
    assert torch.equal(affine.dequantize(scheme, tensors, in_features).double(), expected)
    assert torch.equal(formats.dequantize(scheme, tensors, in_features).double(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(affine.dequantize(scheme, tensors, in_features, dtype), expected.to(dtype))


@pytest.mark.parametrize(("bits", "symmetric", "shape"), CASES)
def test_unpacked_as_packed(bits: int, symmetric: bool, shape: tuple[int, int, int]) -> None:
    out_features, in_features, group_size = shape
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    codes, scales, zeros = random_matrix(scheme, out_features, in_features)
    found = affine.unpack(scheme, affine.pack(scheme, codes, scales, zeros), in_features)
    assert torch.equal(found[0], codes.to(torch.uint8))
    assert torch.equal(found[1], scales.half().float())
    assert torch.equal(found[2], torch.full_like(scales, scheme.centre) if zeros is None else zeros.float())


@pytest.mark.parametrize(("bits", "symmetric", "shape"), CASES)
def test_what_is_stored_is_what_was_announced_and_counted(
    bits: int, symmetric: bool, shape: tuple[int, int, int]
) -> None:
    out_features, in_features, group_size = shape
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    tensors = affine.pack(scheme, *random_matrix(scheme, out_features, in_features))
    specs = scheme.tensors(out_features, in_features)
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()} == {
        name: (spec.shape, f"torch.{spec.dtype}") for name, spec in specs.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert sum(stored_bits(specs).values()) == stored
    assert formats.bits_per_weight(scheme, out_features, in_features) == stored / (out_features * in_features)


@pytest.mark.parametrize(
    ("scheme", "bits_per_weight"),
    [
        (AffineScheme(bits=2, group_size=64), 2 + (16 + 2) / 64),  # 2.28125, METHODS.md
        (AffineScheme(bits=3, group_size=128), 3 + (16 + 3) / 128),
        (AffineScheme(bits=4, group_size=32, symmetric=True), 4 + 16 / 32),
        (AffineScheme(bits=1, group_size=64, symmetric=True), 1 + 16 / 64),
    ],
)
def test_bits_without_waste(scheme: AffineScheme, bits_per_weight: float) -> None:
    assert formats.bits_per_weight(scheme, 256, 512) == bits_per_weight


def test_golden_bytes() -> None:
    """Two rows of eight two-bit codes, one group a row: worked out on paper.

    Row 0 counts 0 1 2 3 0 1 2 3: bit 0 is 0 1 0 1 …, 0b10101010; bit 1 is 0 0 1 1 …, 0b11001100. Row 1 is all threes.
    The zeros 1 and 2 make the planes 0b01 and 0b10. In float16 1.0 is 0x3c00 and -0.5 is 0xb800.
    """
    scheme = AffineScheme(bits=2, group_size=8)
    codes = torch.tensor([[0, 1, 2, 3] * 2, [3] * 8])
    tensors = affine.pack(scheme, codes, torch.tensor([[1.0], [-0.5]]), torch.tensor([[1], [2]]))
    assert tensors["codes"].tolist() == [[[0b10101010], [255]], [[0b11001100], [255]]]
    assert tensors["zeros"].tolist() == [[0b01], [0b10]]
    assert tensors["scales"].view(torch.int16).tolist() == [[0x3C00], [0xB800 - 0x10000]]
    assert affine.dequantize(scheme, tensors, 8).tolist() == [[-1.0, 0.0, 1.0, 2.0] * 2, [-0.5] * 8]


def test_one_bit_symmetric_holds_both_signs() -> None:
    scheme = AffineScheme(bits=1, group_size=4, symmetric=True)
    codes = torch.tensor([[0, 1, 1, 0]])
    positive = affine.pack(scheme, codes, torch.tensor([[0.5]]))
    assert affine.dequantize(scheme, positive, 4).tolist() == [[-0.25, 0.25, 0.25, -0.25]]
    negative = affine.pack(scheme, codes, torch.tensor([[-0.5]]))
    assert affine.dequantize(scheme, negative, 4).tolist() == [[0.25, -0.25, -0.25, 0.25]]


def test_a_negative_scale_mirrors_the_symmetric_grid() -> None:
    scheme = AffineScheme(bits=2, group_size=4, symmetric=True)
    codes = torch.tensor([[0, 1, 2, 3]])
    levels = [
        affine.dequantize(scheme, affine.pack(scheme, codes, torch.tensor([[s]])), 4)[0].tolist() for s in (2.0, -2.0)
    ]
    assert levels == [[-4.0, -2.0, 0.0, 2.0], [4.0, 2.0, 0.0, -2.0]]


def test_a_mid_rise_grid_has_as_many_levels_on_both_sides() -> None:
    scheme = AffineScheme(bits=2, group_size=4, symmetric=True, mid_rise=True)
    packed = affine.pack(scheme, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[2.0]]))
    assert affine.dequantize(scheme, packed, 4).tolist() == [[-3.0, -1.0, 1.0, 3.0]]
    assert packed.keys() == scheme.tensors(1, 4).keys() == {"codes", "scales"}
    with pytest.raises(ValueError, match="symmetric"):
        AffineScheme(bits=2, mid_rise=True)


@pytest.mark.parametrize(("bits", "centre"), [(1, 0.5), (2, 2.0), (3, 4.0), (4, 8.0), (8, 128.0)])
def test_centre(bits: int, centre: float) -> None:
    assert AffineScheme(bits=bits).centre == centre


def test_scales_are_rounded_once_at_packing() -> None:
    scheme = AffineScheme(bits=2, group_size=4, symmetric=True)
    exact = torch.tensor([[0.1]])
    tensors = affine.pack(scheme, torch.tensor([[0, 1, 2, 3]]), exact)
    again = affine.pack(scheme, *affine.unpack(scheme, tensors, 4)[:2])
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_an_asymmetric_matrix_needs_its_zeros() -> None:
    with pytest.raises(ValueError, match="needs its zeros"):
        affine.pack(AffineScheme(group_size=8), torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1))


def test_a_symmetric_matrix_takes_no_zeros_that_it_would_not_store() -> None:
    scheme = AffineScheme(bits=2, group_size=8, symmetric=True)
    with pytest.raises(ValueError, match="stores no zeros"):
        affine.pack(scheme, torch.zeros(1, 8), torch.ones(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (AffineScheme(bits=2, group_size=64), "w2g64"),
        (AffineScheme(bits=4, group_size=-1, symmetric=True), "w4-sym"),
        (AffineScheme(bits=2, group_size=64, symmetric=True, mid_rise=True), "w2g64-mid-rise"),
    ],
)
def test_label(scheme: AffineScheme, label: str) -> None:
    assert scheme.label == label


@pytest.mark.parametrize("values", [{"bits": 5}, {"bits": 2, "groupsize": 64}, {"format": "dual_binary"}])
def test_schemes_refuse_what_they_do_not_know(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AffineScheme.model_validate(values)
