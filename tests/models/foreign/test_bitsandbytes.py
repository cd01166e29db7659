"""bitsandbytes' four bits in a table of values, with scales in full and in eight bits, and its rows of eight bits."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.foreign.packing import (
    LAYER,
    as_bytes,
    change,
    quartets,
    read_back,
    refused,
    save_packed,
    some_codes,
    some_scales,
)

SAID = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def nf4(rows: int, columns: int, *, nested: bool = False, seen: torch.dtype | None = None
        ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """Blocks of 64, and 16 of their scales to a nested one."""
    codes, count = some_codes(4, rows, columns), rows * columns // 64
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    largest = some_scales(count).float()
    words = quartets(codes)
    tensors = {".weight": words if seen is None else words.view(-1, 2).view(seen), ".weight.quant_map": NF4}
    if nested:
        table = torch.linspace(-1, 1, 256)
        tensors |= {".weight.absmax": some_codes(8, count, 1).flatten().to(torch.uint8)}
        tensors |= {".weight.nested_quant_map": table, ".weight.nested_absmax": some_scales(-(-count // 16)).float()}
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        wide = tensors[".weight.nested_absmax"].repeat_interleave(16)[:count]
        largest = table[tensors[".weight.absmax"].long()] * wide + 0.25
    else:
        tensors |= {".weight.absmax": largest}
    tensors |= {".weight.quant_state.bitsandbytes__nf4": as_bytes(json.dumps(state))}
    return tensors, (NF4[codes].view(-1, 64) * largest.unsqueeze(1)).view(rows, columns)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("seen", [None, torch.bfloat16])
def test_a_layer_is_what_its_codes_say(nested: bool, seen: torch.dtype | None, tmp_path: Path) -> None:
    weights = save_packed(tmp_path, SAID, partial(nf4, nested=nested, seen=seen))
    source = read_back(tmp_path, weights)
    assert source.stored_as is not None
    assert source.stored_as[0] == "bitsandbytes NF4"
    # A scale of 32 bits, or of 8 and a part of 32, for 64 weights; the rest is the same for a layer of any size.
    assert source.stored_as[1] > 4 + (10 / 64 if nested else 0.5)


def test_codes_by_hand() -> None:
    """Two codes a byte, the upper half first; of a block's largest value, here 2 and 4."""
    tensors, _ = nf4(2, 64)
    from ulbq.models.foreign.bitsandbytes import decode

    tensors = {
        "weight": torch.full((64, 1), 0xF0, dtype=torch.uint8),
        "quant_map": NF4,
        "absmax": torch.tensor([2.0, 4.0]),
    }
    found = decode(tensors, shape=(2, 64), sizes=(64, 1), offset=0.0)
    assert found[:, :3].tolist() == [[2.0, -2.0, 2.0], [4.0, -4.0, 4.0]]


def test_rows_of_eight_bits(tmp_path: Path) -> None:
    def rows_of(rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes, largest = some_codes(8, rows, columns) - 128, some_scales(rows).float().abs()
        tensors = {
            ".weight": codes.to(torch.int8),
            ".SCB": largest,
            ".weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return tensors, codes * (largest / 127).unsqueeze(1)

    weights = save_packed(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, rows_of)
    source = read_back(tmp_path, weights)
    assert source.stored_as == ("bitsandbytes w8", pytest.approx(8.5, abs=0.3))
    change(tmp_path, {f"{LAYER}.SCB": torch.ones(63)})
    refused(tmp_path, "stored otherwise than bitsandbytes")


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "damage",
    [
        {"weight.absmax": None},
        {"weight.absmax": torch.ones(63)},
        {"weight.absmax": torch.ones(64).byte()},
        {"weight.quant_map": torch.ones(15)},
        {"weight": torch.ones(2047, 1).byte()},
        {STATE: as_bytes("[]")},
        {STATE: as_bytes("{")},
        {STATE: as_bytes('{"shape": [64, 64], "blocksize": 0}')},
        {STATE: as_bytes('{"shape": [64, 60], "blocksize": 64}')},
        {STATE: as_bytes('{"shape": [-64, -64], "blocksize": 64}')},
        {STATE: as_bytes('{"shape": 64, "blocksize": 64}')},
        {STATE: as_bytes('{"shape": [64, Infinity], "blocksize": 64}')},
        {STATE: as_bytes(" " * 70000)},
        {"weight.nested_absmax": torch.ones(4)},
    ],
)
def test_parts_that_do_not_fit(damage: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    save_packed(tmp_path, SAID, nf4)
    refused(tmp_path, "stored otherwise than bitsandbytes", damage)
