"""Artifacts in transformers' own hands: loading, generating, compiling, training adapters, saving."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import ulbq.models.hf
from tests.models.adapted import simulated
from tests.models.stored import write_manifest_over, write_quantized
from tests.models.tiny import save_tiny
from tests.pipeline.runs import request
from ulbq.artifacts.manifest import MANIFEST_NAME, read_manifest
from ulbq.config.adapter import AdapterConfig
from ulbq.errors import InputError, UsageError
from ulbq.formats import AffineScheme, AnyScheme, BinaryMosScheme, CodebookScheme, DualBinaryScheme, TrellisScheme
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.quantize import quantize

TOKENS = torch.arange(64).view(2, 32)
AFFINE = AffineScheme(bits=2, group_size=32)
SCHEMES: list[AnyScheme] = [
    AFFINE,
    AffineScheme(bits=3, group_size=-1, symmetric=True),
    AffineScheme(bits=8, group_size=32),
    DualBinaryScheme(group_size=32),
    BinaryMosScheme(experts=1, zeros="input"),
    BinaryMosScheme(experts=4),
    TrellisScheme(bits=3),
]


@pytest.fixture
def parent(tmp_path: Path) -> ModelSource:
    """Has biases, which a packed layer keeps dense, and a tied head."""
    return resolve(save_tiny("qwen2", tmp_path / "parent", tied=True))


@pytest.fixture
def artifact(parent: ModelSource, tmp_path: Path) -> Path:
    return write_quantized(parent, tmp_path / "q", AFFINE)


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose layers all have schemes of their own: column widths, outliers."""
    folder = tmp_path_factory.mktemp("columns")
    tokens = torch.randint(3, 250, (6, 32), generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens.int()}, folder / "tokens.safetensors")
    options: dict[str, Any] = {
        **{"method": "claq", "target_bits": 4.6, "outlier_bits": 0.2, "precision": "fp32"},
        **{"calibration": str(folder / "tokens.safetensors"), "samples": 4, "sequence_length": 32},
    }
    return quantize(request(save_tiny("llama", folder / "dense", tied=False), folder / "q", **options))[0]


def load(path: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def ours(path: Path, **options: Any) -> torch.Tensor:
    return logits(load_model(resolve(path), **{"dtype": torch.float32, **options}))


def packed_layers(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def configure(path: Path, **changes: Any) -> None:
    """Change an artifact's quantization_config, as its owner's editor could; None takes a key out."""
    config = json.loads((path / "config.json").read_text())
    changed = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in changed.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))


