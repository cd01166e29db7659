import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.formats.columns import random_columns
from ulbq import formats
from ulbq.formats import CodebookScheme, codebook, read_scheme
from ulbq.formats.bits import stored_bits
from ulbq.formats.codebook import Columns, Outliers

CASES: list[tuple[int, list[int], int]] = [
    (16, [2] * 5, 0),
    (16, [2, 4, 2, 2, 4, 2, 2], 3),
    (5, [3, 2, 4, 3, 2, 4, 4, 2, 3], 4),  # outputs that fill no byte at all
    (13, [3, 4, 3], 1),
    (8, [4], 8),
    (1, [2], 1),
]


def by_hand(columns: Columns) -> torch.Tensor:
    """The weight one element at a time."""
    codes, _, codebooks, outliers = columns
    in_features, out_features = codes.shape
    weight = torch.empty(out_features, in_features)
    for j in range(in_features):
        for i in range(out_features):
            weight[i, j] = codebooks[j, int(codes[j, i])]
    for position, value in zip(*(outliers or ((), ())), strict=True):
        weight[int(position) % out_features, int(position) // out_features] = value
    return weight


@pytest.mark.parametrize(("out_features", "widths", "outliers"), CASES)
def test_dequantized_as_by_hand(out_features: int, widths: list[int], outliers: int) -> None:
    scheme, columns = random_columns(out_features, widths, outliers)
    tensors = codebook.pack(scheme, columns)
    expected = by_hand(columns)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        found = formats.dequantize(scheme, tensors, len(widths), dtype)
        assert torch.equal(found, expected.to(dtype))
        assert found.is_contiguous()
    assert torch.equal(formats.matrix(scheme, tensors, len(widths)), expected)


@settings(deadline=None)
@given(
    out_features=st.integers(1, 20),
    widths=st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=20),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_round_trip_and_accounting(out_features: int, widths: list[int], share: float, seed: int) -> None:
    outliers = int(share * out_features * len(widths))
    scheme, columns = random_columns(out_features, widths, outliers, seed=seed)
    tensors = codebook.pack(scheme, columns)
    found = codebook.unpack(scheme, tensors, len(widths))
    for value, wanted in zip(found[:3], columns[:3], strict=True):
        assert torch.equal(value, wanted)
    assert (found.outliers is None) == (columns.outliers is None)
    for value, wanted in zip(found.outliers or (), columns.outliers or (), strict=True):
        assert torch.equal(value, wanted)
    specs = scheme.tensors(out_features, len(widths))
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()} == {
        name: (spec.shape, f"torch.{spec.dtype}") for name, spec in specs.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert sum(stored_bits(specs).values()) == stored
    assert formats.bits_per_weight(scheme, out_features, len(widths)) == stored / (out_features * len(widths))


@pytest.mark.parametrize(("out_features", "widths", "outliers"), CASES)
def test_a_file_holds_it_with_its_empty_tensors(out_features: int, widths: list[int], outliers: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    scheme, columns = random_columns(out_features, widths, outliers)
    save_file(codebook.pack(scheme, columns), tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(codebook.dequantize(scheme, found, len(widths)), by_hand(columns))


def test_golden_bytes() -> None:
    """Nine outputs of three columns of 2, 3 and 2 bits: worked out on paper.

    Sorted, the second column comes first. Its codes 0 1 2 3 4 5 6 7 and 4 have the bits 01010101|0, 00110011|0 and
    00001111|1; column 0, all ones, 11111111|1 and 00000000|0; column 2, zeros but for the last, a 3, 00000000|1 twice.
    The rows of `codes` are bit 0 of columns 1, 0, 2, bit 1 of the same, bit 2 of column 1; of the ninth output that
    leaves 0, 1, 1, 0, 0, 1, 1. Of the widths 2, 3, 2 the second is the larger one. In float16 1.0 is 0x3c00.
    """
    codes = torch.tensor([[1] * 9, [0, 1, 2, 3, 4, 5, 6, 7, 4], [0] * 8 + [3]], dtype=torch.uint8)
    widths = torch.tensor([2, 3, 2])
    codebooks = torch.stack([torch.arange(8.0) + 10 * column for column in range(3)])
    codebooks[0, 0] = 1.0
    # Row 8 of column 0, row 1 of column 2.
    outliers = Outliers(torch.tensor([8, 19]), torch.tensor([-0.5, 1.0]))
    scheme = CodebookScheme.of(2, widths, 2)
    assert scheme == CodebookScheme(bits=2, widths={2: 2, 3: 1}, outliers=2)
    tensors = codebook.pack(scheme, Columns(codes, widths, codebooks, outliers))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "codes": [[0b10101010], [0b11111111], [0], [0b11001100], [0], [0], [0b11110000]],
        "tail_codes": [[0b1100110]],
        "codebooks": [10, 11, 12, 13, 14, 15, 16, 17, 1, 1, 2, 3, 20, 21, 22, 23],
        "columns": [[0b010]],
        "outlier_values": [-0.5, 1.0],
        # 8 and 19 of 27, one low bit each, which costs least: 0 and 1; above them 4 + 0 and 9 + 1.
        "outlier_low": [[0b10]],
        "outlier_high": [0b00010000, 0b100],
    }
    assert tensors["codebooks"].view(torch.int16)[8] == 0x3C00
    weight = codebook.dequantize(scheme, tensors, 3)
    assert weight[:, 0].tolist() == [1.0] * 8 + [-0.5]
    assert weight[:, 1].tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 14]
    assert weight[:, 2].tolist() == [20, 1, 20, 20, 20, 20, 20, 20, 23]


def test_bits_without_waste() -> None:
    """Twelve columns in 256 at 4 bits, the rest at 2: as counted by hand."""
    scheme = CodebookScheme(bits=2, widths={2: 244, 4: 12})
    roles = stored_bits(scheme.tensors(512, 256))
    assert roles == {"codes": (244 * 2 + 12 * 4) * 512, "codebooks": 16 * (244 * 4 + 12 * 16), "columns": 256}
    plain = CodebookScheme(bits=3)
    assert formats.bits_per_weight(plain, 1024, 256) == 3 + 16 * 8 / 1024
    assert plain.tensors(24, 256) == CodebookScheme(bits=3, widths={3: 256}).tensors(24, 256)
    # Three widths need two bits to tell them apart.
    assert stored_bits(CodebookScheme(widths={2: 8, 3: 4, 4: 4}).tensors(8, 16))["columns"] == 2 * 16


def test_outliers_are_picked_by_a_mask() -> None:
    weight = torch.arange(12.0).view(3, 4)
    mask = (weight % 5 == 0) & (weight > 0)
    found = Outliers.where(mask, weight)
    # 5 and 10, in row 1 of column 1 and in row 2 of column 2.
    assert found.positions.tolist() == [4, 8]
    assert found.values.tolist() == [5, 10]


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": torch.tensor([2, 2, 4])},
        {"widths": torch.tensor([2, 4, 4, 2])},
        {"codes": torch.full((4, 8), 4, dtype=torch.uint8)},
        {"outliers": None},
        {"outliers": Outliers(torch.tensor([3, 1]), torch.zeros(2))},
        {"outliers": Outliers(torch.tensor([3, 32]), torch.zeros(2))},
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, torch.Tensor]) -> None:
    scheme, columns = random_columns(8, [2, 2, 4, 2], 2)
    with pytest.raises(ValueError, match=r"widths|levels|ascend|fit|index"):
        codebook.pack(scheme, columns._replace(**wrong))


