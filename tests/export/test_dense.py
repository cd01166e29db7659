from pathlib import Path

import pytest
import torch

from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq import formats
from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError
from ulbq.formats import BinaryMosScheme
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.convert import ConvertRequest, convert


def packed(scheme: BinaryMosScheme, folder: Path) -> ModelSource:
    parent = resolve(save_tiny("llama", folder / "parent"))
    return resolve(write_quantized(parent, folder / "packed", scheme))


def test_one_expert_is_a_dense_weight(tmp_path: Path) -> None:
    source = packed(BinaryMosScheme(experts=1, zeros="output"), tmp_path)
    out, _ = convert(ConvertRequest(source=str(source.path), dtype="fp32", out=tmp_path / "dense"))
    name = "model.layers.1.mlp.down_proj"
    weight = LazyTensors.folder(out).read(f"{name}.weight")
    assert torch.equal(weight, formats.dequantize(source.packed[name], source.read_packed(name), weight.shape[1]))


def test_a_mixture_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = packed(BinaryMosScheme(experts=2), tmp_path)
    with pytest.raises(InputError, match="anew for every token") as caught:
        convert(ConvertRequest(source=str(source.path), to="dense", out=tmp_path / "dense"))
    assert caught.value.hint == "Targets that can hold it: half."
    assert not list(tmp_path.glob("dense*"))
