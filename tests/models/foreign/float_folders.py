"""Tiny checkpoints as makers publish them in FP8, FP4 and MXFP4."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from tests.models.tiny import save_tiny, tiny_tokenizer

BLOCK = (24, 48)
"""Divides neither the 64 rows and columns of the tiny models nor their 128."""

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def eight_bits(
    weight: torch.Tensor, block: tuple[int, int] | None, *, exponents: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 codes ``[out, in]`` and scales, one for each block; ``exponents`` makes them powers of two in E8M0."""
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
    return codes, scales.to(torch.float8_e8m0fnu) if exponents else scales


def pairs(rows: int, columns: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 ``[rows, columns/2]`` of random E2M1 codes, the lower half first, and the values that they stand for."""
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), E2M1[codes]


def save_fp8(family: str, folder: Path, *, block: tuple[int, int] | None = BLOCK, exponents: bool = False) -> Path:
    """A tiny model with the weights of its blocks in FP8."""
    save_tiny(family, folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for name, weight in list(stored.items()):
        if "layers." not in name or not name.endswith("_proj.weight"):
            continue
        stored[name], stored[f"{name}_scale_inv"] = eight_bits(weight, block, exponents=exponents)
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


def save_deepseek_v4(folder: Path) -> Path:
    """A tiny DeepSeek-V4: experts in FP4, the other matrices of its blocks in FP8, scales in E8M0 called ``scale``."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "head_dim": 16, "num_attention_heads": 4, "o_groups": 2}
    sizes |= {"q_lora_rank": 32, "o_lora_rank": 32, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 256, "sliding_window": 8}
    config = DeepseekV4Config(num_hidden_layers=2, mlp_layer_types=["hash_moe", "moe"], **sizes)
    torch.manual_seed(0)
    DeepseekV4ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for number, (name, weight) in enumerate(list(stored.items())):
        scales = f"{name.removesuffix('weight')}scale"
        if ".experts." in name:
            codes, _ = pairs(*weight.shape, seed=number)
            powers = torch.full((weight.shape[0], weight.shape[1] // 32), 2.0**-6)
            stored[name], stored[scales] = codes.view(torch.int8), powers.to(torch.float8_e8m0fnu)
        elif name.rsplit(".", 2)[-2] in ("wq_a", "wq_b", "wo_b", "w1", "w2", "w3") and ".indexer." not in name:
            stored[name], stored[scales] = eight_bits(weight, (16, 32), exponents=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": "fp8", "weight_block_size": [16, 32], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    return _say(folder, said | {"activation_scheme": "dynamic"})


def _say(folder: Path, quantization: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder
