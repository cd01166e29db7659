"""GPTQ's, compressed-tensors' and GGUF's layouts of single matrices."""

import functools

import pytest
import torch
from gguf import GGMLQuantizationType

from tests.models.stored import pack_some
from ulbq import formats
from ulbq.export import gguf_blocks
from ulbq.export.targets import auto_round, compressed_tensors, gptq, mlx
from ulbq.formats import AffineScheme, DualBinaryScheme, TrellisScheme, affine
from ulbq.models.gguf_types import NewType, dequantize

WIDTHS = [2, 3, 4, 8]


def matrix(bits: int, *, symmetric: bool, group_size: int = 32, mirrored: bool = True):
    torch.manual_seed(bits)
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    packed = pack_some(scheme, 64, 128)
    if mirrored and symmetric:  # half of the groups, as the solvers leave them
        packed["scales"][:, ::2] *= -1
    return scheme, packed, formats.dequantize(scheme, packed, 128)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
class TestRoundTrip:
    def test_gptq(self, bits: int, symmetric: bool, group_size: int) -> None:
        scheme, packed, weight = matrix(bits, symmetric=symmetric, group_size=group_size)
        tensors = gptq.encode(scheme, packed, (64, 128), v1=symmetric)
        assert tensors["qweight"].shape == (128 * bits // 32, 64)
        assert tensors["qzeros"].shape == (128 // (group_size if group_size > 0 else 128), 64 * bits // 32)
        assert tensors["scales"].dtype == torch.float16
        assert torch.equal(gptq.decode(tensors, bits, v1=symmetric), weight)
        assert not torch.equal(gptq.decode(tensors, bits, v1=not symmetric), weight)

    def test_auto_round(self, bits: int, symmetric: bool, group_size: int) -> None:
        scheme, packed, weight = matrix(bits, symmetric=symmetric, group_size=group_size)
        tensors = auto_round.encode(scheme, packed, (64, 128))
        assert tensors.keys() == {"qweight", "qzeros", "scales"}
        assert torch.equal(gptq.decode(tensors, bits, v1=False), weight)

    def test_compressed_tensors(self, bits: int, symmetric: bool, group_size: int) -> None:
        scheme, packed, weight = matrix(bits, symmetric=symmetric, group_size=group_size)
        tensors = compressed_tensors.encode(scheme, packed, (64, 128))
        assert ("weight_zero_point" in tensors) is not symmetric
        assert torch.equal(compressed_tensors.decode(tensors, bits), weight)

    def test_compressed_tensors_own_decompression(self, bits: int, symmetric: bool, group_size: int) -> None:
        library = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
        quantization = pytest.importorskip("compressed_tensors.quantization")
        scheme, packed, weight = matrix(bits, symmetric=symmetric, group_size=group_size)
        tensors = compressed_tensors.encode(scheme, packed, (64, 128))
        tensors["weight_scale"] = tensors["weight_scale"].float()  # it computes in the scales' dtype
        config = compressed_tensors.configuration({"x": scheme}, ["lm_head"])
        described = quantization.QuantizationConfig.model_validate(config)
        found = library.PackedQuantizationCompressor.decompress(tensors, described.config_groups["group_0"])
        assert torch.equal(found["weight"], weight)


def test_golden_words_of_symmetric_two_bits_in_v1() -> None:
    # The grid is s·{−2, −1, 0, 1}: its zero point is 2, and v1 stores 1 sixteen times.
    scheme = AffineScheme(bits=2, group_size=32, symmetric=True)
    codes = torch.tensor([0, 1, 2, 3]).repeat(32, 8)
    scales = torch.where(torch.arange(32).unsqueeze(1) < 16, 0.5, -0.5)
    tensors = gptq.encode(scheme, affine.pack(scheme, codes, scales), (32, 32), v1=True)
    assert {word & 0xFFFFFFFF for word in tensors["qzeros"].flatten().tolist()} == {0x55555555}
    assert {word & 0xFFFFFFFF for word in tensors["qweight"].flatten().tolist()} == {0xE4E4E4E4}
    assert tensors["g_idx"].tolist() == [0] * 32
    weight = gptq.decode(tensors, 2, v1=True)
    assert weight[0, :4].tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert weight[31, :4].tolist() == [1.0, 0.5, 0.0, -0.5]  # the mirrored grid: |s|·{2, 1, 0, −1}


def test_zero_points_between_two_codes_are_refused() -> None:
    scheme = AffineScheme(bits=2, group_size=32, symmetric=True, mid_rise=True)
    for layout in (gptq, compressed_tensors):
        assert "lie between two codes" in (layout.unsupported_reason(scheme, (64, 64)) or "")


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_v1_stores_the_middle_less_one(bits: int, word: int) -> None:
    scheme, packed, _ = matrix(bits, symmetric=True)
    zeros = gptq.encode(scheme, packed, (64, 128), v1=True)["qzeros"]
    assert {value & 0xFFFFFFFF for value in zeros.flatten().tolist()} == {word}


def test_v2_stores_zero_points_as_they_are() -> None:
    scheme = AffineScheme(bits=4, group_size=32)
    zeros = torch.arange(32).remainder(16).unsqueeze(1)
    packed = affine.pack(scheme, torch.zeros(32, 32), torch.ones(32, 1), zeros)
    stored = gptq.encode(scheme, packed, (32, 32), v1=False)["qzeros"]
    assert [value & 0xFFFFFFFF for value in stored[0].tolist()] == [0x76543210, 0xFEDCBA98] * 2


def test_v1_has_no_word_for_a_zero_point_of_zero() -> None:
    scheme = AffineScheme(bits=2, group_size=32)
    packed = affine.pack(scheme, torch.zeros(32, 32), torch.ones(32, 1), torch.zeros(32, 1))
    with pytest.raises(ValueError, match="zero point of 0"):
        gptq.encode(scheme, packed, (32, 32), v1=True)


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size", "kind"),
    [
        (1, True, 32, "Q4_0"),
        (1, True, 64, "Q2_0"),
        (1, True, 128, "Q1_0"),
        (1, True, -1, "Q1_0"),
        (2, True, 32, "Q4_0"),
        (2, True, 64, "Q2_0"),
        (2, True, -1, "Q2_0"),
        (2, False, 32, "Q4_0"),
        (3, False, 64, "Q4_0"),
        (4, True, 32, "Q4_0"),
        (4, False, 32, "Q5_0"),
        (8, True, 32, "Q8_0"),
        (8, True, -1, "Q8_0"),
    ],
)
def test_the_smallest_gguf_type_that_holds_a_matrix(bits: int, symmetric: bool, group_size: int, kind: str) -> None:
    scheme, packed, weight = matrix(bits, symmetric=symmetric, group_size=group_size)
    blocks = gguf_blocks.encode(scheme, packed, 128)
    assert blocks is not None
    assert blocks.kind.name == kind
    assert torch.equal(torch.from_numpy(dequantize(blocks.data, blocks.kind)), weight)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("form", ["asymmetric", "symmetric", "mid-rise"])
@pytest.mark.parametrize(("group_size", "theirs"), [(32, 32), (64, 64), (-1, 128), (256, 128)])
def test_mlx_holds_the_weights_themselves(bits: int, form: str, group_size: int, theirs: int) -> None:
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=form != "asymmetric", mid_rise=form == "mid-rise")
    columns = 256 if group_size == 256 else 128
    packed = pack_some(scheme, 64, columns)
    assert mlx.unsupported_reason(scheme, (64, columns)) is None
    tensors = mlx.encode(scheme, packed, (64, columns))
    assert tensors["weight"].shape == (64, columns * bits // 32)
    assert tensors["weight"].dtype == torch.uint32
    assert tensors["scales"].shape == tensors["biases"].shape == (64, columns // theirs)
    assert tensors["scales"].dtype == tensors["biases"].dtype
    if form == "symmetric":
        assert tensors["scales"].dtype == torch.float16
    assert torch.equal(mlx.decode(tensors, bits), formats.dequantize(scheme, packed, columns))


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (AffineScheme(bits=1, symmetric=True), "2, 3, 4, 6 and 8 bits, not 1"),
        (AffineScheme(bits=2, group_size=16), "groups of 32, 64 and 128"),
        (DualBinaryScheme(group_size=32), "integer codes"),
    ],
)
def test_mlx_refuses(scheme: AffineScheme | DualBinaryScheme, why: str) -> None:
    assert why in str(mlx.unsupported_reason(scheme, (64, 128)))


