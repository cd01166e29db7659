import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ulbq.formats.positions import pack_positions, position_shapes, unpack_positions


@given(size=st.integers(1, 300), data=st.data())
def test_round_trip_in_the_announced_shapes(size: int, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    positions = torch.tensor(sorted(chosen))
    low, high = pack_positions(positions, size)
    assert (tuple(low.shape), tuple(high.shape)) == position_shapes(len(positions), size)
    assert low.dtype == high.dtype == torch.uint8
    assert torch.equal(unpack_positions(low, high, len(positions)), positions)


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_large_matrices(count: int) -> None:
    size = 4096 * 11008
    positions = torch.randperm(size // 4096, generator=torch.Generator().manual_seed(0))[:count].sort().values * 4096
    positions[-1] = size - 1
    low, high = pack_positions(positions, size)
    assert torch.equal(unpack_positions(low, high, count), positions)


@pytest.mark.parametrize("share", [0.001, 0.004, 0.05, 0.3, 0.6])
def test_close_to_what_any_code_must_take(share: float) -> None:
    size = 2**20
    count = round(share * size)
    (bits, row), (high,) = position_shapes(count, size)
    entropy = -math.log2(share) * share - math.log2(1 - share) * (1 - share)
    assert 8 * (bits * row + high) < (entropy * size) + 0.7 * count


def test_golden_bytes() -> None:
    """Of 0, 3, 9, 10 in 22 with two low bits: low 0, 3, 1, 2; above them 0, 0, 2, 2.

    Bit 0 of the low ones is 0, 1, 1, 0, bit 1 is 0, 1, 0, 1. The high ones are at 0 + 0, 0 + 1, 2 + 2 and 2 + 3. With
    one low bit the high bits would take as many bytes, with two there are two planes: one is the least.
    """
    positions = torch.tensor([0, 3, 9, 10])
    assert position_shapes(4, 22) == ((1, 1), (2,))
    low, high = pack_positions(positions, 22)
    assert low.tolist() == [[0b0110]]
    # Halves 0, 1, 4, 5 at 0 + 0, 1 + 1, 4 + 2 and 5 + 3.
    assert high.tolist() == [0b01000101, 0b1]
    assert unpack_positions(torch.tensor([[0b0110], [0b1010]]).byte(), torch.tensor([0b110011]).byte(), 4).tolist() == [
        *(0, 3, 9, 10)
    ]


def test_golden_bytes_of_a_dense_set() -> None:
    """0, 3, 9, 10 in 12 are a map of 12 bits: nothing is shorter."""
    low, high = pack_positions(torch.tensor([0, 3, 9, 10]), 12)
    assert low.shape == (0, 1)
    assert high.tolist() == [0b00001001, 0b0110]
    assert unpack_positions(low, high, 4).tolist() == [0, 3, 9, 10]


@pytest.mark.parametrize("positions", [[3, 3], [4, 2], [-1, 2], [0, 12]])
def test_what_does_not_ascend_within_the_matrix_is_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="0 to 11"):
        pack_positions(torch.tensor(positions), 12)
