"""HQQ's layers, which bring their settings along."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.models.foreign.packing import LAYER, as_bytes, read_back, refused, save_packed, some_codes, some_scales
from ulbq.models.foreign.hqq import decode
from ulbq.models.source import resolve

SAID = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}
FIELDS = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4), 1: ("1bit_u8", 8)}


def hqq(rows: int, columns: int, *, bits: int = 4, axis: int = 1, seen: torch.dtype | None = None
        ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """Groups of 64."""
    count, (packing, fields) = rows * columns // 64, FIELDS[bits]
    codes = some_codes(bits, count, 64) if axis == 1 else some_codes(bits, 64, count)
    groups = (count, 1) if axis == 1 else (1, count)
    scale, zero = some_scales(*groups), some_scales(*groups, seed=3) * 100
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % fields)).unflatten(0, (fields, -1))
    words = sum(part << bits * (fields - 1 - index) for index, part in enumerate(padded))
    assert isinstance(words, torch.Tensor)
    words = words.to(torch.int32 if bits == 3 else torch.uint8)
    tensors = {
        ".W_q": words if seen is None else words.view(seen),
        **{".scale": scale, ".zero": zero, ".shape": torch.tensor([rows, columns]), ".packing": as_bytes(packing)},
        **{
            f".{name}": torch.tensor(value).int()
            for name, value in (("nbits", bits), ("group_size", 64), ("axis", axis))
        },
        **{
            ".view_as_float": torch.tensor(int(seen is not None)).byte(),
            ".stores_quant_config": torch.tensor(1).byte(),
        },
    }
    return tensors, ((codes - zero.float()) * scale.float()).reshape(rows, columns)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_layer_is_what_its_codes_say(bits: int, axis: int, tmp_path: Path) -> None:
    weights = save_packed(tmp_path, SAID, partial(hqq, bits=bits, axis=axis))
    source = read_back(tmp_path, weights)
    assert source.stored_as is not None
    assert source.stored_as[0] == f"HQQ w{bits}g64"
    assert source.stored_as[1] > bits + 0.5


def test_codes_that_are_seen_as_floats(tmp_path: Path) -> None:
    weights = save_packed(tmp_path, SAID, partial(hqq, seen=torch.float16))
    assert torch.equal(resolve(tmp_path).read(f"{LAYER}.weight"), weights[f"{LAYER}.weight"])


def test_codes_by_hand() -> None:
    """The first of two rows is in the upper half of a byte."""
    tensors = {"W_q": torch.tensor([[0x1F, 0x20]], dtype=torch.uint8)}
    tensors |= {"scale": torch.tensor([[0.5], [2.0]]), "zero": torch.tensor([[0.5], [8.0]])}
    found = decode(tensors, packing="4bit_u8", rows=2, shape=(1, 4))
    assert found.tolist() == [[0.25, 0.75, 14.0, -16.0]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"packing": as_bytes("5bit_u8")}, "HQQ in the layout '5bit_u8'"),
        ({"axis": None}, "without settings"),
        ({"scale": torch.ones(3, 1).half()}, "stored otherwise than HQQ"),
        ({"zero": torch.ones(64, 1).byte()}, "stored otherwise than HQQ"),
        ({"W_q": torch.ones(32, 60).byte()}, "stored otherwise than HQQ"),
        ({"shape": torch.tensor([64, 0])}, "stored otherwise than HQQ"),
        ({"shape": torch.tensor([64])}, "stored otherwise than HQQ"),
        ({"group_size": torch.tensor([64, 64])}, "stored otherwise than HQQ"),
        ({"group_size": torch.tensor(torch.inf)}, "stored otherwise than HQQ"),
        ({"axis": torch.tensor(2)}, "stored otherwise than HQQ"),
        ({"packing": torch.tensor([-1])}, "stored otherwise than HQQ"),
    ],
)
def test_parts_that_do_not_fit(damage: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    save_packed(tmp_path, SAID, hqq)
    refused(tmp_path, message, damage)
