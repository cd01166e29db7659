import json

import pytest
import torch

from ulbq import formats
from ulbq.formats import AffineScheme, DualBinaryScheme, affine, dual_binary, read_scheme
from ulbq.formats.bits import stored_bits

SHAPES = [(5, 24, 8), (3, 7, 7), (2, 30, 15), (4, 20, -1)]


def random_matrix(shape: tuple[int, int, int]) -> tuple[DualBinaryScheme, torch.Tensor, torch.Tensor]:
    out_features, in_features, group_size = shape
    scheme = DualBinaryScheme(group_size=group_size)
    generator = torch.Generator().manual_seed(in_features)
    planes = torch.randint(2, (2, out_features, in_features), generator=generator)
    scales = torch.randn(scheme.tensors(out_features, in_features)["scales"].shape, generator=generator)
    return scheme, planes, scales


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_as_by_hand(shape: tuple[int, int, int]) -> None:
    scheme, planes, scales = random_matrix(shape)
    rows, columns, group_size = shape
    group = columns if group_size == -1 else group_size
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            for plane in (0, 1):
                expected[i, j] += float(scales[plane, i, j // group].half()) * int(planes[plane, i, j])
    tensors = dual_binary.pack(scheme, planes, scales)
    # The sum of two float16 numbers rounds once in float32, as the double does on its way there.
    assert torch.equal(dual_binary.dequantize(scheme, tensors, columns), expected.float())
    assert torch.equal(formats.dequantize(scheme, tensors, columns), expected.float())
    assert torch.equal(dual_binary.dequantize(scheme, tensors, columns, torch.bfloat16), expected.float().bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacked_as_packed(shape: tuple[int, int, int]) -> None:
    scheme, planes, scales = random_matrix(shape)
    found = dual_binary.unpack(scheme, dual_binary.pack(scheme, planes, scales), shape[1])
    assert torch.equal(found[0], planes.to(torch.uint8))
    assert torch.equal(found[1], scales.half().float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_planes_of_any_dtype(dtype: torch.dtype) -> None:
    scheme, planes, scales = random_matrix((3, 16, 8))
    packed = dual_binary.pack(scheme, planes.to(dtype), scales)
    assert torch.equal(packed["codes"], dual_binary.pack(scheme, planes, scales)["codes"])


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_what_was_announced_and_counted(shape: tuple[int, int, int]) -> None:
    scheme, planes, scales = random_matrix(shape)
    tensors = dual_binary.pack(scheme, planes, scales)
    specs = scheme.tensors(shape[0], shape[1])
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()} == {
        name: (spec.shape, f"torch.{spec.dtype}") for name, spec in specs.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert sum(stored_bits(specs).values()) == stored
    assert formats.bits_per_weight(scheme, shape[0], shape[1]) == stored / (shape[0] * shape[1])


def test_two_and_a_half_bits_at_group_64() -> None:
    assert formats.bits_per_weight(DualBinaryScheme(group_size=64), 128, 256) == 2.5


def test_golden_bytes_and_the_four_levels() -> None:
    """With a1 = 2s and a2 = -s the levels are 0, 2s, -s, s; s = 0.5, and the columns take each level twice.

    b1 is 0 1 0 1 0 1 0 1 from bit 0 up: 0b10101010; b2 is 0 0 1 1 0 0 1 1: 0b11001100. In float16 1.0 is 0x3c00 and
    -0.5 is 0xb800.
    """
    scheme = DualBinaryScheme(group_size=8)
    planes = torch.tensor([[[0, 1, 0, 1] * 2], [[0, 0, 1, 1] * 2]])
    tensors = dual_binary.pack(scheme, planes, torch.tensor([[[1.0]], [[-0.5]]]))
    assert tensors["codes"].tolist() == [[[0b10101010]], [[0b11001100]]]
    assert tensors["scales"].view(torch.int16).tolist() == [[[0x3C00]], [[0xB800 - 0x10000]]]
    assert dual_binary.dequantize(scheme, tensors, 8).tolist() == [[0.0, 1.0, -0.5, 0.5] * 2]


def test_sparsity_counts_the_zeros_of_each_plane_and_not_the_padding() -> None:
    scheme = DualBinaryScheme(group_size=-1)
    planes = torch.zeros(2, 3, 10)
    planes[0, :, :3] = 1
    planes[1, 0] = 1
    found = dual_binary.sparsity(scheme, dual_binary.pack(scheme, planes, torch.ones(2, 3, 1)), 10)
    assert found == pytest.approx((0.7, 2 / 3))
    assert formats.sparsity(scheme, dual_binary.pack(scheme, planes, torch.ones(2, 3, 1)), 10) == found


def test_only_planes_that_skip_zeros_have_a_sparsity() -> None:
    scheme = AffineScheme(bits=2, group_size=4, symmetric=True)
    assert formats.sparsity(scheme, affine.pack(scheme, torch.zeros(1, 4), torch.ones(1, 1)), 4) is None


def test_label() -> None:
    assert (DualBinaryScheme(group_size=64).label, DualBinaryScheme(group_size=-1).label) == ("w2g64-db", "w2-db")


def test_a_stored_scheme_finds_its_class() -> None:
    for scheme in (DualBinaryScheme(group_size=32), AffineScheme(bits=3, group_size=-1, symmetric=True)):
        assert read_scheme(json.loads(scheme.model_dump_json())) == scheme
    for wrong in ({"format": "vectors"}, {"format": ["affine"]}, {"bits": 2}, {"format": "affine", "bits": 9}, None):
        with pytest.raises(ValueError, match=r"no format is called|1 validation error"):
            read_scheme(wrong)
