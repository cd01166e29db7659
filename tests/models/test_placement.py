"""What a checkpoint holds is read, carried along or refused: nothing of it vanishes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FalconH1Config,
    Gemma3Config,
    Llama4TextConfig,
    MiniMaxConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from tests.models.tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer
from tests.models.tiny_gguf import write_tiny_gguf
from ulbq.artifacts.shards import LazyTensors
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError
from ulbq.models.blocks import skeleton, structure
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_linear import is_dense_linear
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize

_SIZE: dict[str, Any] = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
_UP = "model.layers.0.mlp.up_proj.weight"
_TOKENS = torch.arange(10, 26).unsqueeze(0)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """Change stored tensors and keys of config.json; None removes a key."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    path = folder / "config.json"
    values = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def save(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def to_eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_UP] = tensors[_UP].to(torch.float8_e4m3fn)


def request(source: Path, out: Path, **more: Any) -> QuantizeRequest:
    settings = {"method": "rtn", "bits": 4, "group_size": 16, "allow_partial": True}
    return QuantizeRequest(source=str(source), out=out, **settings | more)


class TestEightBits:
    def test_eight_bit_floats_without_a_word_are_refused(self, tmp_path: Path) -> None:
        edit(save_tiny("llama", tmp_path), to_eight_bits)
        with pytest.raises(InputError, match=r"up_proj.weight' as eight-bit floats \(float8_e4m3fn\)"):
            resolve(tmp_path)

    def test_integers_are_refused_before_anything_is_read(self, tmp_path: Path) -> None:
        edit(save_tiny("llama", tmp_path), lambda tensors: tensors.update({_UP: tensors[_UP].to(torch.int8)}))
        with pytest.raises(InputError, match=r"up_proj.weight' as integers \(int8\)"):
            resolve(tmp_path)

    @pytest.mark.parametrize(
        "described",
        [
            {"quantization_config": {"quant_method": "vptq"}},
            {"text_config": {"quantization_config": {"quant_method": "vptq"}}},
            {"thinker_config": {"text_config": {"compression_config": {"quant_method": "vptq"}}}},
        ],
    )
    def test_description_at_any_depth_is_seen(self, tmp_path: Path, described: dict[str, Any]) -> None:
        edit(save_tiny("llama", tmp_path), dict, **described)
        with pytest.raises(InputError, match="quantized already, by 'vptq'"):
            resolve(tmp_path)

    @pytest.mark.parametrize(
        ("file", "content", "tool"),
        [
            ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "ModelOpt"),
            ("quantize_config.json", {"bits": 4}, "GPTQ"),
            ("quant_config.json", {"w_bit": 4}, "AWQ"),
        ],
    )
    def test_description_beside_the_weights_is_seen(
        self, tmp_path: Path, file: str, content: dict[str, Any], tool: str
    ) -> None:
        save_tiny("llama", tmp_path)
        (tmp_path / file).write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"quantized already, by {tool}"):
            resolve(tmp_path)

    def test_a_cache_in_eight_bits_leaves_weights_as_they_are(self, tmp_path: Path) -> None:
        save_tiny("llama", tmp_path)
        about = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(about))
        assert resolve(tmp_path).names


