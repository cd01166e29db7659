import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models.tiny import FAMILIES, save_tiny
from ulbq import formats
from ulbq.artifacts import (
    ArtifactWriter,
    BitsReport,
    ConvertedManifest,
    EvaluationManifest,
    LayerRecord,
    Manifest,
    Parent,
    QuantizedManifest,
)
from ulbq.artifacts.shards import write_index, write_shard
from ulbq.config.adapter import AdapterConfig
from ulbq.errors import InputError
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme, affine, binary_mos, dual_binary
from ulbq.models.adapter_files import ADAPTER_FOLDER, write_adapter
from ulbq.models.blocks import load_block, skeleton, structure
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.adapter import Adapter
from ulbq.nn.quant_linear import QuantLinear

_TOKENS = torch.arange(64).view(2, 32)
_SCHEMES = [
    AffineScheme(bits=3, group_size=32),
    AffineScheme(bits=2, group_size=-1, symmetric=True),
    DualBinaryScheme(group_size=16),
    BinaryMosScheme(experts=1, zeros="input"),
]


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
    **changes: Any,
) -> Path:
    """An artifact with random packed weights in place of the parent's linear layers, and a random adapter."""
    torch.manual_seed(0)
    found = structure(skeleton(parent))
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
        shards["model-outer.safetensors"] = {name: parent.read(name) for name in parent.names - packed_names}
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


@pytest.fixture
def parent(tmp_path: Path) -> ModelSource:
    """Has biases, which a packed layer keeps dense, and a tied head."""
    return resolve(save_tiny("qwen2", tmp_path / "parent", tied=True))


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_transformers(self, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
        folder = save_tiny(family, tmp_path)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = load_model(resolve(folder), dtype=dtype)
        with torch.no_grad():
            assert torch.equal(model(_TOKENS).logits, reference(_TOKENS).logits)
        assert model.dtype == dtype
        assert not model.training
        assert model.generation_config.to_dict() == reference.generation_config.to_dict()

    def test_broken_generation_config_is_named(self, tmp_path: Path) -> None:
        folder = save_tiny("llama", tmp_path)
        (folder / "generation_config.json").write_text("{")
        with pytest.raises(InputError, match=r"generation_config\.json' cannot be read"):
            load_model(resolve(folder), dtype=torch.float32)

    def test_generates(self, tiny_llama: Path) -> None:
        source = resolve(tiny_llama)
        model = load_model(source, dtype=torch.float32)
        inputs = source.tokenizer()("Once", return_tensors="pt")
        out = model.generate(inputs.input_ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert out.shape == (1, inputs.input_ids.shape[1] + 5)


class TestPacked:
    @pytest.mark.parametrize("scheme", _SCHEMES, ids=lambda scheme: f"{scheme.format}-{scheme.label}")
    def test_equals_the_dense_model_with_dequantized_weights(
        self, parent: ModelSource, scheme: AnyScheme, tmp_path: Path
    ) -> None:
        source = resolve(write_quantized(parent, tmp_path / "q", scheme))
        dense = AutoModelForCausalLM.from_pretrained(parent.path)
        with torch.no_grad():
            for name in source.packed:
                linear = dense.get_submodule(name)
                packed = source.read_packed(name)
                linear.weight.copy_(formats.dequantize(scheme, packed, linear.in_features))
            model = load_model(source, dtype=torch.float32)
            # Both sum in float32, in another order; random weights of this size let the difference grow.
            torch.testing.assert_close(model(_TOKENS).logits, dense(_TOKENS).logits, atol=1e-4, rtol=0)
        assert len(source.packed) == 21
        assert all(isinstance(model.get_submodule(name), QuantLinear) for name in source.packed)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])

    def test_generates(self, parent: ModelSource, tmp_path: Path) -> None:
        model = load_model(resolve(write_quantized(parent, tmp_path / "q", _SCHEMES[0])), dtype=torch.bfloat16)
        out = model.generate(_TOKENS[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert out.shape == (1, 35)

    def test_source_of_an_artifact(self, parent: ModelSource, tmp_path: Path) -> None:
        parents = tuple(
            Parent(kind=kind, name="x", path=path, sha256="0" * 64)
            for kind, path in (("saliency", "artifacts/s"), ("hub", "someone/Tiny-1B"))
        )
        path = write_quantized(parent, tmp_path / "q", _SCHEMES[0], parents=parents)
        source = resolve(path)
        assert (source.kind, source.parent) == ("artifact", "someone/Tiny-1B")
        assert source.manifest is not None
        assert source.content_hash == source.manifest.digest
        assert getattr(source.config, "quantization_config", None) is None
        assert "model.layers.0.self_attn.q_proj.bias" in source.names
        assert "model.layers.0.self_attn.q_proj.weight" not in source.names
        assert source.read_packed("model.layers.0.self_attn.q_proj").keys() == {"codes", "scales", "zeros"}

    def test_block_of_an_artifact(self, parent: ModelSource, tmp_path: Path) -> None:
        source = resolve(write_quantized(parent, tmp_path / "q", _SCHEMES[2]))
        block = load_block(skeleton(source), source, 2, torch.float32)
        stored = load_file(source.path / "model-block-00002.safetensors")
        codes = block.get_submodule("mlp.up_proj").tensors()["codes"]
        assert torch.equal(codes, stored["model.layers.2.mlp.up_proj.codes"])

    def test_tensors_that_do_not_fit_the_manifest_are_refused(self, parent: ModelSource, tmp_path: Path) -> None:
        written = resolve(write_quantized(parent, tmp_path / "q", _SCHEMES[0])).manifest
        assert isinstance(written, QuantizedManifest)
        other = AffineScheme(bits=2, group_size=32).model_dump()
        layers = tuple(layer.model_copy(update={"scheme": other}) for layer in written.layers)
        source = resolve(write_quantized(parent, tmp_path / "q2", _SCHEMES[0], layers=layers))
        with pytest.raises(InputError, match=r"q_proj' otherwise than its manifest says: 'codes' must be uint8"):
            load_model(source, dtype=torch.float32)

    def test_unknown_format_is_refused(self, parent: ModelSource, tmp_path: Path) -> None:
        names = [linear.name for linears in structure(skeleton(parent)).linears for linear in linears]
        records = [LayerRecord(name=n, shape=(1, 1), scheme={"format": "trellis"}, bits={}, error=0.0) for n in names]
        source = resolve(write_quantized(parent, tmp_path / "q", _SCHEMES[0], layers=tuple(records)))
        with pytest.raises(InputError, match="does not know"):
            load_model(source, dtype=torch.float32)


class TestOtherArtifacts:
    def test_dense_conversion_is_a_model(self, parent: ModelSource, tmp_path: Path) -> None:
        manifest = ConvertedManifest(**common(target="dense", dtype="bfloat16"))
        source = resolve(write_manifest_over(parent.path, tmp_path / "dense", manifest))
        assert (source.kind, source.packed, source.parent) == ("artifact", {}, None)
        assert source.names == parent.names

    def test_conversion_for_others_is_not(self, parent: ModelSource, tmp_path: Path) -> None:
        manifest = ConvertedManifest(**common(target="gptq", dtype="float16"))
        path = write_manifest_over(parent.path, tmp_path / "gptq", manifest)
        with pytest.raises(InputError, match=r"converted for other engines \(gptq\)"):
            resolve(path)

    def test_evaluation_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "files").mkdir()
        path = write_manifest_over(tmp_path / "files", tmp_path / "eval", EvaluationManifest(**common(results={})))
        with pytest.raises(InputError, match="scores of a model, not a model"):
            resolve(path)