def test_a_scheme_counts_the_columns_of_one_matrix() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        CodebookScheme(widths={2: 3, 4: 1}).tensors(8, 5)
    assert CodebookScheme(widths={4: 1, 3: 0, 2: 3}) == CodebookScheme(widths={2: 3, 4: 1})
    assert len({CodebookScheme(widths={4: 1, 2: 3}), CodebookScheme(widths={2: 3, 4: 1}), CodebookScheme()}) == 2
    for wrong in ({"widths": {1: 4}}, {"widths": {5: 4}}, {"widths": {2: -1}}, {"outliers": -1}, {"bits": 5}):
        with pytest.raises(ValidationError):
            CodebookScheme.model_validate(wrong)


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (CodebookScheme(), "cb2"),
        (CodebookScheme(bits=3, widths={3: 7}), "cb3"),
        (CodebookScheme(bits=2, widths={2: 95, 4: 5}), "cb2.1"),
        (CodebookScheme(bits=2, widths={2: 541, 4: 35}, outliers=9), "cb2.12-o"),
    ],
)
def test_label(scheme: CodebookScheme, label: str) -> None:
    assert (scheme.label, scheme.group_size) == (label, -1)


def test_a_stored_scheme_finds_its_class() -> None:
    scheme = CodebookScheme(bits=2, widths={2: 5, 4: 2}, outliers=3)
    assert read_scheme(json.loads(scheme.model_dump_json())) == scheme
    assert read_scheme(scheme.model_dump(mode="json")) == scheme
