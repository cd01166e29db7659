"""Tiny checkpoints as makers publish them in FP8 and MXFP4."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import save_tiny

BLOCK = (24, 48)
"""Divides neither the 64 rows and columns of the tiny models nor their 128."""


def save_fp8(family: str, folder: Path, *, block: tuple[int, int] | None = BLOCK, exponents: bool = False) -> Path:
    """A tiny model with the weights of its blocks in FP8; ``exponents`` makes the scales powers of two in E8M0."""
    save_tiny(family, folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for name, weight in list(stored.items()):
        if "layers." not in name or not name.endswith("_proj.weight"):
            continue
        rows, columns = block or weight.shape
        grid = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scale = weight[part].float().abs().max() / 448
                grid[i, j] = torch.exp2(torch.log2(scale).ceil()) if exponents else scale
                codes[part] = (weight[part].float() / grid[i, j]).to(torch.float8_e4m3fn)
        scales = grid if block else grid.reshape(())
        stored[name] = codes
        stored[f"{name}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if exponents else scales
        if block is None:
            stored[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(1.0)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": block and list(block)}
    return _say(folder, said | {"activation_scheme": "dynamic" if block else "static"})


def save_mxfp4(folder: Path) -> Path:
    """A tiny gpt-oss whose experts are random MXFP4."""
    save_tiny("gpt_oss", folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name in list(stored):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = stored.pop(name).shape
            shape = (experts, rows, columns // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return _say(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def _say(folder: Path, quantization: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder
