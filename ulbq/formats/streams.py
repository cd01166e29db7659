"""Integer codes as one unbroken stream of bits in 32-bit words, as GPTQ, compressed-tensors and Humming store them.

Value ``i`` of a column takes the bits ``i·b`` to ``i·b + b - 1`` of the column's stream, least significant first. So 32
values take ``b`` words whatever the width: at 3 bits the values 10 and 21 lie astride two words.
"""

import torch

_WORD = 32


def pack_stream(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first dimension.

    Args:
        values: ``[n, m]`` integers of any dtype, from 0 to ``2**bits - 1``.
        bits: 1 to 8.

    Returns:
        ``[ceil(n · bits / 32), m]`` int32; what is beyond the last value is zero.
    """
    count, columns = values.shape
    groups = -(-count // _WORD)
    padded = torch.nn.functional.pad(values.to(torch.int32), (0, 0, 0, groups * _WORD - count))
    padded = padded.view(groups, _WORD, columns)
    words = torch.zeros(groups, bits, columns, dtype=torch.int32, device=values.device)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        words[:, word] |= padded[:, index] << shift
        if shift + bits > _WORD:
            words[:, word + 1] |= padded[:, index] >> (_WORD - shift)
    return words.view(groups * bits, columns)[: -(-count * bits // _WORD)].contiguous()


def unpack_stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo :func:`pack_stream`: ``[count, m]`` uint8."""
    groups, columns = -(-count // _WORD), words.shape[1]
    padded = torch.nn.functional.pad(words, (0, 0, 0, groups * bits - words.shape[0])).view(groups, bits, columns)
    values = torch.empty(groups, _WORD, columns, dtype=torch.uint8, device=words.device)
    for index in range(_WORD):
        word, shift = divmod(index * bits, _WORD)
        low = min(bits, _WORD - shift)
        # The shift brings the sign along, and the mask takes it off.
        value = (padded[:, word] >> shift) & ((1 << low) - 1)
        if low < bits:
            value = value | ((padded[:, word + 1] & ((1 << (bits - low)) - 1)) << low)
        values[:, index] = value
    return values.view(groups * _WORD, columns)[:count]
