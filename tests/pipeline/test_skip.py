"""Layers that are left out stay in full precision, whatever the method, and through every export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import save_tiny
from tests.pipeline.runs import StopAt, logits, request, shards, simulated_logits
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.config.convert import ConvertRequest
from ulbq.errors import UsageError
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import plan, quantize

_SKIP = ("layers.0", "mlp.down_proj")
_LEFT = (1, 2)
_SIZE: dict[str, Any] = {"samples": 4, "sequence_length": 16, "precision": "fp32"}
_TRAINED = {**_SIZE, "epochs": 1, "batch_size": 2, "group_size": 32}
_END = {"end_to_end": "kl", "end_to_end_epochs": 1}


def names(manifest: QuantizedManifest) -> set[str]:
    return {layer.name for layer in manifest.layers}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"group_size": 32}),
        ("gptq", {**_SIZE, "group_size": 32}),
        ("claq", {**_SIZE, "target_bits": 3.0, "bits": 2}),
        ("trellis", {**_SIZE, "target_bits": 2.5, "bits": 2}),
        ("db-llm", {**_TRAINED, "fit_temperature": True}),
        ("efficientqat", {**_TRAINED, **_END}),
        ("apiq", {**_TRAINED, "rank": 4}),
    ],
)
def test_it_stays_as_it_is_by_every_method(
    method: str, options: dict[str, Any], tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    own = {} if method == "rtn" else {"calibration": str(samples)}
    asked = request(tiny_llama, tmp_path / "q", method=method, skip=_SKIP, allow_partial=False, **options, **own)
    path, manifest = quantize(asked)
    parts = [f"self_attn.{one}_proj" for one in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]
    assert names(manifest) == {f"model.layers.{block}.{part}" for block in _LEFT for part in parts}
    assert manifest.coverage is not None
    assert {kept.why for kept in manifest.coverage.kept if "layers" in kept.name} == {"left out, as asked"}
    assert not any("of the weights in the blocks" in said for said in manifest.warnings)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(resolve(path).read(name), resolve(tiny_llama).read(name).to(torch.bfloat16))
    if method != "apiq":
        torch.testing.assert_close(logits(path), simulated_logits(tiny_llama, path), atol=1e-4, rtol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    options = {"method": "gptq", "calibration": str(samples), **_SIZE, "group_size": 32, "skip": _SKIP}
    straight, _ = quantize(request(tiny_llama, tmp_path / "s", **options))
    with pytest.raises(KeyboardInterrupt):
        quantize(request(tiny_llama, tmp_path / "q", **options), StopAt(tmp_path / "q", 2))
    resumed, _ = quantize(request(tiny_llama, tmp_path / "q", **options))
    assert shards(resumed) == shards(straight)


@pytest.mark.parametrize("target", ["dense", "gptq", "compressed-tensors", "gguf"])
def test_exports_hold_it_dense(target: str, tiny_llama: Path, tmp_path: Path) -> None:
    options = {"bits": 4, "group_size": 32, "symmetric": True}
    path, _ = quantize(request(tiny_llama, tmp_path / "q", method="rtn", skip=_SKIP, **options))
    out, _ = convert(ConvertRequest(source=str(path), to=target, out=tmp_path / target))
    if target != "gguf":
        stored = {name for file in out.glob("*.safetensors") for name in load_file(file)}
        assert {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= stored
    if target == "gptq":
        text = (out / "quantize_config.json").read_text()
        assert r"-:^model\\.layers\\.1\\.mlp\\.down_proj$" in text


def test_an_artifact_goes_on_with_its_layers(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    first, made = quantize(request(tiny_llama, tmp_path / "a", method="rtn", bits=2, group_size=32, only=("mlp",)))
    options = {"method": "efficientqat", "bits": 2, "calibration": str(samples), **_TRAINED}
    with pytest.raises(UsageError, match="`skip` means nothing to an artifact"):
        plan(request(first, tmp_path / "b", skip=("mlp",), **options))
    _, manifest = quantize(request(first, tmp_path / "b", **options))
    assert names(manifest) == names(made)
    assert len(manifest.layers) == 9


def test_a_router_stays_without_a_word_from_anybody(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "mamba_dt_rank": 4, "mamba_d_state": 4}
    kinds = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    dense = save_tiny("jamba", tmp_path / "m", num_hidden_layers=2, **sizes, **kinds)
    path, manifest = quantize(request(dense, tmp_path / "q", method="rtn", group_size=32))
    assert not [name for name in names(manifest) if "dt_proj" in name or "router" in name]
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