class TestWithoutAPlace:
    def test_biases_that_the_configuration_lost(self, tmp_path: Path) -> None:
        edit(save_tiny("llama", tmp_path, attention_bias=True), dict, attention_bias=None)
        with pytest.raises(InputError, match=r"no place for: 'model\.layers\.0\.self_attn\.k_proj\.bias'") as caught:
            resolve(tmp_path)
        assert "config.json" in caught.value.hint

    def test_layers_beyond_the_count(self, tmp_path: Path) -> None:
        edit(save_tiny("llama", tmp_path), dict, num_hidden_layers=2)
        with pytest.raises(InputError, match=r"no place for: 'model\.layers\.2\..* and \d+ more"):
            resolve(tmp_path)

    def test_experts_beyond_the_count(self, tmp_path: Path) -> None:
        edit(save_tiny("qwen3_moe", tmp_path), dict, num_experts=3, num_local_experts=3)
        with pytest.raises(InputError, match=r"no place for: 'model\.layers\.0\.mlp\.experts\.3\."):
            resolve(tmp_path)

    def test_layers_beyond_the_count_without_the_base_prefix(self, tmp_path: Path) -> None:
        def strip(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        edit(save_tiny("llama", tmp_path), strip, num_hidden_layers=2)
        with pytest.raises(InputError, match=r"no place for: 'layers\.2\."):
            resolve(tmp_path)

    @pytest.mark.parametrize("prefix", ["", "base_model.model."])
    def test_adapter_that_was_not_merged(self, tmp_path: Path, prefix: str) -> None:
        name = f"{prefix}model.layers.0.self_attn.q_proj.lora_A.weight"
        edit(save_tiny("llama", tmp_path), lambda tensors: tensors.update({name: torch.zeros(4, 64)}))
        with pytest.raises(InputError, match="lora_A") as caught:
            resolve(tmp_path)
        assert "merge" in caught.value.hint

    def test_what_is_of_no_account_is_left(self, tmp_path: Path) -> None:
        junk = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
            "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        }
        edit(save_tiny("llama", tmp_path), lambda tensors: tensors.update(junk))
        source = resolve(tmp_path)
        assert source.carried == ()
        assert source.notes == ()

    def test_tensor_of_a_gguf_file_without_a_parameter(self, tmp_path: Path) -> None:
        model = tiny_model(tiny_config("llama", tied=False))
        path = write_tiny_gguf(model, tmp_path / "tiny.gguf", more={"blk.0.attn_k.bias": torch.zeros(32)})
        with pytest.raises(InputError, match=r"no place for: 'blk\.0\.attn_k\.bias'"):
            resolve(path)


class TestCarried:
    @pytest.fixture
    def with_mtp(self, tmp_path: Path) -> Path:
        more = {"mtp.fc.weight": torch.randn(64, 128), "mtp.layers.0.norm.weight": torch.randn(64)}
        return edit(save_tiny("llama", tmp_path / "m"), lambda tensors: tensors.update(more))

    def test_head_for_further_tokens_goes_along_to_the_bit(self, with_mtp: Path, tmp_path: Path) -> None:
        source = resolve(with_mtp)
        assert source.carried == ("mtp.fc.weight", "mtp.layers.0.norm.weight")
        assert "mtp (2 tensors)" in source.notes[0]
        out, manifest = quantize(request(with_mtp, tmp_path / "q"))
        assert manifest.bits.parts["other"] >= (64 * 128 + 64) * 32
        dense, _ = convert(ConvertRequest(source=str(out), to="dense", out=tmp_path / "d"))
        half, _ = convert(ConvertRequest(source=str(out), to="half", dtype="fp16", out=tmp_path / "h"))
        before = load_file(with_mtp / "model.safetensors")
        for folder in (out, dense, half):
            stored = LazyTensors.folder(folder)
            assert resolve(folder).carried == source.carried
            assert all(torch.equal(stored.read(name), before[name]) for name in source.carried)

    def test_layers_that_predict_further_tokens_go_along(self, tmp_path: Path) -> None:
        more = {"model.layers.3.eh_proj.weight": torch.randn(64, 128), "model.layers.3.enorm.weight": torch.randn(64)}
        dense = save_tiny("deepseek", tmp_path / "m")
        edit(dense, lambda tensors: tensors.update(more), num_nextn_predict_layers=1)
        out, manifest = quantize(request(dense, tmp_path / "q"))
        assert resolve(out).carried == tuple(sorted(more))
        assert manifest.coverage is not None
        stored = LazyTensors.folder(dense)
        assert manifest.coverage.total == sum(stored.read(name).numel() for name in stored.names)
        edit(dense, dict, num_nextn_predict_layers=0)
        with pytest.raises(InputError, match=r"no place for: 'model\.layers\.3\."):
            resolve(dense)

    def test_rotation_is_refused(self, with_mtp: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"mtp\.fc\.weight"):
            quantize(request(with_mtp, tmp_path / "q", rotate=True))


class TestMultimodal:
    @pytest.fixture
    def qwen(self, tmp_path: Path) -> Path:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        kinds = {"layer_types": ["linear_attention", "full_attention"], "rope_parameters": rope, "head_dim": 16}
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        config = Qwen3_5Config(
            text_config={**_SIZE, **linear, **kinds}, vision_config={**vision, "num_position_embeddings": 16}
        )
        torch.manual_seed(0)
        Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
        tiny_tokenizer().save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    def test_all_of_it_is_what_loads(self, qwen: Path, tmp_path: Path) -> None:
        out, manifest = quantize(request(qwen, tmp_path / "q"))
        config = json.loads((out / "config.json").read_text())
        assert (config["architectures"], config["model_type"]) == (["Qwen3_5ForConditionalGeneration"], "qwen3_5")
        assert resolve(qwen).notes == ()
        assert resolve(qwen).carried == ()
        assert manifest.coverage is not None
        tower = next(kept for kept in manifest.coverage.kept if kept.name == "model.visual")
        assert tower.why == "outside the blocks"
        theirs = AutoModelForImageTextToText.from_pretrained(qwen, dtype=torch.float32)
        ours = load_model(resolve(qwen), dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(ours(_TOKENS).logits, theirs(_TOKENS).logits, rtol=1e-5, atol=1e-5)

    def test_artifact_of_a_text_model_says_so_and_keeps_the_tower(self, qwen: Path, tmp_path: Path) -> None:
        edit(qwen, dict, architectures=["Qwen3_5ForCausalLM"])
        out, _ = quantize(request(qwen, tmp_path / "q"))
        config = json.loads((out / "config.json").read_text())
        assert (config["architectures"], config["model_type"]) == (["Qwen3_5ForCausalLM"], "qwen3_5_text")
        assert config["dtype"] == "bfloat16"
        source = resolve(qwen)
        assert source.notes[0].endswith("is multimodal: its text model is taken, as a Qwen3_5ForCausalLM.")
        assert all(name.startswith("model.visual.") for name in source.carried)
        assert resolve(out).carried == source.carried
        theirs = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
        ours = load_model(source, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(ours(_TOKENS).logits, theirs(_TOKENS).logits, rtol=1e-5, atol=1e-5)


class TestTied:
    def test_a_head_of_its_own_is_kept(self, tmp_path: Path) -> None:
        folder = edit(save_tiny("llama", tmp_path / "m", tied=False), dict, tie_word_embeddings=True)
        source = resolve(folder)
        assert "head of its own" in source.notes[0]
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            wanted = theirs(_TOKENS).logits
            assert torch.equal(load_model(source, dtype=torch.float32)(_TOKENS).logits, wanted)
        out, _ = quantize(request(folder, tmp_path / "q"))
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        head = load_file(folder / "model.safetensors")["lm_head.weight"]
        assert torch.equal(resolve(out).read("lm_head.weight"), head.to(torch.bfloat16))

    def test_a_copy_of_the_embedding_stays_tied(self, tmp_path: Path) -> None:
        folder = edit(
            save_tiny("llama", tmp_path, tied=False),
            lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
            tie_word_embeddings=True,
        )
        source = resolve(folder)
        assert source.notes == ()
        assert structure(skeleton(source)).tied


class TestLinear:
    @pytest.mark.parametrize(
        "config",
        [
            Llama4TextConfig(
                **_SIZE,
                **{"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1},
                **{"intermediate_size_mlp": 128, "interleave_moe_layer_step": 1},
            ),
            PhimoeConfig(**_SIZE, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        ],
        ids=["llama4", "phimoe"],
    )
    def test_router_that_computes_something_else_stays(self, config: PreTrainedConfig, tmp_path: Path) -> None:
        folder = save(config, tmp_path / "m")
        out, manifest = quantize(request(folder, tmp_path / "q"))
        assert manifest.layers
        assert not [layer.name for layer in manifest.layers if "router" in layer.name or layer.name.endswith("gate")]
        with torch.no_grad():
            logits = load_model(resolve(out), dtype=torch.float32)(_TOKENS).logits
        assert logits.isfinite().all()

    def test_a_forward_of_its_own_on_one_layer(self) -> None:
        layer = nn.Linear(2, 2)
        assert is_dense_linear(layer)
        layer.forward = lambda x: x  # type: ignore[method-assign]
        assert not is_dense_linear(layer)


class TestConfigurations:
    def test_numbers_that_json_has_no_word_for(self, tmp_path: Path) -> None:
        config = FalconH1Config(
            **_SIZE,
            **{"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
            **{"mamba_d_state": 16, "mamba_chunk_size": 16},
        )
        folder = save(config, tmp_path / "m")
        assert "__float__" in (folder / "config.json").read_text()
        assert resolve(folder).config.time_step_limit[1] == float("inf")
        out, _ = quantize(request(folder, tmp_path / "q"))
        assert resolve(out).config.time_step_limit[1] == float("inf")
        assert load_model(resolve(out), dtype=torch.bfloat16)(_TOKENS).logits.isfinite().all()


class TestDtypes:
    @pytest.mark.parametrize(
        "config",
        [
            ApertusConfig(**_SIZE),
            MiniMaxConfig(**_SIZE, num_local_experts=4, head_dim=16),
            Gemma3Config(
                text_config={**_SIZE, "head_dim": 16},
                vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
                | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
                mm_tokens_per_image=4,
            ),
        ],
        ids=["apertus", "minimax", "gemma3"],
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_all_have_those_of_transformers(self, config: PreTrainedConfig, dtype: torch.dtype, tmp_path: Path) -> None:
        folder = save(config, tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ours = load_model(resolve(folder), dtype=dtype)
        for kind in ("named_parameters", "named_buffers"):
            wanted = {name: tensor.dtype for name, tensor in getattr(theirs, kind)()}
            assert {name: tensor.dtype for name, tensor in getattr(ours, kind)()} == wanted
        with torch.no_grad():
            torch.testing.assert_close(ours(_TOKENS).logits, theirs(_TOKENS).logits)

    def test_what_decides_in_float32_does_so(self, tmp_path: Path) -> None:
        save_tiny("deepseek", tmp_path, dtype=torch.bfloat16)
        ours = dict(load_model(resolve(tmp_path), dtype=torch.bfloat16).named_buffers())
        theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_buffers())
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
        assert ours["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
