"""How other tools pack integers, written apart from the library: streams as one large number, words as they say it."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import save_tiny
from ulbq.errors import InputError
from ulbq.models.source import ModelSource, resolve

LAYER = "model.layers.0.self_attn.q_proj"
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stream(values: Iterable[int], bits: int) -> list[int]:
    """Values as one stream of bits, the first in the lowest, in signed 32-bit words."""
    listed = list(values)
    number = sum(value << bits * index for index, value in enumerate(listed))
    words = [number >> 32 * index & 0xFFFFFFFF for index in range(-(-len(listed) * bits // 32))]
    return [word - (word >> 31 << 32) for word in words]


def down(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of each column of codes, from the top: ``[n, m]`` to ``[n·b/32, m]``."""
    return torch.tensor([stream(column, bits) for column in codes.T.tolist()], dtype=torch.int32).T.contiguous()


def along(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of each row of codes: ``[n, m]`` to ``[n, m·b/32]``."""
    return down(codes.T, bits).T.contiguous()


def some_codes(bits: int, rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    """int64 ``[rows, columns]``."""
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


def some_scales(*shape: int, seed: int = 2) -> torch.Tensor:
    """float16 around 0.01, some negative."""
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(shape, generator=generator) + 0.5) / 100
    return torch.where(torch.rand(shape, generator=generator) < 0.2, -scales, scales).half()


Packer = Callable[[int, int], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""From ``(out, in)`` to a layer's tensors, by what follows its name, and the weight that they stand for."""


def gptq(
    rows: int, columns: int, *, bits: int = 4, group: int = 32, v1: bool = True, order: bool = False, index: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A layer as GPTQ stores it; with ``order``, its inputs belong to groups in no order."""
    codes = some_codes(bits, columns, rows)
    groups = torch.arange(columns) // group
    if order:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(5))]
    count = -(-columns // group)
    zeros, scales = some_codes(bits, count, rows, seed=3).clamp(1), some_scales(count, rows)
    tensors = {
        ".qweight": down(codes, bits),
        ".qzeros": along(zeros - int(v1), bits),
        ".scales": scales,
        **({".g_idx": groups.int()} if index else {}),
    }
    return tensors, ((codes - zeros[groups]) * scales.float()[groups]).T


def awq(rows: int, columns: int, *, group: int = 32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A layer as AWQ's ``gemm`` stores it."""
    codes, zeros = some_codes(4, columns, rows), some_codes(4, columns // group, rows, seed=3)
    scales = some_scales(columns // group, rows)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    mixed = [part.unflatten(1, (-1, 8))[:, :, order].flatten(1) for part in (codes, zeros)]
    tensors = {".qweight": along(mixed[0], 4), ".qzeros": along(mixed[1], 4), ".scales": scales}
    zero, scale = (part.float().repeat_interleave(group, 0) for part in (zeros, scales))
    return tensors, ((codes - zero) * scale).T


def quartets(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n/2, 1]`` of four-bit codes, two a byte, the first in the upper half."""
    flat = codes.flatten()
    return (flat[::2] << 4 | flat[1::2]).to(torch.uint8).unsqueeze(1)


def as_bytes(text: str) -> torch.Tensor:
    """uint8 of a text."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def save_packed(
    folder: Path,
    said: dict[str, Any],
    pack: Packer,
    *,
    family: str = "llama",
    key: str = "quantization_config",
    **more: Any,
) -> dict[str, torch.Tensor]:
    """A tiny model whose blocks are packed; gives the weights that they stand for, by stored name."""
    save_tiny(family, folder, **more)
    stored, weights = load_file(folder / "model.safetensors"), {}
    for name, weight in list(stored.items()):
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in LAYERS or "layers." not in name:
            continue
        del stored[name]
        tensors, weights[name] = pack(*weight.shape)
        stored |= {f"{layer}{short}": tensor.clone() for short, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, **{key: said})
    return weights


def read_back(folder: Path, weights: Mapping[str, torch.Tensor]) -> ModelSource:
    """The checkpoint, each of whose packed weights is what it stands for."""
    source = resolve(folder)
    for name, weight in weights.items():
        assert torch.equal(source.read(name), weight), name
    return source


def refused(folder: Path, message: str, damage: Mapping[str, torch.Tensor | None] | None = None) -> None:
    """It is not taken, where one of its layers is damaged so."""
    if damage:
        change(folder, {f"{LAYER}.{short}": tensor for short, tensor in damage.items()})
    with pytest.raises(InputError, match=message):
        resolve(folder)


def say(folder: Path, **changes: Any) -> None:
    """Change ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Change stored tensors; None takes one away."""
    stored = load_file(folder / "model.safetensors")
    stored |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    kept = {name: tensor for name, tensor in stored.items() if name not in tensors or tensors[name] is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
