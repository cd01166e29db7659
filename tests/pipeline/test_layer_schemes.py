"""Whole runs in which every layer has a scheme of its own: written, reloaded, resumed, converted, adapted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.tiny import save_tiny
from tests.pipeline.columns import ByColumns, ColumnsOptions
from tests.pipeline.runs import TOKENS, StopAt, logits, request, shards, simulated_logits
from ulbq.artifacts.manifest import QuantizedManifest, read_manifest
from ulbq.config.convert import ConvertRequest
from ulbq.config.methods import METHOD_OPTIONS
from ulbq.formats import CodebookScheme
from ulbq.methods import METHODS
from ulbq.models.blocks import skeleton
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline import layout
from ulbq.pipeline.convert import convert
from ulbq.pipeline.inspect import inspect
from ulbq.pipeline.quantize import plan, quantize

OPTIONS: dict[str, Any] = {"method": "columns", "samples": 4, "sequence_length": 16, "precision": "fp32"}


@pytest.fixture(scope="module", autouse=True)
def _method() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "columns", ByColumns)
        patch.setitem(METHOD_OPTIONS, "columns", ColumnsOptions)
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("samples") / "tokens.safetensors"
    save_file({"tokens": torch.randint(3, 250, (6, 16), generator=torch.Generator().manual_seed(7)).int()}, path)
    return OPTIONS | {"calibration": str(path)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("deepseek", tmp_path_factory.mktemp("dense") / "deepseek")


@pytest.fixture(scope="module")
def path(dense: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for all tests to read."""
    return quantize(request(dense, tmp_path_factory.mktemp("made") / "q", **options))[0]


@pytest.fixture
def manifest(path: Path) -> QuantizedManifest:
    found = read_manifest(path)
    assert isinstance(found, QuantizedManifest)
    return found


def schemes(path: Path) -> dict[str, CodebookScheme]:
    found = resolve(path).packed
    assert all(isinstance(scheme, CodebookScheme) for scheme in found.values())
    return {name: scheme for name, scheme in found.items() if isinstance(scheme, CodebookScheme)}


def test_it_is_packed_and_reloads_to_the_simulated_model(dense: Path, path: Path, manifest: QuantizedManifest) -> None:
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    found = schemes(path)
    assert len(set(found.values())) > 4
    assert {layer.name: CodebookScheme.model_validate(layer.scheme) for layer in manifest.layers} == found
    assert manifest.scheme == CodebookScheme().model_dump(mode="json")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["bits"]) == ("codebook", 2)


def test_the_accounting_is_what_lies_on_disk(
    dense: Path, path: Path, manifest: QuantizedManifest, options: dict[str, Any], tmp_path: Path
) -> None:
    stored = [tensor for file in path.glob("model-*.safetensors") for tensor in load_file(file).values()]
    assert sum(manifest.bits.parts.values()) == 8 * sum(tensor.nbytes for tensor in stored)
    assert {"codes", "codebooks", "columns", "outliers"} < set(manifest.bits.parts)
    assert all(manifest.bits.parts[part] for part in ("codes", "codebooks", "columns", "outliers"))
    for layer in manifest.layers:
        packed = resolve(path).read_packed(layer.name)
        assert sum(layer.bits.values()) == 8 * sum(tensor.nbytes for tensor in packed.values())
    # What is told before: all columns of two bits.
    planned = plan(request(dense, tmp_path / "p", **options))
    assert 2 < planned.bits_per_weight < manifest.bits.bits_per_weight
    assert planned.scheme == "codebook cb2"


def test_an_interrupted_run_knows_the_schemes_of_the_finished_blocks(
    dense: Path, path: Path, manifest: QuantizedManifest, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    asked = request(dense, out, **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, StopAt(out, 1))
    resumed, again = quantize(asked)
    assert shards(resumed) == shards(path)
    assert again.layers == manifest.layers
    assert inspect(resumed, verify=True).manifest == read_manifest(resumed)


def test_the_quantized_stream_runs_through_what_the_shard_holds(dense: Path, path: Path) -> None:
    source = resolve(dense)
    prefix = "model.layers.1."
    own = {name.removeprefix(prefix): s for name, s in schemes(path).items() if name.startswith(prefix)}
    block = layout.packed_block(skeleton(source), 1, path / layout.block_shard(1), list(own), ByColumns.scheme, own)
    stored = load_file(path / layout.block_shard(1))
    assert {prefix + name for name in block.state_dict()} == set(stored)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, stored[prefix + name].to(tensor.dtype)), name


def test_converted_to_dense_it_gives_the_same_logits(path: Path, tmp_path: Path) -> None:
    plain, _ = convert(ConvertRequest(source=str(path), dtype="fp32", out=tmp_path / "plain"))
    torch.testing.assert_close(logits(plain), logits(path), atol=1e-5, rtol=1e-5)


def test_peft_puts_adapters_beside_it(path: Path) -> None:
    model = load_model(resolve(path), dtype=torch.float32)
    before = model(TOKENS).logits
    config = peft.LoraConfig(r=4, target_modules=["q_a_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    after = adapted(TOKENS).logits
    assert not torch.allclose(before, after)
    after.square().mean().backward()
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_a_proj")
    assert isinstance(layer.base_layer, QuantLinear)
    assert isinstance(layer.lora_A["default"], nn.Linear)
    assert layer.lora_A["default"].weight.grad is not None
    with adapted.disable_adapter():
        assert torch.equal(adapted(TOKENS).logits, before)
