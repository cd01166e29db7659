"""EXL3 folders that ``convert`` writes, read by the decoder that stands beside ours (``tests/models/test_exl3.py``)."""

import json
from pathlib import Path

import pytest
import torch

from tests.models.stored import pack_some, write_quantized
from tests.models.test_exl3 import MUL1, dense, inner
from tests.models.tiny import save_tiny
from ulbq.artifacts import verify
from ulbq.artifacts.shards import LazyTensors
from ulbq.config.adapter import AdapterConfig
from ulbq.config.convert import ConvertRequest
from ulbq.errors import InputError, UsageError
from ulbq.export.targets import exl3
from ulbq.formats import AffineScheme, TrellisScheme, dequantize, trellis
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.progress import Silent

TOKENS = torch.randint(3, 250, (1, 16), generator=torch.Generator().manual_seed(5))


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_layer_is_what_the_kernels_read(bits: int) -> None:
    torch.manual_seed(bits)
    scheme = TrellisScheme.model_validate({"bits": bits, "state_bits": 16})
    packed = pack_some(scheme, 128, 256)
    stored = exl3.encode(scheme, packed, (128, 256))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "trellis": (torch.int16, (16, 8, 16 * bits)),
        "suh": (torch.float16, (256,)),
        "svh": (torch.float16, (128,)),
        "mul1": (torch.int32, ()),
    }
    assert stored["mul1"].item() & 0xFFFFFFFF == MUL1
    assert exl3.stored_bits(scheme, (128, 256)) == 8 * sum(tensor.nbytes for tensor in stored.values())
    ours = trellis.inner_matrix(scheme, trellis.unpack(scheme, packed).codes)
    assert torch.equal(inner(stored["trellis"], "mul1").T, ours.half())
    weight, read = dequantize(scheme, packed, 256, torch.float64), dense(stored)
    # Values differ by their rounding to float16, which is at most 2^-11 of each.
    assert (weight - read).norm() < 2**-11 * weight.norm()
    assert torch.equal(exl3.decode(stored, bits), dequantize(scheme, packed, 256))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("parent") / "tiny"
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "attention_bias": True}
    return save_tiny("llama", place, tied=True, num_hidden_layers=2, num_key_value_heads=2, head_dim=64, **wide)


def artifact(parent: Path, out: Path, scheme: object = None, adapter: AdapterConfig | None = None) -> Path:
    return write_quantized(resolve(parent), out, scheme or TrellisScheme(bits=2, state_bits=16), adapter)


def test_a_folder(parent: Path, tmp_path: Path) -> None:
    source, notes = artifact(parent, tmp_path / "q"), Notes()
    path, _ = convert(ConvertRequest(source=str(source), engine="exllamav3", out=tmp_path / "e"), notes)
    assert notes.said[-1] == "Every layer reads back to the bit; opened again, and ran 8 tokens."
    assert "exllamav3 loads this as exl3 (trellis t2s16)." in notes.said[0]
    config = json.loads((path / "config.json").read_text())
    described = {name: value for name, value in config["quantization_config"].items() if name != "quantizer"}
    assert described == {
        "quant_method": "exl3",
        "version": "1.6.5",
        "bits": 2,
        "head_bits": 16,
        "calibration": {"rows": 0, "cols": 0},
        "out_scales": "always",
        "codebook": "mul1",
    }
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float16")
    stored = LazyTensors.folder(path)
    layer = "model.layers.1.self_attn.k_proj"
    shorts = {name.removeprefix(f"{layer}.") for name in stored.names if name.startswith(f"{layer}.")}
    assert shorts == {"trellis", "suh", "svh", "mul1", "bias"}
    assert {stored.dtype(name) for name in stored.names} == {torch.float16, torch.int16, torch.int32}
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in stored.names
    verify(path)
    # Opened as a model again, it computes what the artifact computes, its values rounded to float16.
    with torch.no_grad():
        ours, read = (load_model(resolve(place), dtype=torch.float32)(TOKENS).logits for place in (source, path))
    assert (ours - read).norm() < 2e-3 * ours.norm()


def test_an_adapter_lies_beside_and_is_not_merged(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=2, targets=("q_proj",)))
    _, manifest = convert(ConvertRequest(source=str(source), to="exl3", out=tmp_path / "e"))
    assert "adapter/adapter_model.safetensors" in manifest.files
    with pytest.raises(UsageError, match="cannot be merged"):
        convert(ConvertRequest(source=str(source), to="exl3", merge_adapter=True, out=tmp_path / "x"))


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        (AffineScheme(bits=2, group_size=32), "is affine w2g32, and EXL3 stores trellis codes"),
        (TrellisScheme(), "EXL3's states have 16 bits: quantize with `state_bits=16`"),
    ],
)
def test_what_exl3_does_not_hold_is_refused(scheme: object, why: str, parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", scheme)
    with pytest.raises(InputError, match=why) as refused:
        convert(ConvertRequest(source=str(source), to="exl3", out=tmp_path / "x"))
    assert "dense" in refused.value.hint


def test_widths_of_other_blocks_are_refused(tmp_path: Path) -> None:
    source = artifact(save_tiny("llama", tmp_path / "tiny"), tmp_path / "q")
    with pytest.raises(InputError, match=r"Hadamard blocks of 128, which do not divide 64×64"):
        convert(ConvertRequest(source=str(source), to="exl3", out=tmp_path / "x"))


def test_a_model_that_the_engine_has_otherwise_is_refused(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    source = artifact(save_tiny("phi3", tmp_path / "tiny", **wide), tmp_path / "q")
    with pytest.raises(InputError, match=r"exllamav3 1\.6\.5 has no 'phi3' with these layers"):
        convert(ConvertRequest(source=str(source), engine="exllamav3", out=tmp_path / "x"))


def test_an_exl3_folder_becomes_dense(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q")
    packed, _ = convert(ConvertRequest(source=str(source), to="exl3", out=tmp_path / "e"))
    path, _ = convert(ConvertRequest(source=str(packed), to="dense", dtype="fp32", out=tmp_path / "d"))
    name = "model.layers.0.mlp.up_proj"
    stored = {short: LazyTensors.folder(packed).read(f"{name}.{short}") for short in ("trellis", "suh", "svh")}
    assert torch.allclose(resolve(path).read(f"{name}.weight"), dense(stored).float(), atol=1e-5)
