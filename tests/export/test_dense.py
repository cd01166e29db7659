from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq import formats
from ulbq.errors import InputError
from ulbq.export.dense import write_dense
from ulbq.formats import BinaryMosScheme
from ulbq.models.source import ModelSource, resolve


def packed(scheme: BinaryMosScheme, folder: Path) -> ModelSource:
    parent = resolve(save_tiny("llama", folder / "parent"))
    return resolve(write_quantized(parent, folder / "packed", scheme))


def test_one_expert_is_a_dense_weight(tmp_path: Path) -> None:
    scheme = BinaryMosScheme(experts=1, zeros="output")
    source = packed(scheme, tmp_path)
    out = tmp_path / "dense"
    out.mkdir()
    write_dense(source, out, torch.float32)
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    name = "model.layers.1.mlp.down_proj"
    weight = stored[f"{name}.weight"]
    assert torch.equal(weight, formats.dequantize(scheme, source.read_packed(name), weight.shape[1]))


def test_a_mixture_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = packed(BinaryMosScheme(experts=2), tmp_path)
    out = tmp_path / "dense"
    out.mkdir()
    with pytest.raises(InputError, match="anew for every token") as caught:
        write_dense(source, out, torch.float32)
    assert "one expert" in caught.value.hint
    assert not list(out.iterdir())
