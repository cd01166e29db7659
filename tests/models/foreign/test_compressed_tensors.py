"""compressed-tensors' integers in words and bytes, and its eight-bit floats."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.foreign.packing import (
    LAYER,
    along,
    down,
    read_back,
    refused,
    save_packed,
    say,
    some_codes,
    some_scales,
)
from ulbq.models.foreign import compressed_tensors as reader
from ulbq.models.source import resolve

Made = tuple[dict[str, torch.Tensor], torch.Tensor]


def said(layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    asked = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    group = {"targets": ["Linear"], "weights": asked, "format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def words_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole values, as many as fit into a word, as the library packed rows before June 2026."""
    fields = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % fields)).unflatten(1, (-1, fields))
    return (padded << torch.arange(fields) * bits).sum(-1).to(torch.int32)


def packed(rows: int, columns: int, *, bits: int = 4, symmetric: bool = False, older: bool = False,
           order: bool = False, group: int = 32) -> Made:  # fmt: skip
    groups = columns // group
    codes, zeros = some_codes(bits, rows, columns), some_codes(bits, rows, groups, seed=3)
    scales, at = some_scales(rows, groups).bfloat16(), torch.arange(columns) // group
    if order:
        at = at[torch.randperm(columns, generator=torch.Generator().manual_seed(5))]
    tensors = {
        ".weight_packed": (words_of if older else along)(codes, bits),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor([rows, columns]),
        **({".weight_g_idx": at.int()} if order else {}),
    }
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    else:
        tensors[".weight_zero_point"] = words_of(zeros.T, bits).T.contiguous() if older else down(zeros, bits)
    return tensors, (codes - zeros[:, at]) * scales.float()[:, at]


