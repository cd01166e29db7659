from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models.stored import common, write_manifest_over, write_quantized
from tests.models.tiny import FAMILIES, save_tiny
from ulbq import formats
from ulbq.artifacts import (
    ConvertedManifest,
    EvaluationManifest,
    LayerRecord,
    Parent,
    QuantizedManifest,
)
from ulbq.errors import InputError
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, DualBinaryScheme, TrellisScheme
from ulbq.models.blocks import load_block, skeleton, structure
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.quant_linear import QuantLinear

_TOKENS = torch.arange(64).view(2, 32)
_SCHEMES = [
    AffineScheme(bits=3, group_size=32),
    AffineScheme(bits=2, group_size=-1, symmetric=True),
    DualBinaryScheme(group_size=16),
    BinaryMosScheme(experts=1, zeros="input"),
    TrellisScheme(bits=2),
]


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
        records = [LayerRecord(name=n, shape=(1, 1), scheme={"format": "wavelet"}, bits={}, error=0.0) for n in names]
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