def without_layers(path: Path, out: Path) -> Path:
    """An artifact as older versions wrote it: its configuration leaves what each layer is packed as to the manifest."""
    manifest = read_manifest(path)
    edited = shutil.copytree(path, out.with_name("edited"), ignore=shutil.ignore_patterns(MANIFEST_NAME))
    configure(edited, layers=None, adapter=None)
    return write_manifest_over(edited, out, manifest.model_copy(update={"files": {}, "digest": ""}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


class TestLoading:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.format}-{scheme.label}")
    def test_every_format_is_what_ulbq_itself_loads(
        self, parent: ModelSource, scheme: AnyScheme, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        path = write_quantized(parent, tmp_path / "q", scheme)
        model = load(path, dtype=dtype)
        assert torch.equal(logits(model), ours(path, dtype=dtype))
        assert len(packed_layers(model)) == 21
        assert not any(name.endswith("_proj.weight") for name, _ in model.named_parameters())
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        assert model.dtype == dtype
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_layers_with_schemes_of_their_own(self, columns: Path, tmp_path: Path) -> None:
        model = load(columns)
        assert torch.equal(logits(model), ours(columns))
        schemes = {layer.scheme for layer in packed_layers(model).values()}
        assert len(schemes) > 5
        assert any(isinstance(scheme, CodebookScheme) and scheme.outliers for scheme in schemes)
        # The configuration says it all: the Hub hands out no manifest.
        alone = shutil.copytree(columns, tmp_path / "alone", ignore=shutil.ignore_patterns(MANIFEST_NAME))
        assert torch.equal(logits(load(alone)), logits(model))

    def test_artifacts_older_than_that_are_read_by_their_manifest(self, columns: Path, tmp_path: Path) -> None:
        old = without_layers(columns, tmp_path / "old")
        assert torch.equal(logits(load(old)), ours(columns))
        (old / MANIFEST_NAME).unlink()
        with pytest.raises(InputError, match="packed otherwise than the configuration says"):
            load(old)

    @pytest.mark.parametrize("family", ["mixtral", "deepseek", "gemma2", "phi3"])
    def test_families(self, family: str, tmp_path: Path) -> None:
        dense = save_tiny(family, tmp_path / family)
        path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
        assert torch.equal(logits(load(path)), ours(path))

    def test_rotated_weights(self, tiny_llama: Path, tmp_path: Path) -> None:
        asked = request(tiny_llama, tmp_path / "q", method="rtn", bits=3, group_size=32, rotate=True)
        path, _ = quantize(asked)
        assert torch.equal(logits(load(path)), ours(path))

    def test_trained_norms_and_a_router(self, tiny_llama: Path, tmp_path: Path) -> None:
        tokens = torch.randint(3, 250, (6, 32), generator=torch.Generator().manual_seed(7))
        save_file({"tokens": tokens.int()}, tmp_path / "tokens.safetensors")
        size = {"samples": 4, "sequence_length": 32, "epochs": 1, "precision": "fp32", "experts": 2}
        asked = request(
            tiny_llama, tmp_path / "q", method="binary-mos", calibration=str(tmp_path / "tokens.safetensors"), **size
        )
        path, _ = quantize(asked)
        assert any(t.dtype == torch.float16 for name, t in tensors(path).items() if "norm" in name)
        assert torch.equal(logits(load(path)), ours(path))

    def test_it_generates_what_ulbq_generates(self, artifact: Path) -> None:
        options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        model = load(artifact)
        expected = load_model(resolve(artifact), dtype=torch.float32).generate(TOKENS[:1], **options)
        assert torch.equal(model.generate(TOKENS[:1], **options), expected)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
    def test_device_maps_of_the_cpu(self, artifact: Path, device_map: Any) -> None:
        assert torch.equal(logits(load(artifact, device_map=device_map)), ours(artifact))

    def test_the_model_without_its_head(self, artifact: Path) -> None:
        model = AutoModel.from_pretrained(artifact, dtype=torch.float32)
        with torch.no_grad():
            states = model(TOKENS).last_hidden_state
            expected = load_model(resolve(artifact), dtype=torch.float32).model(TOKENS).last_hidden_state
        assert torch.equal(states, expected)

    def test_a_dense_cache_is_kept_only_where_it_is_asked_for(self, artifact: Path) -> None:
        config = AutoConfig.from_pretrained(artifact)
        config.quantization_config["prefill_cache"] = True
        many = torch.randint(3, 250, (1, 200))
        for model, kept in ((load(artifact), False), (load(artifact, config=config), True)):
            model(many)
            assert all((layer.cached_bytes > 0) == kept for layer in packed_layers(model).values())
        assert "prefill_cache" not in model.config.to_dict()["quantization_config"]


class TestRefusals:
    def test_packed_tensors_that_do_not_fit(self, artifact: Path) -> None:
        configure(artifact, layers={}, **AFFINE.model_dump())
        shard = artifact / "model-block-00001.safetensors"
        name = "model.layers.1.mlp.up_proj.scales"
        whole = load_file(shard)
        for broken in (
            {key: value for key, value in whole.items() if key != name},
            whole | {name: whole[name].float()},
            whole | {name: whole[name][:, :1].clone()},
        ):
            save_file(broken, shard)
            with pytest.raises(InputError, match=r"up_proj' is packed otherwise than the configuration says: 'scales'"):
                load(artifact)

    def test_another_models_configuration(self, artifact: Path) -> None:
        config = AutoConfig.from_pretrained(artifact)
        config.num_hidden_layers = 2
        with pytest.raises(InputError, match=r"has no such linear layer"):
            load(artifact, config=config)

    def test_a_format_of_the_future(self, artifact: Path) -> None:
        configure(artifact, layers={}, format="wavelet")
        with pytest.raises(InputError, match="does not know"):
            load(artifact)

    def test_no_scheme_anywhere(self, artifact: Path) -> None:
        (artifact / MANIFEST_NAME).unlink()
        with pytest.raises(InputError, match="written nowhere"):
            load(artifact)

    @pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}])
    def test_offloading(self, artifact: Path, device_map: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="not offloaded"):
            load(artifact, device_map=device_map)

    def test_quantizing_while_loading(self, parent: ModelSource) -> None:
        with pytest.raises(UsageError, match="not quantized while it is loaded"):
            load(parent.path, quantization_config=ulbq.models.hf.UlbqConfig(**AFFINE.model_dump()))

    def test_making_it_dense(self, artifact: Path) -> None:
        with pytest.raises(UsageError, match="not made dense"):
            load(artifact).dequantize()


