"""AWQ's words: eight outputs a word, the even ones first."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.foreign.packing import awq, read_back, refused, save_packed
from ulbq.models.foreign import awq as reader

SAID = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("said", [SAID, {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}])
def test_a_layer_is_what_its_words_say(said: dict[str, Any], tmp_path: Path) -> None:
    weights = save_packed(tmp_path, said, awq)
    source = read_back(tmp_path, weights)
    assert source.stored_as == ("AWQ w4g32", pytest.approx(4 + (4 + 16) / 32))


def test_words_by_hand() -> None:
    # Outputs 0 to 7 have the codes 0 to 7; from the lowest field on a word has those of 0, 2, 4, 6, 1, 3, 5, 7.
    tensors = {
        "qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x11111111]], dtype=torch.int32),
        "scales": torch.tensor([[0.5, 1, 1, 1, 1, 1, 1, 2]]).half(),
    }
    assert reader.decode(tensors).flatten().tolist() == [-0.5, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 12.0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": "gemv"}, "AWQ in the layout 'gemv"),
        ({"version": "gemv_fast"}, "'gemv_fast"),
        ({"backend": "llm-awq"}, "'llm-awq"),
        ({"bits": 3}, "3 bits"),
    ],
)
def test_layouts_that_are_not_read_are_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_packed(tmp_path, SAID | changes, awq)
    refused(tmp_path, named)


@pytest.mark.parametrize(
    "damage",
    [
        {"qzeros": None},
        {"qzeros": torch.ones(3, 8).int()},
        {"scales": torch.ones(2, 60).half()},
        {"scales": torch.ones(2, 64).int()},
        {"scales": torch.ones(3, 64).half(), "qzeros": torch.ones(3, 8).int()},
        {"qweight": torch.ones(64, 8)},
        {"qweight": torch.ones(64).int()},
    ],
)
def test_parts_that_do_not_fit(damage: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    save_packed(tmp_path, SAID, awq)
    refused(tmp_path, "stored otherwise than AWQ", damage)
