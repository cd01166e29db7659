"""The stream of bits: by hand, by AutoGPTQ's rule spelled out, by compressed-tensors itself, and round trip."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ulbq.formats.streams import pack_stream, unpack_stream


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (2, [0, 1, 2, 3] * 8, [0xE4E4E4E4] * 2),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
        (8, [0x11, 0x22, 0x33, 0xFF], [0xFF332211]),
        # Ten values fill thirty bits; 5 = 0b101 leaves its two low bits above them and takes one of the next word.
        (3, [0] * 10 + [5] + [0] * 10 + [3] + [0] * 9 + [7], [0x40000000, 0x80000001, 0xE0000001]),
    ],
)
def test_golden_words(bits: int, values: list[int], words: list[int]) -> None:
    packed = pack_stream(torch.tensor(values).unsqueeze(1), bits)
    assert [word & 0xFFFFFFFF for word in packed[:, 0].tolist()] == words


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), n=st.integers(1, 200), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_is_packed_comes_back(bits: int, n: int, m: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (n, m), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_stream(values, bits)
    assert words.shape == (-(-n * bits // 32), m)
    assert torch.equal(unpack_stream(words, bits, n), values)


def test_three_bits_lie_as_autogptq_lays_them() -> None:
    values = np.random.default_rng(0).integers(0, 8, 64).astype(np.uint64)
    words = np.zeros(6, dtype=np.uint64)
    for group in range(2):
        part = values[group * 32 : group * 32 + 32]
        first, second, third = 0, 0, 0
        for place, value in enumerate(part[:10]):
            first |= int(value) << (3 * place)
        first |= (int(part[10]) & 3) << 30
        second |= int(part[10]) >> 2
        for place, value in enumerate(part[11:21]):
            second |= int(value) << (3 * place + 1)
        second |= (int(part[21]) & 1) << 31
        third |= int(part[21]) >> 1
        for place, value in enumerate(part[22:]):
            third |= int(value) << (3 * place + 2)
        words[group * 3 : group * 3 + 3] = first, second, third
    packed = pack_stream(torch.from_numpy(values.astype(np.int64)).unsqueeze(1), 3)[:, 0]
    assert [word & 0xFFFFFFFF for word in packed.tolist()] == words.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_packs_the_same_words(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 2**bits, (5, 96), generator=torch.Generator().manual_seed(bits))
    theirs = helpers.pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(pack_stream(codes.T, bits).T, theirs)
