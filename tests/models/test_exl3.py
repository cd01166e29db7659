"""EXL3's folders: layers against a decoder of their own, written down from exllamav3's kernels (1.6.5)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.evaluation.sample import write_mirror
from tests.models.tiny import save_tiny
from tests.told import Ulbq
from ulbq.errors import InputError
from ulbq.models import exl3
from ulbq.models.load import load_model
from ulbq.models.source import resolve

TOKENS = torch.randint(3, 250, (1, 16), generator=torch.Generator().manual_seed(5))
MUL1, MCG = 0x83DCD12D, 0xCBAC1FED
LAYER = "model.layers.0.mlp.down_proj"


def value(state: int, code: str) -> np.float16:
    """Of one state, as a kernel computes it in half precision."""
    if code == "mul1":
        total = 0x6400 + sum((state * MUL1 & 0xFFFFFFFF).to_bytes(4, "little"))
        # A fused multiply-add rounds once; in double precision it is exact before.
        halves = [float(np.uint16(bits).view(np.float16)) for bits in (total, 0x1EEE, 0xC931)]
        return np.float16(halves[0] * halves[1] + halves[2])
    product = state * MCG if code == "mcg" else state * 89226354 + 64248484
    word = (product & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = (np.uint16(half).view(np.float16) for half in (word & 0xFFFF, word >> 16))
    return np.float16(low + high)


def inner(stored: torch.Tensor, code: str) -> torch.Tensor:
    """``[in, out]`` float16 between the transforms: bit by bit, element by element."""
    height, width, count = stored.shape
    found = np.zeros((16 * height, 16 * width), dtype=np.float16)
    table: dict[int, np.float16] = {}
    for row, column in np.ndindex(height, width):
        words = stored[row, column].numpy().view(np.uint16).reshape(-1, 2)
        # The two halves of a 32-bit word lie the lower one first; its highest bit is the first one.
        ring = "".join(f"{half:016b}" for low, high in words.tolist() for half in (high, low))
        for element in range(256):
            end = (element + 1) * count // 16
            state = int((ring + ring)[len(ring) + end - 16 : len(ring) + end], 2)
            thread, place = element // 8, element % 8
            r, c = thread % 4 * 2 + (0, 1, 8, 9)[place % 4], thread // 4 + (0, 8)[place // 4]
            found[16 * row + r, 16 * column + c] = table.setdefault(state, value(state, code))
    return torch.from_numpy(found)


def hadamard(size: int) -> torch.Tensor:
    """Blocks of 128 on a diagonal, in double precision."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]
    return torch.block_diag(*[torch.tensor(signs, dtype=torch.float64) / 128**0.5] * (size // 128))


def dense(tensors: dict[str, torch.Tensor], code: str = "mul1") -> torch.Tensor:
    """``[out, in]`` in double precision."""
    su, sv = tensors["suh"].double(), tensors["svh"].double()
    turned = hadamard(len(su)) @ inner(tensors["trellis"], code).double() @ hadamard(len(sv))
    return (su.unsqueeze(1) * turned * sv).T


def some_layer(bits: float, code: str, outs: int = 128, columns: int = 256) -> dict[str, torch.Tensor]:
    """A random layer."""
    generator = torch.Generator().manual_seed(int(4 * bits))
    size = (columns // 16, outs // 16, int(16 * bits))
    tensors = {"trellis": torch.randint(-(1 << 15), 1 << 15, size, generator=generator, dtype=torch.int16)}
    tensors |= {name: torch.randn(n, generator=generator).half() for name, n in (("suh", columns), ("svh", outs))}
    marker = {"mul1": MUL1, "mcg": MCG}.get(code)
    return tensors | ({} if marker is None else {code: torch.tensor(marker, dtype=torch.uint32).view(torch.int32)})


@pytest.mark.parametrize(
    ("bits", "code"), [(1, "mul1"), (2, "mcg"), (2.5, "mul1"), (3, "mul1"), (4, "3inst"), (6, "mul1"), (8, "mcg")]
)
def test_a_layer_decodes_as_the_kernels_decode_it(bits: float, code: str) -> None:
    tensors = some_layer(bits, code)
    assert torch.equal(exl3.inner_matrix(tensors).T, inner(tensors["trellis"], code))
    expected = dense(tensors, code)
    assert (exl3.decode(tensors) - expected).norm() < 1e-6 * expected.norm()


def test_packed_signs_of_older_folders() -> None:
    tensors = some_layer(2, "mcg")
    signs = {name: torch.where(tensors[name] < 0, -1.0, 1.0).half() for name in ("suh", "svh")}
    older = {name: tensors[name] for name in ("trellis", "mcg")}
    for name, vector in signs.items():
        words = ((vector < 0).unflatten(0, (-1, 16)) * 2 ** torch.arange(16)).sum(-1)
        older[name.removesuffix("h")] = words.to(torch.int16)
    assert torch.equal(exl3.decode(older), exl3.decode(tensors | signs))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with one layer as EXL3, a head of as many rows as 128 divides, and what exllamav3 says of it."""
    model = save_tiny("llama", tmp_path / "m", tied=False, vocab=250, hidden_size=128, intermediate_size=256)
    change(model, some_layer(2, "mul1"), LAYER)
    change(model, some_layer(6, "mul1", outs=256, columns=128), "lm_head")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "exl3", "bits": 2.0, "head_bits": 6, "codebook": "mul1"}
    (model / "config.json").write_text(json.dumps(config))
    return model


def change(model: Path, tensors: dict[str, torch.Tensor], layer: str) -> None:
    """Store a layer otherwise."""
    stored = {name: t for name, t in load_file(model / "model.safetensors").items() if not name.startswith(layer)}
    stored |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_is_read_as_what_its_layers_stand_for(folder: Path) -> None:
    source = resolve(folder)
    assert torch.equal(source.read(f"{LAYER}.weight"), exl3.decode(some_layer(2, "mul1")))
    head = exl3.decode(some_layer(6, "mul1", outs=256, columns=128))
    assert torch.equal(source.read("lm_head.weight"), head[:250])
    weights = 128 * 256
    bits = 2 * weights + 6 * weights + 2 * 16 * (128 + 256) + 2 * 32
    assert source.stored_as == ("EXL3", pytest.approx(bits / (weights + 250 * 128)))
    assert load_model(source, dtype=torch.float32)(TOKENS).logits.isfinite().all()


def test_it_is_evaluated_and_generated_from(ulbq: Ulbq, folder: Path, tmp_path: Path) -> None:
    write_mirror(tmp_path / "mirror")
    here = ("--device", "cpu", "--offline")
    asked = ("--perplexity", "wikitext2", "--context", "32", "--limit", "2", "--data-dir", tmp_path / "mirror")
    told = ulbq("eval", folder, *asked, *here, "-o", tmp_path / "e")
    assert told.code == 0, told.err
    assert "EXL3" in told.err + told.out
    told = ulbq("generate", folder, "-p", "Line 7", "-n", "4", *here)
    assert told.code == 0, told.err
    told = ulbq("quantize", folder, "--method", "rtn", "--group-size", "32", "--dry-run")
    assert "stored as EXL3 (" in told.err


@pytest.mark.parametrize(
    "damage",
    [
        {"suh": torch.ones(128).half()},
        {"svh": torch.ones(128)},
        {"trellis": torch.zeros(16, 8, 36, dtype=torch.int16)},
        {"trellis": torch.zeros(16, 8, 144, dtype=torch.int16)},
        {"trellis": torch.zeros(16, 8, dtype=torch.int16)},
        {"trellis": torch.zeros(16, 0, 32, dtype=torch.int16), "svh": torch.ones(0).half()},
        {"trellis": torch.zeros(16, 8, 8, dtype=torch.int16)},
        {"mul1": torch.zeros(2, dtype=torch.int32)},
        {"trellis": torch.zeros(16, 7, 32, dtype=torch.int16), "svh": torch.ones(112).half()},
    ],
)
def test_a_layer_of_another_layout_is_refused(folder: Path, damage: dict[str, torch.Tensor]) -> None:
    change(folder, some_layer(2, "mul1") | damage, LAYER)
    with pytest.raises(InputError, match=rf"'{LAYER}' is stored otherwise than EXL3"):
        resolve(folder)


def test_an_unknown_code_is_refused(folder: Path) -> None:
    change(folder, some_layer(2, "mul1") | {"mul1": torch.tensor(7, dtype=torch.int32)}, LAYER)
    with pytest.raises(InputError, match="stored otherwise than EXL3"):
        resolve(folder).read(f"{LAYER}.weight")
