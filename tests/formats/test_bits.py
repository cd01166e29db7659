import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulbq.formats.bits import (
    TensorSpec,
    groups_of,
    pack_planes,
    packed_length,
    stored_bits,
    unpack_planes,
)


@given(
    bits=st.integers(1, 8),
    leading=st.sampled_from([(), (1,), (3,), (2, 3)]),
    count=st.integers(1, 35),
    seed=st.integers(0, 2**16),
)
def test_round_trip(bits: int, leading: tuple[int, ...], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (*leading, count), generator=generator, dtype=torch.uint8)
    planes = pack_planes(codes, bits)
    assert planes.shape == (bits, *leading, packed_length(count))
    assert planes.dtype == torch.uint8
    assert torch.equal(unpack_planes(planes, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_extremes_round_trip(bits: int) -> None:
    for value in (0, 1, 2**bits - 1):
        codes = torch.full((2, 19), value, dtype=torch.uint8)
        assert torch.equal(unpack_planes(pack_planes(codes, bits), 19), codes)


def test_golden_bytes_of_three_bits() -> None:
    """Codes 0 to 7, then 5, 2, 7: worked out on paper, code j in bit j of the byte.

    Of 0…7, bit 0 is 01010101, read from bit 0 up: 0b10101010; bit 1 is 00110011: 0b11001100; bit 2 is 00001111:
    0b11110000. Of 5, 2, 7 (101, 010, 111), bit 0 is 1, 0, 1; bit 1 is 0, 1, 1; bit 2 is 1, 0, 1.
    """
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 5, 2, 7]], dtype=torch.uint8)
    assert pack_planes(codes, 3).tolist() == [
        [[0b10101010, 0b101]],
        [[0b11001100, 0b110]],
        [[0b11110000, 0b101]],
    ]


def test_golden_bytes_of_one_bit() -> None:
    codes = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8)
    assert pack_planes(codes, 1).tolist() == [[0x01, 0x80, 0x01]]


def test_all_eight_ones_fill_a_byte() -> None:
    assert pack_planes(torch.full((8,), 255, dtype=torch.uint8), 8).tolist() == [[255]] * 8


def test_padding_is_zero() -> None:
    planes = pack_planes(torch.ones(2, 9, dtype=torch.uint8), 1)
    assert planes[..., -1].tolist() == [[1, 1]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_type_of_the_codes_changes_nothing(bits: int) -> None:
    codes = torch.randint(2**bits, (5, 83), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    for part in (codes, codes[:, 3:], codes.flatten()[1:82]):
        planes = pack_planes(part, bits)
        assert torch.equal(planes, pack_planes(part.long(), bits))
        assert torch.equal(unpack_planes(planes, part.shape[-1]), part)
        assert torch.equal(unpack_planes(planes, part.shape[-1], torch.int64), part.long())


def test_non_contiguous_codes() -> None:
    codes = torch.arange(24, dtype=torch.uint8).view(4, 6).T
    assert torch.equal(unpack_planes(pack_planes(codes, 5), 4), codes)


@pytest.mark.parametrize(("count", "length"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_packed_length(count: int, length: int) -> None:
    assert packed_length(count) == length


def test_groups() -> None:
    assert groups_of(192, 64) == 3
    assert groups_of(192, -1) == 1


def test_stored_bits_by_role() -> None:
    specs = {
        "codes": TensorSpec(dtype="uint8", shape=(2, 3, 5), role="codes"),
        "more": TensorSpec(dtype="uint8", shape=(7,), role="codes"),
        "scales": TensorSpec(dtype="float16", shape=(3, 2), role="scales"),
    }
    assert stored_bits(specs) == {"codes": 30 * 8 + 7 * 8, "scales": 6 * 16}
