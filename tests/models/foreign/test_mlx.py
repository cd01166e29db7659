"""MLX's affine layout, embeddings among it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.foreign.packing import along, change, read_back, refused, save_packed, say, some_codes, some_scales
from ulbq.models.source import resolve

EMBEDDING = "model.embed_tokens"


def mlx(rows: int, columns: int, *, bits: int = 4, group: int = 32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, scales = some_codes(bits, rows, columns), some_scales(rows, columns // group)
    biases = some_scales(rows, columns // group, seed=3)
    tensors = {".weight": along(codes, bits).view(torch.uint32), ".scales": scales, ".biases": biases}
    scale, bias = (part.float().repeat_interleave(group, 1) for part in (scales, biases))
    return tensors, codes * scale + bias


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_layer_is_what_its_words_say(bits: int, key: str, tmp_path: Path) -> None:
    said = {"group_size": 32, "bits": bits, "mode": "affine"}
    weights = save_packed(tmp_path, said, lambda *shape: mlx(*shape, bits=bits), key=key)
    source = read_back(tmp_path, weights)
    assert source.stored_as == (f"MLX w{bits}g32", pytest.approx(bits + 1))


def test_embeddings_and_layers_of_other_widths(tmp_path: Path) -> None:
    said: dict[str, Any] = {"group_size": 32, "bits": 4, EMBEDDING: {"group_size": 64, "bits": 8}, "lm_head": False}
    save_packed(tmp_path, said, mlx, key="quantization")
    rows, columns = load_file(tmp_path / "model.safetensors")[f"{EMBEDDING}.weight"].shape
    tensors, weight = mlx(rows, columns, bits=8, group=64)
    change(tmp_path, {f"{EMBEDDING}{short}": tensor for short, tensor in tensors.items()})
    assert torch.equal(resolve(tmp_path).read(f"{EMBEDDING}.weight"), weight)


def test_other_modes_are_named(tmp_path: Path) -> None:
    save_packed(tmp_path, {"group_size": 32, "bits": 4, "mode": "mxfp4"}, mlx, key="quantization")
    refused(tmp_path, "MLX in the layout 'mxfp4'")


@pytest.mark.parametrize(
    "damage",
    [
        {"biases": None},
        {"biases": torch.ones(64, 3).half()},
        {"scales": torch.ones(64, 2).int()},
        {"weight": torch.ones(64, 9).int().view(torch.uint32)},
        {"weight": torch.ones(64, 8)},
        {"weight": torch.ones(4, 64, 8).int().view(torch.uint32)},
    ],
)
def test_parts_that_do_not_fit(damage: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    save_packed(tmp_path, {"group_size": 32, "bits": 4}, mlx, key="quantization")
    refused(tmp_path, "stored otherwise than MLX", damage)


def test_a_width_that_the_words_have_not(tmp_path: Path) -> None:
    save_packed(tmp_path, {"group_size": 32, "bits": 4}, mlx, key="quantization")
    say(tmp_path, quantization={"group_size": 32, "bits": 8})
    refused(tmp_path, "stored otherwise than MLX")
