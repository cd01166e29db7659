"""Ascending positions in few bits (Elias 1974, Fano 1971): about ``2 + log2(size / count)`` each.

The lowest ``l`` bits of every position are stored as they are, in bit planes. What is above them never falls from one
position to the next, and is stored in unary: bit ``(position >> l) + i`` of the high bits is one for position ``i``.
For a random set that is about half a bit a position more than any code must take. With no low bits at all the high
ones are a plain map, one bit for every place: where more than a quarter of the places are taken nothing is shorter.
Where one weight in 250 is an outlier it makes 10 bits each; row numbers of 16 bits, and how many of them a column has,
would cost about twice that.
"""

import torch

from ulbq.formats.bits import pack_planes, packed_length, unpack_planes

Shape = tuple[int, ...]


def position_shapes(count: int, size: int) -> tuple[Shape, Shape]:
    """Shapes of the stored uint8 tensors: low bits ``[l, ceil(count/8)]`` and high bits ``[bytes]``.

    ``l`` is the number that costs least, the smallest such one but that no map is taken where another costs the same.
    ``count`` is at least 1.
    """
    lows = [*range(1, size.bit_length() + 1), 0]
    options = [((low, packed_length(count)), (_high_bytes(count, size, low),)) for low in lows]
    return min(options, key=lambda shapes: shapes[0][0] * shapes[0][1] + shapes[1][0])


def pack_positions(positions: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack positions.

    Args:
        positions: int64 ``[count]``, strictly ascending, from 0 to ``size - 1``; at least one.
        size: of what they point into.

    Returns:
        Low and high bits, uint8, shaped as :func:`position_shapes` says.

    Raises:
        ValueError: they do not ascend, or leave the range.
    """
    count = len(positions)
    if bool((positions.diff() <= 0).any()) or int(positions[0]) < 0 or int(positions[-1]) >= size:
        raise ValueError(f"positions must ascend within 0 to {size - 1}")
    (low_bits, _), (length,) = position_shapes(count, size)
    high = torch.zeros(8 * length, dtype=torch.uint8, device=positions.device)
    high[(positions >> low_bits) + _shift(low_bits, count, positions.device)] = 1
    low = (
        pack_planes(positions & ((1 << low_bits) - 1), low_bits)
        if low_bits
        else high.new_zeros(0, packed_length(count))
    )
    return low, pack_planes(high, 1)[0]


def unpack_positions(low: torch.Tensor, high: torch.Tensor, count: int) -> torch.Tensor:
    """Undo :func:`pack_positions`: int64 ``[count]``. No size depends on the values, so it runs on any device."""
    ones = unpack_planes(high.unsqueeze(0), 8 * len(high)).cumsum(0, dtype=torch.int64)
    order = torch.arange(count, device=high.device)
    # Where the running count of ones first reaches i + 1, there stands the i-th one.
    upper = torch.searchsorted(ones, order + 1) - _shift(len(low), count, high.device)
    return (upper << len(low)) | unpack_planes(low, count, torch.int64) if len(low) else upper


def _high_bytes(count: int, size: int, low: int) -> int:
    return packed_length(((size - 1) >> low) + count if low else size)


def _shift(low: int, count: int, device: torch.device) -> torch.Tensor:
    """``[count]`` by how much unary code moves each position; not at all in a map, where no two have the same place."""
    return torch.arange(count, device=device) * (low > 0)
