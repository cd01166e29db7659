import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from ulbq import formats
from ulbq.export import gguf_blocks
from ulbq.formats import KQuantScheme, k_quant
from ulbq.formats.bits import stored_bits
from ulbq.formats.k_quant import KQuant

BITS = (2, 3, 4)
OUT, IN = 3, 512


def random_matrix(scheme: KQuantScheme) -> KQuant:
    """Numbers of the whole range, factors of both signs."""
    generator = torch.Generator().manual_seed(scheme.bits)
    groups, (least, most) = IN // scheme.group_size, scheme.sub_range
    minima = torch.randn(2, OUT, IN // 256, generator=generator).half().float()
    sub = torch.randint(least, most + 1, (OUT, groups), generator=generator).float()
    below = torch.randint(most + 1, (OUT, groups), generator=generator).float()
    if scheme.symmetric:
        minima[1], below = 0, torch.zeros_like(below)
    codes = torch.randint(2**scheme.bits, (OUT, IN), generator=generator, dtype=torch.uint8)
    return KQuant(codes, minima[0], sub, minima[1], below, torch.full((OUT, 1), scheme.centre))


@pytest.mark.parametrize("bits", BITS)
def test_dequantized_as_by_hand(bits: int) -> None:
    scheme = KQuantScheme.model_validate({"bits": bits})
    matrix = random_matrix(scheme)
    packed = k_quant.pack(scheme, matrix)
    for row, column in ((0, 0), (1, 255), (2, 256), (2, 511), (0, 40)):
        block, group = column // 256, column // scheme.group_size
        scale = float(matrix.factors[row, block]) * float(matrix.sub_scales[row, group])
        offset = float(matrix.minima[row, block]) * float(matrix.sub_minima[row, group])
        by_hand = scale * (float(matrix.codes[row, column]) - scheme.centre) - offset
        found = formats.dequantize(scheme, packed, IN, torch.float64)
        assert found[row, column].item() == by_hand
        assert formats.dequantize(scheme, packed, IN)[row, column] == torch.tensor(by_hand, dtype=torch.float32)


@pytest.mark.parametrize("bits", BITS)
def test_unpacked_as_packed(bits: int) -> None:
    scheme = KQuantScheme.model_validate({"bits": bits})
    matrix = random_matrix(scheme)
    packed = k_quant.pack(scheme, matrix)
    assert {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in packed.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in scheme.tensors(OUT, IN).items()
    }
    assert all(map(torch.equal, k_quant.unpack(scheme, packed, IN), matrix))


@pytest.mark.parametrize(
    ("bits", "label", "bytes_a_block", "parts"),
    [
        (2, "q2_k", 84, {"codes": 2, "scales": 5 / 16, "zeros": 5 / 16}),
        (3, "q3_k", 110, {"codes": 3, "scales": 7 / 16}),
        (4, "q4_k", 144, {"codes": 4, "scales": 1 / 4, "zeros": 1 / 4}),
    ],
)
def test_bits_are_those_of_llama_cpps_blocks(
    bits: int, label: str, bytes_a_block: int, parts: dict[str, float]
) -> None:
    scheme = KQuantScheme.model_validate({"bits": bits})
    assert scheme.label == label
    assert formats.bits_per_weight(scheme, OUT, IN) == 8 * bytes_a_block / 256
    specs = scheme.tensors(OUT, IN)
    assert {role: count / (OUT * IN) for role, count in stored_bits(specs).items()} == parts


@pytest.mark.parametrize("bits", BITS)
def test_gguf_decodes_the_blocks_to_the_same_weights(bits: int) -> None:
    scheme = KQuantScheme.model_validate({"bits": bits})
    packed = k_quant.pack(scheme, random_matrix(scheme))
    blocks = gguf_blocks.encode(scheme, packed, IN)
    assert blocks is not None
    assert blocks.kind.name == scheme.label.upper()
    assert gguf_blocks.kind_of([scheme], IN) == blocks.kind
    decoded = gguf.dequantize(blocks.data, GGMLQuantizationType(blocks.kind))
    assert np.array_equal(decoded, formats.dequantize(scheme, packed, IN).numpy())


def test_one_block_byte_by_byte() -> None:
    scheme = KQuantScheme(bits=2)
    columns = torch.arange(256)
    matrix = KQuant(
        codes=((columns // 32) % 4).to(torch.uint8).unsqueeze(0),
        factors=torch.tensor([[0.5]]),
        sub_scales=torch.arange(16.0).unsqueeze(0),
        minima=torch.tensor([[2.0]]),
        sub_minima=torch.arange(15.0, -1, -1).unsqueeze(0),
        centre=torch.zeros(1, 1),
    )
    blocks = gguf_blocks.encode(scheme, k_quant.pack(scheme, matrix), 256)
    assert blocks is not None
    # Scale i and minimum 15 - i a byte; 0, 1, 2 and 3 in each byte of codes; 0.5 and 2 in float16.
    scales = bytes(i | (15 - i) << 4 for i in range(16))
    assert blocks.data.tobytes() == scales + bytes([0b11100100]) * 64 + bytes([0x00, 0x38, 0x00, 0x40])


def test_what_another_scheme_has_fits_no_k_type_and_the_other_way_round() -> None:
    two, three = KQuantScheme(bits=2), KQuantScheme(bits=3)
    assert gguf_blocks.kind_of([two, three], IN) is None
    affine = formats.AffineScheme(bits=2, group_size=256)
    assert gguf_blocks.kind_of([two, affine], IN) is None
    assert gguf_blocks.kind_of([affine], IN) == GGMLQuantizationType.Q4_0


def test_widths_that_256_does_not_divide_are_no_matrix() -> None:
    assert KQuantScheme().unsupported_reason(64, 576) == "super-blocks of 256 do not divide its 576 inputs"
    assert KQuantScheme().unsupported_reason(576, 1536) is None