def whole(rows: int, columns: int, *, groups: int = 1, zeros: bool = False, per_tensor: bool = False) -> Made:
    """Integers of a byte."""
    codes, scales = some_codes(8, rows, columns) - 128, some_scales(1 if per_tensor else rows, groups).float()
    zero = some_codes(8, *scales.shape, seed=3) - 128
    tensors = {".weight": codes.to(torch.int8), ".weight_scale": scales.flatten() if per_tensor else scales}
    tensors |= {".weight_zero_point": zero.to(torch.int8).view(tensors[".weight_scale"].shape)} if zeros else {}
    wide = [part.repeat_interleave(columns // groups, 1) for part in (zero if zeros else zero * 0, scales)]
    return tensors, (codes - wide[0]) * wide[1]


def floats(rows: int, columns: int, *, grid: tuple[int, int] | None) -> Made:
    """Eight-bit floats with a scale for each of these blocks, for each row, or for all."""
    tall, wide = grid or (rows, columns)
    codes = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = some_scales(-(-rows // tall), -(-columns // wide)).float()
    weight = codes.float() * scales.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return {
        ".weight": codes,
        ".weight_scale": scales if grid else scales.view(1),
        ".input_scale": torch.ones(1),
    }, weight


def check(folder: Path, weights: dict[str, torch.Tensor], label: str) -> float:
    """Every weight is what it stands for; gives the bits of one."""
    source = read_back(folder, weights)
    assert source.stored_as is not None
    assert source.stored_as[0] == f"compressed-tensors {label}"
    return source.stored_as[1]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers_in_words(bits: int, older: bool, symmetric: bool, tmp_path: Path) -> None:
    pack = partial(packed, bits=bits, older=older, symmetric=symmetric)
    weights = save_packed(tmp_path, said(num_bits=bits, symmetric=symmetric), pack)
    found = check(tmp_path, weights, f"w{bits}g32")
    if bits in (2, 4, 8):
        shapes = 128 * len(weights) / sum(weight.numel() for weight in weights.values())
        assert found == pytest.approx(bits + (16 + (0 if symmetric else bits)) / 32 + shapes)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((0x88FAC688, 0xC688FAC6, 0xFAC688FA), id="one stream"),
        pytest.param((0o1076543210, 0o3210765432, 0o5432107654, 0o76), id="ten to a word"),
    ],
)
def test_words_by_hand(words: tuple[int, ...]) -> None:
    """Codes 0 to 7, four times, of three bits; the middle is 4."""
    signed = [word - (word >> 31 << 32) for word in words]
    tensors = {"weight_packed": torch.tensor([signed], dtype=torch.int32), "weight_shape": torch.tensor([1, 32])}
    found = reader.decode(tensors | {"weight_scale": torch.tensor([[0.5]])}, 3)
    assert found.flatten().tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5] * 4


def test_channels_and_an_order_of_inputs(tmp_path: Path) -> None:
    weights = save_packed(
        tmp_path / "a", said(strategy="channel", group_size=None), partial(packed, group=32, order=True)
    )
    check(tmp_path / "a", weights, "w4g32")
    one = lambda rows, columns: packed(rows, columns, group=columns, symmetric=True)  # noqa: E731
    check(tmp_path / "b", save_packed(tmp_path / "b", said(strategy="channel"), one), "w4")


@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("form", [{}, {"zeros": True}, {"groups": 2}, {"per_tensor": True, "zeros": True}])
def test_integers_of_a_byte(layout: str, form: dict[str, Any], tmp_path: Path) -> None:
    weights = save_packed(tmp_path, said(layout, num_bits=8, strategy="channel"), partial(whole, **form))
    source = read_back(tmp_path, weights)
    assert source.stored_as is not None
    assert source.stored_as[0].startswith("compressed-tensors w8")


@pytest.mark.parametrize("grid", [None, (1, 256), (24, 48)])
def test_eight_bit_floats(grid: tuple[int, int] | None, tmp_path: Path) -> None:
    block = {"strategy": "block", "block_structure": [24, 48]} if grid == (24, 48) else {"strategy": "channel"}
    weights = save_packed(
        tmp_path, said("float-quantized", num_bits=8, type="float", **block), partial(floats, grid=grid)
    )
    assert check(tmp_path, weights, "FP8") == pytest.approx(8, rel=0.1)


def test_inputs_that_are_rounded_elsewhere_are_told_of(tmp_path: Path) -> None:
    config = said()
    save_packed(tmp_path, config, packed)
    assert not resolve(tmp_path).notes
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    say(tmp_path, quantization_config=config)
    assert "inputs that are rounded" in resolve(tmp_path).notes[0]


def test_several_widths_tell_themselves_by_their_shapes(tmp_path: Path) -> None:
    config = said(num_bits=2)
    config["config_groups"]["group_1"] = said(num_bits=4)["config_groups"]["group_0"]
    pack = lambda rows, columns: packed(rows, columns, bits=2 if columns == 128 else 4)  # noqa: E731
    check(tmp_path, save_packed(tmp_path, config, pack), "w4g32")


LIBRARY: dict[str, tuple[dict[str, Any], Any]] = {
    "pack-quantized": (said(num_bits=3, symmetric=False), partial(packed, bits=3)),
    "naive-quantized": (said("naive-quantized", num_bits=8, symmetric=False), partial(whole, groups=2, zeros=True)),
    "float-quantized": (
        said("float-quantized", num_bits=8, type="float", strategy="block", group_size=None, block_structure=[24, 48]),
        partial(floats, grid=(24, 48)),
    ),
}


@pytest.mark.parametrize("layout", LIBRARY)
def test_the_library_itself_decompresses_to_the_same(layout: str, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config, pack = LIBRARY[layout]
    save_packed(tmp_path, config, pack)
    tensors = {short[1:]: tensor for short, tensor in pack(64, 64)[0].items()}
    if layout == "pack-quantized":
        tensors["weight_scale"] = tensors["weight_scale"].float()  # it computes in the scales' dtype
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    found = compressors.BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]
    assert torch.equal(resolve(tmp_path).read(f"{LAYER}.weight"), found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "mxfp6-pack-quantized"}, "'mxfp6-pack-quantized'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "with transforms"),
        ({"config_groups": []}, "stored otherwise"),
        ({"config_groups": [1]}, "'config_groups' in config.json"),
    ],
)
def test_layouts_that_are_not_read_are_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_packed(tmp_path, said() | changes, packed)
    refused(tmp_path, named)


@pytest.mark.parametrize(
    "damage",
    [
        {"weight_shape": None},
        {"weight_shape": torch.tensor([64, 70])},
        {"weight_shape": torch.tensor([60, 64])},
        {"weight_shape": torch.tensor([64, -64])},
        {"weight_shape": torch.tensor([64])},
        {"weight_packed": torch.ones(64, 6).int()},
        {"weight_packed": torch.ones(64, 8)},
        {"weight_packed": None},
        {"weight_scale": torch.ones(64, 3).half()},
        {"weight_scale": torch.ones(64, 2).int()},
        {"weight_scale": torch.ones(60, 2).half()},
        {"weight_zero_point": torch.ones(8, 3).int()},
        {"weight_zero_point": torch.ones(64, 3).to(torch.int8)},
        {"weight_g_idx": torch.ones(60).int()},
    ],
)
def test_parts_that_do_not_fit(damage: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    save_packed(tmp_path, said(), packed)
    refused(tmp_path, "stored otherwise than compressed-tensors", damage)


@pytest.mark.parametrize(
    "damage",
    [
        {"weight": torch.ones(64, 64)},
        {"weight": None},
        {"weight_scale": torch.ones(5, 2)},
        {"weight_zero_point": torch.ones(3, 2)},
    ],
)
def test_blocks_that_do_not_fit(damage: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    config = said("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[24, 48])
    save_packed(tmp_path, config, partial(floats, grid=(24, 48)))
    refused(tmp_path, "stored otherwise than compressed-tensors", damage)
