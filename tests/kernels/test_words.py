"""Words: round trips, words computed by hand, and the dense weight they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.columns import random_columns
from tests.kernels.matrices import in_layout, matrix, random_matrix, unpacked
from ulbq import formats
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme, codebook
from ulbq.kernels import words

SCHEMES: list[AnyScheme] = [
    *(AffineScheme(bits=bits, group_size=size) for bits in (1, 2, 3, 4) for size in (32, -1)),
    AffineScheme(bits=3, group_size=64, symmetric=True),
    AffineScheme(bits=2, group_size=32, symmetric=True, mid_rise=True),
    DualBinaryScheme(group_size=32),
    BinaryMosScheme(experts=2, zeros="input"),
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 140), st.integers(1, 200), st.integers(0, 9))
def test_the_stored_tensors_come_back(scheme: AnyScheme, outs: int, columns: int, seed: int) -> None:
    if scheme.group_size != -1:
        columns = -(-columns // scheme.group_size) * scheme.group_size
    stored = random_matrix(scheme, outs, columns, seed)
    ready = in_layout("triton", scheme, stored, outs, columns)
    back = unpacked(scheme, ready, outs, columns)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    if not isinstance(scheme, BinaryMosScheme):
        dense = matrix(scheme, ready, outs, columns, torch.float16)
        assert torch.equal(dense, formats.dequantize(scheme, stored, columns, torch.float16))


@pytest.mark.parametrize("outs", [8, 13])
@pytest.mark.parametrize("outliers", [0, 12])
def test_column_codebooks_come_back(outs: int, outliers: int) -> None:
    widths = [2] * 31 + [4] * 5 + [3] * 70 + [2] * 20
    scheme, made = random_columns(outs, widths, outliers)
    stored = codebook.pack(scheme, made)
    ready = in_layout("triton", scheme, stored, outs, len(widths))
    back = unpacked(scheme, ready, outs, len(widths))
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    weight = words.column_weight(ready.tensors, scheme.columns(len(widths)), outs, len(widths), torch.float64)
    torch.testing.assert_close(weight, codebook.dequantize(scheme, stored, len(widths), torch.float64))


@pytest.mark.parametrize(
    ("bits", "column", "code", "word", "value"),
    [
        (1, 5, 1, 0, 1 << 5),
        (1, 31, 1, 0, -(1 << 31)),
        (2, 3, 2, 0, 2 << 6),
        (2, 17, 3, 1, 3 << 2),
        (4, 9, 15, 1, 15 << 4),
        (3, 9, 3, 0, 3 << 6),  # m = 1, i = 1: low bits at 4 + 2
        (3, 9, 4, 2, 1 << 5),  # its high bit at 4 + 1
        (3, 26, 1, 1, 1 << 10),  # m = 3, i = 2: low bits at 8 + 2 of the second word
    ],
)
def test_words_by_hand(bits: int, column: int, code: int, word: int, value: int) -> None:
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    codes[1, 32 + column] = code
    made = words.to_words(codes, bits)
    assert made.shape == (2, bits, 64)
    assert made[1, word, 1] == value
    assert made.count_nonzero() == 1


def test_words_take_the_bits_that_they_hold() -> None:
    for bits in (1, 2, 3, 4):
        scheme = AffineScheme(bits=bits, group_size=64)
        made = words.pack(scheme, random_matrix(scheme, 128, 256), 128, 256)
        assert made["word_codes"].nbytes == 128 * 256 * bits // 8
