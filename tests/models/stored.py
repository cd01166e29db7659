"""Made-up artifacts: random packed weights and adapters, written as ulbq writes them."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.formats.columns import random_columns
from ulbq import formats
from ulbq.artifacts import (
    ArtifactWriter,
    BitsReport,
    LayerRecord,
    Manifest,
    QuantizedManifest,
)
from ulbq.artifacts.shards import write_index, write_shard
from ulbq.formats import (
    AnyScheme,
    BinaryMosScheme,
    CodebookScheme,
    DualBinaryScheme,
    TrellisScheme,
    affine,
    binary_mos,
    codebook,
    dual_binary,
    trellis,
)
from ulbq.models.adapter_files import ADAPTER_FOLDER, write_adapter
from ulbq.models.blocks import skeleton, structure
from ulbq.models.skeleton import empty_model
from ulbq.models.source import ModelSource
from ulbq.nn.adapter import Adapter, AdapterConfig


def pack_some(scheme: AnyScheme, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    """Random packed weights of about a trained weight's size."""
    groups = 1 if scheme.group_size == -1 else in_features // scheme.group_size
    scales = torch.rand(out_features, groups) * 0.1 + 0.05
    if isinstance(scheme, DualBinaryScheme):
        planes = torch.randint(0, 2, (2, out_features, in_features))
        return dual_binary.pack(scheme, planes, torch.stack([2 * scales, -scales]))
    if isinstance(scheme, BinaryMosScheme):
        experts, signs = scheme.experts, torch.randn(out_features, in_features)
        inner, outer = torch.rand(experts, in_features) * 0.3, torch.rand(experts, out_features) * 0.3
        router = torch.randn(experts, in_features) if experts > 1 else None
        shift = {"none": None, "output": torch.randn(out_features) / 9, "input": torch.randn(in_features) / 9}
        return binary_mos.pack(scheme, signs, inner, outer, router, shift[scheme.zeros])
    if isinstance(scheme, TrellisScheme):
        sequences = torch.randint(0, 2**scheme.bits, (in_features // 16, out_features // 16, 256), dtype=torch.uint8)
        return trellis.pack(
            scheme, trellis.Trellis(sequences, torch.randn(in_features), 0.1 * torch.randn(out_features))
        )
    if isinstance(scheme, CodebookScheme):
        columns = random_columns(out_features, [scheme.bits] * in_features)[1]
        return codebook.pack(scheme, columns._replace(codebooks=(0.1 * columns.codebooks).half().float()))
    codes = torch.randint(0, 2**scheme.bits, (out_features, in_features))
    zeros = None if scheme.symmetric else torch.randint(0, 2**scheme.bits, (out_features, groups))
    return affine.pack(scheme, codes, scales, zeros)


def common(**changes: Any) -> dict[str, Any]:
    return {"name": "tiny-w3", "request": {}, "seed": 0, "device": "cpu"} | changes


def random_adapters(
    config: AdapterConfig, weights: dict[str, torch.Tensor], generator: torch.Generator
) -> dict[str, Adapter]:
    """Adapters that change the weights ``[out, in]`` a good deal, rounded as they are stored."""
    adapters = {}
    for name, weight in weights.items():
        adapter = Adapter(config, weight.shape[1], weight.shape[0], generator=generator)
        adapter.init_magnitude(weight)
        with torch.no_grad():
            adapter.lora_b.copy_(torch.randn(adapter.lora_b.shape, generator=generator) * 0.1)
            if adapter.magnitude is not None:
                adapter.magnitude.mul_(torch.rand(weight.shape[0], generator=generator) + 0.5)
        adapter.assign(adapter.tensors())
        adapters[name] = adapter
    return adapters


def write_random_adapter(folder: Path, config: AdapterConfig, weights: dict[str, torch.Tensor]) -> None:
    """An adapter folder for those of the layers that the config targets."""
    chosen = {name: weight for name, weight in weights.items() if config.matches(name)}
    adapters = random_adapters(config, chosen, torch.Generator().manual_seed(11))
    tensors = {f"{name}.{short}": t for name, adapter in adapters.items() for short, t in adapter.tensors().items()}
    write_adapter(folder, config, tensors, "someone/Tiny-1B")


def plan_all(writer: ArtifactWriter) -> None:
    """Have an artifact consist of all that was written."""
    files = (path.relative_to(writer.path) for path in writer.path.rglob("*") if path.is_file())
    writer.plan(*(path.as_posix() for path in files if not path.name.startswith(".")))


def write_quantized(
    parent: ModelSource,
    out: Path,
    scheme: AnyScheme,
    adapter: AdapterConfig | None = None,
    *,
    fused_experts: bool = False,
    **changes: Any,
) -> Path:
    """An artifact with random packed weights in place of the parent's linear layers, and a random adapter.

    With ``fused_experts`` those of a mixture stay dense and fused, as older artifacts have them.
    """
    torch.manual_seed(0)
    model = empty_model(parent.config) if fused_experts else skeleton(parent)
    found = structure(model)
    with ArtifactWriter(out, "f") as writer:
        shards: dict[str, dict[str, torch.Tensor]] = {}
        packed_names = set()
        weights = {}
        layers = []
        for index, linears in enumerate(found.linears):
            shard = shards.setdefault(f"model-block-{index:05d}.safetensors", {})
            for linear in linears:
                packed = pack_some(scheme, linear.out_features, linear.in_features)
                shard |= {f"{linear.name}.{short}": tensor for short, tensor in packed.items()}
                packed_names.add(f"{linear.name}.weight")
                weights[linear.name] = formats.dequantize(scheme, packed, linear.in_features)
                shape = (linear.out_features, linear.in_features)
                record = {"name": linear.name, "shape": shape, "scheme": scheme.model_dump(), "bits": {}, "error": 0.0}
                layers.append(LayerRecord(**record))
        kept = (parent.names & model.state_dict().keys()) - packed_names
        shards["model-outer.safetensors"] = {name: parent.read(name) for name in kept}
        for file, tensors in shards.items():
            write_shard(writer.path / file, tensors)
        write_index(writer.path, {file: list(tensors) for file, tensors in shards.items()})
        config = parent.config.to_dict() | {"quantization_config": {"quant_method": "ulbq", "method": "rtn"}}
        (writer.path / "config.json").write_text(json.dumps(config))
        parent.save_tokenizer_files(writer.path)
        if adapter is not None:
            write_random_adapter(writer.path / ADAPTER_FOLDER, adapter, weights)
        fields = {
            "method": "rtn",
            "scheme": scheme.model_dump(),
            "bits": BitsReport(parts={"codes": 1}, weights=1),
            "layers": tuple(layers),
        }
        plan_all(writer)
        return writer.finish(QuantizedManifest(**common(**(fields | changes))))


def write_manifest_over(folder: Path, out: Path, manifest: Manifest) -> Path:
    """An artifact with the files of a model folder."""
    with ArtifactWriter(out, "f") as writer:
        for file in folder.iterdir():
            (writer.path / file.name).write_bytes(file.read_bytes())
        plan_all(writer)
        return writer.finish(manifest)