@pytest.mark.parametrize(("bits", "kind"), [(2, "Q4_0"), (3, "Q4_0"), (4, "Q5_0")])
def test_odd_multiples_of_half_a_step_are_whole_steps_of_gguf(bits: int, kind: str) -> None:
    scheme = AffineScheme(bits=bits, group_size=64, symmetric=True, mid_rise=True)
    packed = pack_some(scheme, 64, 128)
    blocks = gguf_blocks.encode(scheme, packed, 128)
    assert blocks is not None
    assert blocks.kind.name == kind
    found = torch.from_numpy(dequantize(blocks.data, blocks.kind))
    assert torch.equal(found, formats.dequantize(scheme, packed, 128))


def test_offsets_that_are_float16_go_into_q4_1() -> None:
    scheme = AffineScheme(bits=4, group_size=32)
    codes = torch.arange(16).repeat(4, 4)
    packed = affine.pack(scheme, codes, torch.full((4, 2), 0.25), torch.full((4, 2), 3))
    blocks = gguf_blocks.encode(scheme, packed, 64)
    assert blocks is not None
    assert blocks.kind == GGMLQuantizationType.Q4_1
    assert dequantize(blocks.data, blocks.kind)[0, :16].tolist() == [(q - 3) * 0.25 for q in range(16)]


