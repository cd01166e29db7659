"""Trellis codes: layout to the bit by words computed by hand, round trips, values, and the transforms around them."""

import math

import pytest
import torch

from ulbq.formats import TrellisScheme, bits_per_weight, dequantize, read_scheme, trellis
from ulbq.formats.trellis import Trellis

SCHEMES = [TrellisScheme(bits=bits, state_bits=state) for bits in (1, 2, 3, 4) for state in (12, 16)]
by_label = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
WIDTHS = {16: 16, 48: 16, 192: 64, 576: 64, 1536: 128, 4096: 128}


def random_trellis(scheme: TrellisScheme, outs: int, columns: int, seed: int = 0) -> Trellis:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << scheme.bits, (columns // 16, outs // 16, 256), generator=generator, dtype=torch.uint8)
    su, sv = (torch.randn(count, generator=generator).half().float() for count in (columns, outs))
    return Trellis(codes, su, sv)


@by_label
@pytest.mark.parametrize(("outs", "columns"), [(16, 16), (48, 576), (192, 1536)])
def test_round_trip(scheme: TrellisScheme, outs: int, columns: int) -> None:
    made = random_trellis(scheme, outs, columns)
    packed = trellis.pack(scheme, made)
    specs = scheme.tensors(outs, columns)
    assert {name: tuple(t.shape) for name, t in packed.items()} == {name: spec.shape for name, spec in specs.items()}
    assert {name: str(t.dtype) for name, t in packed.items()} == {n: f"torch.{s.dtype}" for n, s in specs.items()}
    assert all(torch.equal(*pair) for pair in zip(trellis.unpack(scheme, packed), made, strict=True))
    stored = sum(8 * tensor.nbytes for tensor in packed.values())
    assert bits_per_weight(scheme, outs, columns) == stored / (outs * columns)
    assert stored == scheme.bits * outs * columns + 16 * (outs + columns)


# Of one bit the last element is the last bit of the last word; of three the eleventh lies across two words.
@pytest.mark.parametrize(
    ("bits", "element", "code", "octets"),
    [
        (1, 0, 1, {3: 0x80}),
        (1, 255, 1, {28: 0x01}),
        (2, 0, 3, {3: 0xC0}),
        (2, 16, 1, {7: 0x40}),
        (2, 255, 2, {60: 0x02}),
        (3, 10, 0b101, {0: 0x02, 7: 0x80}),
        (3, 255, 7, {92: 0x07}),
        (4, 1, 0xA, {3: 0x0A}),
        (4, 8, 0x9, {7: 0x90}),
    ],
)
def test_words_by_hand(bits: int, element: int, code: int, octets: dict[int, int]) -> None:
    codes = torch.zeros(1, 1, 256, dtype=torch.uint8)
    codes[0, 0, element] = code
    packed = trellis.pack(TrellisScheme(bits=bits), Trellis(codes, torch.ones(16), torch.ones(16)))["codes"][0, 0]
    assert {int(place): int(packed[place]) for place in packed.nonzero()} == octets


@pytest.mark.parametrize(
    ("element", "row", "column"),
    [(0, 0, 0), (1, 1, 0), (2, 8, 0), (3, 9, 0), (4, 0, 8), (8, 2, 0), (31, 15, 8), (32, 0, 1), (255, 15, 15)],
)
def test_where_elements_lie_by_hand(element: int, row: int, column: int) -> None:
    """Input ``row`` and output ``column`` of a tile."""
    sequence = torch.zeros(1, 1, 256)
    sequence[0, 0, element] = 1.0
    assert trellis.from_sequences(sequence).nonzero().tolist() == [[column, row]]


def test_a_tile_of_one_code_by_hand() -> None:
    """States of a lone code at the end of a sequence go on at its beginning; values are sums of a product's bytes."""
    scheme = TrellisScheme(bits=2, state_bits=16)
    codes = torch.zeros(1, 1, 256, dtype=torch.uint8)
    codes[0, 0, 254] = 3
    states = trellis.states(scheme, codes)[0, 0]
    assert states[254:].tolist() == [3, 12]
    assert states[:7].tolist() == [48, 192, 768, 3072, 12288, 49152, 0]
    # 3 · 0x83DCD12D = 0x18B967387, whose last four bytes are 139 + 150 + 115 + 135 = 539.
    found = trellis.inner_matrix(scheme, codes)
    k, b = 0.00676727294921875, -10.3828125
    assert found[15, 14] == torch.tensor(1024 + 539) * k + b
    assert found[3, 3] == torch.tensor(1024) * k + b


@by_label
def test_states_end_with_their_own_bits(scheme: TrellisScheme) -> None:
    codes = random_trellis(scheme, 16, 16).codes[0, 0]
    bits = "".join(f"{int(code):0{scheme.bits}b}" for code in codes)
    found = trellis.states(scheme, codes)
    for element in (0, 1, 5, 100, 255):
        end = (element + 1) * scheme.bits
        assert int(found[element]) == int((bits + bits)[: end + len(bits)][-scheme.state_bits :], 2)


def test_values_of_16_bits_are_those_of_exl3s_mul1() -> None:
    """It puts the sum of bytes behind the exponent of a float16 of 1024, and multiplies and adds with one rounding."""
    state = torch.arange(1 << 16)
    product = (state * 0x83DCD12D) % 2**32
    sums = sum((product // 256**byte) % 256 for byte in range(4))
    behind = (0x6400 + torch.as_tensor(sums)).to(torch.int16).view(torch.float16)
    k, b = torch.tensor([0x1EEE, 0xC931 - 0x10000]).to(torch.int16).view(torch.float16).double()
    wanted = (behind.double() * k + b).half()
    assert torch.equal(trellis.values(16).half(), wanted)


@pytest.mark.parametrize("state_bits", trellis.MULTIPLIERS)
def test_values_are_about_normal(state_bits: int) -> None:
    values = trellis.values(state_bits)
    assert values.shape == (1 << state_bits,)
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05


@pytest.mark.parametrize(("width", "block"), WIDTHS.items())
def test_the_transform_is_hadamards_of_blocks_mixed_where_they_are_narrow(width: int, block: int) -> None:
    assert trellis.block_width(width) == block
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    wanted = (x.view(3, -1, block) @ matrix / math.sqrt(block)).view(3, width)
    if block < 128:
        count = width // block
        angles = [[2 * math.pi * i * j / count for j in range(count)] for i in range(count)]
        hartley = torch.tensor([[math.cos(a) + math.sin(a) for a in row] for row in angles], dtype=torch.float64)
        wanted = torch.einsum("ij,njb->nib", hartley / math.sqrt(count), wanted.view(3, count, block)).reshape(3, width)
    torch.testing.assert_close(trellis.transform(x), wanted)
    torch.testing.assert_close(trellis.transform(wanted), x)


@by_label
def test_the_weight_is_what_layers_compute(scheme: TrellisScheme) -> None:
    """``sv ⊙ H(T · H(su ⊙ x))``, and nothing but rounding apart from the product with the weight."""
    made = random_trellis(scheme, 48, 192)
    packed = trellis.pack(scheme, made)
    weight = dequantize(scheme, packed, 192, torch.float64)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inner = trellis.inner_matrix(scheme, made.codes).double()
    wanted = made.sv * trellis.transform(trellis.transform(x * made.su) @ inner.T)
    torch.testing.assert_close(x @ weight.T, wanted)
    assert torch.equal(dequantize(scheme, packed, 192), dequantize(scheme, packed, 192).contiguous())
    torch.testing.assert_close(dequantize(scheme, packed, 192), weight.float())


def test_sequences_and_back() -> None:
    inner = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trellis.from_sequences(trellis.sequences(inner)), inner)


def test_the_scheme() -> None:
    scheme = TrellisScheme(bits=3, state_bits=16)
    assert read_scheme(scheme.model_dump()) == scheme
    assert scheme.label == "t3s16"
    assert scheme.group_size == -1
    with pytest.raises(ValueError, match="576 × 40 weights cannot be cut into tiles of 16 × 16"):
        scheme.tensors(576, 40)