class TestSaving:
    @pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["plain", "device_map"])
    def test_it_round_trips_bit_for_bit(self, artifact: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        model = load(artifact, dtype="auto", **options)
        model(TOKENS)
        model.save_pretrained(tmp_path / "saved")
        before, after = tensors(artifact), tensors(tmp_path / "saved")
        assert after.pop("model.layers.0.mlp.down_proj.weight").shape == (0,)  # the guard
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(before[name].dtype == after[name].dtype for name in before)
        again = load(tmp_path / "saved", dtype="auto")
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "twice")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()

    def test_layers_with_schemes_of_their_own_need_no_manifest_any_more(self, columns: Path, tmp_path: Path) -> None:
        old = without_layers(columns, tmp_path / "old")
        load(old).save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved" / MANIFEST_NAME).exists()
        before, after = tensors(old), tensors(tmp_path / "saved")
        packed = [name for name in before if not name.endswith(("weight", "bias"))]
        assert packed
        assert all(torch.equal(before[name], after[name]) for name in packed)
        assert torch.equal(logits(load(tmp_path / "saved")), ours(columns))

    def test_with_packed_experts(self, tmp_path: Path) -> None:
        dense = save_tiny("mixtral", tmp_path / "mixtral")
        path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
        load(path, dtype="auto").save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), ours(path))


class TestAdapters:
    @pytest.fixture
    def adapted(self, parent: ModelSource, tmp_path: Path) -> Path:
        return write_quantized(parent, tmp_path / "q", AFFINE, AdapterConfig(rank=4, alpha=6))

    def test_an_artifacts_own_is_attached(self, adapted: Path) -> None:
        model = load(adapted)
        assert torch.equal(logits(model), ours(adapted))
        torch.testing.assert_close(logits(model), simulated(resolve(adapted)), atol=1e-4, rtol=0)

    def test_it_is_left_out_where_the_configuration_says_so(self, adapted: Path, tmp_path: Path) -> None:
        config = AutoConfig.from_pretrained(adapted)
        config.quantization_config["adapter"] = False
        model = load(adapted, config=config)
        assert torch.equal(logits(model), ours(adapted, adapter=False))
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))

    def test_one_that_was_not_fetched_is_missed(self, adapted: Path) -> None:
        configure(adapted, adapter=True, layers={}, **AFFINE.model_dump())
        shutil.rmtree(adapted / "adapter")
        with pytest.raises(InputError, match="trained with an adapter"):
            load(adapted)

    def test_saving_both_as_one_is_refused(self, adapted: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot be saved as one"):
            load(adapted).save_pretrained(tmp_path / "saved")

    @pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.format}-{scheme.label}")
    def test_pefts_lora_trains_beside_packed_layers(
        self, parent: ModelSource, scheme: AnyScheme, tmp_path: Path
    ) -> None:
        path = write_quantized(parent, tmp_path / "q", scheme)
        base = load(path)
        stored = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) == 42
        optimizer, losses = torch.optim.SGD(trained, lr=0.05), []
        for _ in range(4):
            loss = model(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path / "lora")
        fresh = load(path)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in fresh.state_dict().items())
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora")
        assert torch.equal(logits(again), logits(model.eval()))


class TestCompiling:
    @pytest.mark.parametrize("rows", [1, 7, 200])
    @pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.format}-{scheme.label}")
    def test_a_packed_layer_is_one_graph(
        self, parent: ModelSource, scheme: AnyScheme, rows: int, tmp_path: Path
    ) -> None:
        layer = packed_layers(load(write_quantized(parent, tmp_path / "q", scheme)))["model.layers.0.self_attn.q_proj"]
        torch._dynamo.reset()
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)

    def test_layers_of_columns_are_one_graph(self, columns: Path) -> None:
        torch._dynamo.reset()
        layer = packed_layers(load(columns))["model.layers.0.mlp.up_proj"]
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-5)

    def test_a_whole_forward_pass_is_one_graph(self, artifact: Path) -> None:
        torch._dynamo.reset()
        model = load(artifact)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            found = compiled(TOKENS, use_cache=False).logits
        torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)
        torch._dynamo.reset()