@pytest.mark.parametrize(
    "scheme",
    [
        AffineScheme(bits=8, group_size=32),
        AffineScheme(bits=4, group_size=16),
        DualBinaryScheme(group_size=32),
        TrellisScheme(),
    ],
)
def test_no_gguf_type_holds_these(scheme: AffineScheme | DualBinaryScheme | TrellisScheme) -> None:
    torch.manual_seed(0)
    assert gguf_blocks.encode(scheme, pack_some(scheme, 64, 128), 128) is None


@pytest.mark.parametrize("bits", [1, *WIDTHS])
@pytest.mark.parametrize("form", ["asymmetric", "symmetric", "mid-rise"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
def test_bits_are_those_of_what_is_encoded(bits: int, form: str, group_size: int) -> None:
    torch.manual_seed(bits)
    scheme = AffineScheme(bits=bits, group_size=group_size, symmetric=form != "asymmetric", mid_rise=form == "mid-rise")
    shape, packed = (64, 256), pack_some(scheme, 64, 256)
    v1 = functools.partial(gptq.encode, v1=scheme.symmetric)
    for layout, encode, refuses in (
        (gptq, v1, gptq.unsupported_reason),
        (auto_round, auto_round.encode, gptq.unsupported_reason),
        (compressed_tensors, compressed_tensors.encode, compressed_tensors.unsupported_reason),
        (mlx, mlx.encode, mlx.unsupported_reason),
    ):
        if refuses(scheme, shape) is None:
            stored = encode(scheme, packed, shape).values()
            assert layout.stored_bits(scheme, shape) == 8 * sum(tensor.nbytes for tensor in stored)
    blocks = gguf_blocks.encode(scheme, packed, 256)
    assert gguf_blocks.kind_of([scheme], 256) == (None if blocks is None else blocks.kind)


def test_zero_points_that_happen_to_fit_take_less_than_their_scheme() -> None:
    scheme = AffineScheme(bits=2, group_size=64)
    packed = affine.pack(scheme, torch.arange(4).repeat(32, 32), torch.full((32, 2), 0.1), torch.ones(32, 2))
    blocks = gguf_blocks.encode(scheme, packed, 128)
    assert blocks is not None
    assert blocks.kind == NewType.Q2_0
    assert gguf_blocks.kind_of([scheme], 128) == GGMLQuantizationType.Q4_0
    stored = mlx.encode(scheme, packed, (32, 128)).values()
    assert 8 * sum(tensor.nbytes for tensor in stored) < mlx.stored_bits(scheme, (32, 128))


def test_matrices_of_one_tensor_have_the_type_that_holds_them_all() -> None:
    two, four = (AffineScheme(bits=bits, group_size=64, symmetric=True) for bits in (2, 4))
    assert gguf_blocks.kind_of([two, four], 128) == GGMLQuantizationType.Q4_0
    assert gguf_blocks.kind_of([two, DualBinaryScheme(group_size=64)], 128) is None


@pytest.mark.parametrize("group_size", [256, 512, -1])
def test_six_bits_in_long_groups_are_gguf_blocks_with_factors_of_one(group_size: int) -> None:
    scheme = AffineScheme(bits=6, group_size=group_size, symmetric=True)
    packed = pack_some(scheme, 8, 512)
    packed["scales"][::2] *= -1
    blocks = gguf_blocks.encode(scheme, packed, 512)
    assert blocks is not None
    assert blocks.kind == GGMLQuantizationType.Q6_K == gguf_blocks.kind_of([scheme], 512)
    assert torch.equal(torch.from_numpy(dequantize(blocks.data, blocks.kind)), formats.dequantize(scheme, packed, 512))
    shorter = AffineScheme(bits=6, group_size=64, symmetric=True)
    assert gguf_blocks.kind_of([shorter], 512) == GGMLQuantizationType.Q8_0
