"""The plug-in for vLLM beside a stand-in for it; vLLM itself runs in test_vllm_itself.py."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq.artifacts.shards import LazyTensors
from ulbq.config.adapter import AdapterConfig
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, UsageError
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, CodebookScheme, DualBinaryScheme, TrellisScheme
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.quantize import quantize

PLUGIN = Path(__file__).resolve().parents[2] / "plugins" / "vllm"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}


class Linear(nn.Module):
    """vLLM's ``LinearBase``, as far as the plug-in meets it."""

    def __init__(self, config: Any, prefix: str, columns: int, rows: list[int]) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(self, columns, rows, columns, sum(rows), torch.float32, weight_loader=None)


class Experts(nn.Module):
    """vLLM's ``RoutedExperts``."""


class Stub(ModuleType):
    """A module of vLLM whose names are given, or classes with nothing in them."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self: setattr(self, "packed_modules_mapping", {})})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the plug-in registers; ``lora`` is vLLM's configuration of adapters."""
    found: dict[str, Any] = {"lora": None}
    layers = "vllm.model_executor.layers"
    given: dict[str, dict[str, Any]] = {
        "vllm.config": {
            "get_current_vllm_config_or_none": lambda: SimpleNamespace(lora_config=found["lora"]),
        },
        f"{layers}.fused_moe": {"RoutedExperts": Experts},
        f"{layers}.linear": {"LinearBase": Linear},
        f"{layers}.quantization": {
            "register_quantization_config": lambda name: lambda kind: found.setdefault(name, kind)
        },
        f"{layers}.quantization.base_config": {},
        "vllm.model_executor.utils": {
            "set_weight_attrs": lambda parameter, values: [setattr(parameter, *item) for item in values.items()]
        },
    }
    for name, values in given.items():
        for parent in [name.rsplit(".", up)[0] for up in range(name.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or Stub(parent))
        vars(sys.modules[name]).update(values)
    monkeypatch.syspath_prepend(str(PLUGIN))
    for name in ("ulbq_vllm", "ulbq_vllm.packed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import_module("ulbq_vllm").register()
    return found


def configured(registered: dict[str, Any], folder: Path) -> Any:
    config = registered["ulbq"].from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = FUSED
    return config


def load(layer: Linear, stored: LazyTensors, prefix: str, names: list[str]) -> Linear:
    """What vLLM's loader does: each stored tensor to the parameter of its name, with the shard that it is of."""
    for name in names:
        for full in sorted(stored.names):
            if full.startswith(f"{prefix}.{name}."):
                parameter = layer.get_parameter(full.rpartition(".")[2])
                shard = (SHARDS[name],) if len(names) > 1 else ()
                parameter.weight_loader(parameter, stored.read(full), *shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize(
    "scheme",
    [
        AffineScheme(bits=2, group_size=32),
        DualBinaryScheme(group_size=32),
        BinaryMosScheme(experts=2),
        CodebookScheme(bits=2),
        TrellisScheme.model_validate({"bits": 2}),
    ],
    ids=lambda scheme: scheme.format,
)
def test_fused_layers_compute_their_parts(scheme: AnyScheme, registered: dict[str, Any], tmp_path: Path) -> None:
    source = write_quantized(resolve(save_tiny("llama", tmp_path / "dense")), tmp_path / "q", scheme)
    block = load_model(resolve(source), dtype=torch.float32).model.layers[0]
    stored, config = LazyTensors.folder(source), configured(registered, source)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for fused, parent in (("qkv_proj", "self_attn"), ("gate_up_proj", "mlp"), ("o_proj", "self_attn")):
        names, prefix = FUSED.get(fused, [fused]), f"model.layers.0.{parent}"
        parts = [block.get_submodule(f"{parent}.{name}") for name in names]
        layer = Linear(config, f"{prefix}.{fused}", 64, [part.out_features for part in parts])
        load(layer, stored, prefix, names)
        bias = torch.randn(sum(part.out_features for part in parts))
        expected = torch.cat([part(x) for part in parts], -1)
        assert torch.equal(layer.quant_method.apply(layer, x), expected)
        assert torch.equal(layer.quant_method.apply(layer, x, bias), expected + bias)
        assert dict(layer.named_parameters(recurse=False)).keys() == {"weight"}


def test_a_part_may_be_dense_and_a_guard_is_none(registered: dict[str, Any], tmp_path: Path) -> None:
    source = write_quantized(resolve(save_tiny("llama", tmp_path / "dense")), tmp_path / "q", AffineScheme(bits=2))
    layer = Linear(configured(registered, source), "model.layers.0.mlp.gate_up_proj", 64, [128, 128])
    stored, weight = LazyTensors.folder(source), torch.randn(128, 64)
    for full in stored.names:
        if ".layers.0.mlp.up_proj." in full:
            parameter = layer.get_parameter(full.rpartition(".")[2])
            parameter.weight_loader(parameter, stored.read(full), 1)
    layer.weight.weight_loader(layer.weight, weight, 0)
    layer.weight.weight_loader(layer.weight, torch.empty(0), 1)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 64)
    assert torch.equal(layer.quant_method.apply(layer, x)[:, :128], x @ weight.T)
    # A whole layer that the scheme could not hold, and no tensors at all.
    lone = Linear(configured(registered, source), "model.layers.0.odd", 60, [12])
    lone.weight.weight_loader(lone.weight, torch.ones(12, 60))
    lone.quant_method.process_weights_after_loading(lone)
    assert lone.quant_method.apply(lone, torch.ones(1, 60)).tolist() == [[60.0] * 12]
    empty = Linear(configured(registered, source), "model.layers.0.mlp.down_proj", 128, [64])
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.down_proj' is stored otherwise .*: 'codes' must be"):
        empty.quant_method.process_weights_after_loading(empty)


def test_what_vllm_cannot_have(registered: dict[str, Any], tmp_path: Path) -> None:
    dense = resolve(save_tiny("llama", tmp_path / "dense"))
    plain = configured(registered, write_quantized(dense, tmp_path / "q", AffineScheme(bits=2)))
    with pytest.raises(UsageError, match="fuses experts"):
        plain.get_quant_method(Experts(), "model.layers.0.mlp.experts")
    assert plain.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    assert plain.get_quant_method(nn.Embedding(2, 2), "") is None
    asked = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True, "embedding_bits": 8}
    made, _ = quantize(QuantizeRequest(source=str(dense.path), out=tmp_path / "t", device="cpu", offline=True, **asked))
    tables = configured(registered, made)
    for name in ("model.embed_tokens", ""):
        with pytest.raises(UsageError, match="no packed embeddings"):
            tables.get_quant_method(nn.Embedding(2, 2), name)
    method = Linear(plain, "model.layers.0.mlp.up_proj", 64, [128]).quant_method
    for columns, rows in ((32, 128), (64, 64)):
        with pytest.raises(UsageError, match="not split over devices"):
            method.create_weights(nn.Module(), columns, [rows], 64, 128, torch.float32)


def test_an_adapter_is_not_forgotten(registered: dict[str, Any], tmp_path: Path) -> None:
    dense = resolve(save_tiny("llama", tmp_path / "dense"))
    source = write_quantized(dense, tmp_path / "q", AffineScheme(bits=2), AdapterConfig(rank=2))
    config = configured(registered, source)
    with pytest.raises(UsageError, match="trained with an adapter") as caught:
        Linear(config, "model.layers.0.mlp.up_proj", 64, [128])
    assert "--enable-lora" in caught.value.hint
    registered["lora"] = object()
    assert Linear(config, "model.layers.0.mlp.up_proj", 64, [128])


def test_the_plug_in_is_found_by_its_entry_point() -> None:
    import tomllib

    said = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert said["entry-points"] == {"vllm.general_plugins": {"ulbq": "ulbq_vllm:register"}}
