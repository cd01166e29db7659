"""Artifacts in the layouts of other tools, whole folders; those read them in tests/export/test_targets_readers.py."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFReader

from tests.export.families import GGUF_FAMILIES
from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny, tiny_config
from ulbq.artifacts import ConvertedManifest, QuantizedManifest, read_manifest, verify
from ulbq.artifacts.shards import GUARD_NAME, LazyTensors
from ulbq.config.adapter import AdapterConfig
from ulbq.config.convert import ENGINES, TARGETS, ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.export import packed as packed_module
from ulbq.export.engines import judge, targets_of
from ulbq.export.fit import Candidate, Layer
from ulbq.export.targets import auto_round, compressed_tensors, gptq, mlx, target
from ulbq.formats import AffineScheme, BinaryMosScheme, DualBinaryScheme
from ulbq.models.adapter_files import read_adapter
from ulbq.models.gguf_header import read_header
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))
SIDE = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("parent") / "tiny", tied=False)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Tiny\n")
    return folder


def ask_quantize(source: Path, out: Path, **options: Any) -> QuantizeRequest:
    return QuantizeRequest(source=str(source), out=out, device="cpu", offline=True, **options)


def artifact(parent: Path, out: Path, scheme: object = None, adapter: AdapterConfig | None = None) -> Path:
    return write_quantized(resolve(parent), out, scheme or AffineScheme(bits=3, group_size=32), adapter)


def flip(path: Path) -> None:
    """Turn one of the last bits of a file over."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def ask(source: Path, out: Path, **options: object) -> ConvertRequest:
    return ConvertRequest(source=str(source), out=out, **options)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_gptq_folder(symmetric: bool, parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", AffineScheme(bits=2, group_size=32, symmetric=symmetric))
    path, manifest = convert(ask(source, tmp_path / "g", to="gptq"))
    config = json.loads((path / "config.json").read_text())
    described = config["quantization_config"]
    assert described == json.loads((path / "quantize_config.json").read_text())
    assert (described["quant_method"], described["bits"], described["group_size"]) == ("gptq", 2, 32)
    assert (described["sym"], described["desc_act"]) == (symmetric, False)
    assert described["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert "dynamic" not in described
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert manifest.files.keys() >= SIDE
    stored = LazyTensors.folder(path)
    assert {name.rpartition(".")[2] for name in stored.names if ".q_proj." in name} == {
        *("qweight", "qzeros", "scales", "g_idx"),
    }
    assert not any(name.endswith("q_proj.weight") for name in stored.names)
    verify(path)


def test_a_compressed_tensors_folder(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q")
    path, manifest = convert(ask(source, tmp_path / "c", to="compressed-tensors", dtype="fp16"))
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == manifest.dtype.replace("fp16", "float16")
    described = config["quantization_config"]
    assert described["ignore"] == ["lm_head"]
    assert described["config_groups"]["group_0"]["weights"]["symmetric"] is False
    stored = LazyTensors.folder(path)
    assert stored.dtype("model.embed_tokens.weight") == torch.float16
    assert stored.read("model.layers.0.mlp.down_proj.weight_shape").tolist() == [64, 128]
    assert manifest.files.keys() >= SIDE


def test_an_auto_round_folder(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", AffineScheme(bits=2, group_size=32, symmetric=True))
    path, manifest = convert(ask(source, tmp_path / "a", to="auto-round"))
    assert json.loads((path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "auto-round",
        "packing_format": "auto_round",
        "bits": 2,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
    }
    stored = LazyTensors.folder(path)
    assert {name.rpartition(".")[2] for name in stored.names if ".q_proj." in name} == {"qweight", "qzeros", "scales"}
    zeros = stored.read("model.layers.0.self_attn.q_proj.qzeros").flatten().tolist()
    assert {word & 0xFFFFFFFF for word in zeros} == {0xAAAAAAAA}  # 2 sixteen times, not 1
    assert manifest.files.keys() >= SIDE
    verify(path)


def test_auto_round_takes_no_adapter(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=4, alpha=8))
    with pytest.raises(InputError, match="puts none beside auto-round's layers"):
        convert(ask(source, tmp_path / "x", to="auto-round"))


@pytest.mark.parametrize("adapter", ["LoRA", "DoRA"])
def test_transformers_has_no_adapter_beside_compressed_tensors(adapter: Literal["LoRA", "DoRA"]) -> None:
    layers = {"model.layers.0.mlp.up_proj": Layer(_W4S, (64, 64))}
    candidate = Candidate("q", tiny_config("llama"), layers, adapter)
    with pytest.raises(InputError, match="puts none beside compressed-tensors' layers"):
        judge("transformers", candidate, "compressed-tensors")
    assert judge("vllm", replace(candidate, adapter="LoRA"), "compressed-tensors")[0].name == "compressed-tensors"


def test_transformers_gets_zero_points_of_several_widths_by_auto_round(parent: Path, tmp_path: Path) -> None:
    candidate = Candidate.of(resolve(artifact(parent, tmp_path / "q")))
    odd, *_ = candidate.layers
    mixed = {**candidate.layers, odd: candidate.layers[odd]._replace(scheme=AffineScheme(bits=4, group_size=32))}
    chosen, said = judge("transformers", replace(candidate, layers=mixed))
    assert chosen.name == "auto-round"
    assert "It needs the package auto-round." in said


def test_layers_of_several_widths_are_named(parent: Path, tmp_path: Path) -> None:
    candidate = Candidate.of(resolve(artifact(parent, tmp_path / "q")))
    layers = {name: layer.scheme for name, layer in candidate.layers.items()}
    odd = "model.layers.1.mlp.down_proj"
    layers[odd] = AffineScheme(bits=4, group_size=32)
    described = gptq.configuration(layers, ("model.layers.0.x",))
    assert described["bits"] == 3
    assert described["dynamic"] == {
        r"-:^model\.layers\.0\.x$": {},
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 4, "group_size": 32, "sym": False},
    }
    assert auto_round.configuration(layers, ("model.layers.0.x",), "model.layers")["extra_config"] == {
        odd: {"bits": 4, "group_size": 32, "sym": False},
        "model.layers.0.x": {"bits": 16},
    }
    groups = compressed_tensors.configuration(layers, ["lm_head"])["config_groups"]
    assert groups["group_1"]["targets"] == [odd]
    assert odd not in groups["group_0"]["targets"]


def test_a_gguf_file_reads_back_as_the_artifact(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", AffineScheme(bits=4, group_size=32, symmetric=True))
    shutil.copyfile(parent / "README.md", source / "README.md")
    notes = Notes()
    path, manifest = convert(ask(source, tmp_path / "g", to="gguf", dtype="fp32"), notes)
    assert "Stored: 21 layers as Q4_0 (4.5 bits), to the bit." in notes.said
    assert manifest.files.keys() >= SIDE
    # transformers' own tables undo the order of the rows.
    ours, read = (
        load_model(resolve(source), dtype=torch.float32),
        load_model(resolve(path / "model.gguf"), dtype=torch.float32),
    )
    with torch.no_grad():
        difference = (ours(TOKENS).logits - read(TOKENS).logits).abs().max()
    assert difference < 1e-4
    # The tokenizer files that lie beside it do not mix with what the file says.
    asked, found = resolve(source).tokenizer(), resolve(path / "model.gguf").tokenizer()
    assert (found.eos_token_id, found.bos_token_id) == (asked.eos_token_id, asked.bos_token_id)
    reader = GGUFReader(path / "model.gguf")
    said = {name: reader.get_field(name).contents() for name in ("general.license", "tokenizer.ggml.pre")}
    assert said == {"general.license": "apache-2.0", "tokenizer.ggml.pre": "gpt-2"}
    assert "message['role']" in reader.get_field("tokenizer.chat_template").contents()


@pytest.mark.parametrize(("types", "kind", "bits"), [("smallest", "Q2_0", "2.25"), ("fastest", "Q4_0", "4.5")])
def test_two_bits_take_the_type_that_was_asked_for(
    tmp_path: Path, parent: Path, types: str, kind: str, bits: str
) -> None:
    source = artifact(parent, tmp_path / "q", AffineScheme(bits=2, group_size=64, symmetric=True))
    notes = Notes()
    path, _ = convert(ask(source, tmp_path / "g", to="gguf", dtype="fp32", block_types=types), notes)
    assert f"Stored: 21 layers as {kind} ({bits} bits), to the bit." in notes.said
    assert any("block_types=fastest" in said for said in notes.said) == (kind == "Q2_0")
    # Packed or not, it is a SOURCE.
    ours, read = (load_model(resolve(one), dtype=torch.float32) for one in (source, path / "model.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, read(TOKENS).logits, atol=1e-4, rtol=0)


def test_tied_scales_leave_at_two_bits(tmp_path: Path, parent: Path) -> None:
    asked = {"method": "db-llm", "tied_scales": True, "samples": 4, "sequence_length": 16, "epochs": 1}
    text = tmp_path / "text.txt"
    text.write_text("words to learn from, again and again. " * 40)
    out = tmp_path / "q"
    source, manifest = quantize(ask_quantize(parent, out, calibration=str(text), **asked))
    assert manifest.method == "db-llm"
    assert manifest.bits.bits_per_weight == 2.25
    assert set(resolve(source).packed.values()) == {AffineScheme(bits=2, symmetric=True)}
    notes = Notes()
    convert(ask(source, tmp_path / "g", to="gguf"), notes)
    assert "Stored: 21 layers as Q2_0 (2.25 bits), to the bit." in notes.said
    convert(ask(source, tmp_path / "v", engine="vllm"), notes)
    assert any("vLLM loads this as compressed-tensors (2 bits, groups of 64, symmetric)" in said for said in notes.said)


def test_block_types_are_ggufs_alone(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`block_types` is for GGUF files, and this becomes dense"):
        convert(ask(artifact(parent, tmp_path / "q"), tmp_path / "d", to="dense", block_types="fastest"))
    assert not (tmp_path / "d").exists()


def test_a_gguf_file_of_an_artifact_is_compared_with_its_hash(parent: Path, tmp_path: Path) -> None:
    path, _ = convert(ask(artifact(parent, tmp_path / "q"), tmp_path / "g", to="gguf"))
    flip(path / "model.gguf")
    with pytest.raises(InputError, match=r"model\.gguf' was changed"):
        resolve(path / "model.gguf")
    resolve(path / "model.gguf", verify=False)
    alone = shutil.copy(path / "model.gguf", tmp_path)
    resolve(alone)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_other_families_as_gguf(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense", **GGUF_FAMILIES[family])
    path, _ = convert(ask(dense, tmp_path / "g", to="gguf", dtype="fp32"))
    with torch.no_grad():
        a, b = (load_model(resolve(p), dtype=torch.float32)(TOKENS).logits for p in (dense, path / "model.gguf"))
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_what_no_block_type_holds_becomes_float16_where_that_is_asked_for(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", DualBinaryScheme(group_size=32))
    notes = Notes()
    convert(ask(source, tmp_path / "g", to="gguf", dtype="fp16"), notes)
    assert any("21 layers as F16, rounded" in note for note in notes.said)


@pytest.mark.parametrize(
    ("asked", "reader", "way"),
    [
        ({"to": "gguf"}, "gguf", "`dtype=fp16`"),
        ({"engine": "llama.cpp"}, "llama.cpp", "`dtype=fp16`"),
        ({"engine": "vllm"}, "vLLM", "`to=dense`"),
    ],
)
def test_what_would_grow_is_refused_unless_it_was_asked_for(
    asked: dict[str, str], reader: str, way: str, parent: Path, tmp_path: Path
) -> None:
    source = artifact(parent, tmp_path / "q", DualBinaryScheme(group_size=32))
    with pytest.raises(
        InputError, match=rf"Nothing that {reader} reads holds dual_binary w2g32-db: .* takes 3[.]"
    ) as told:
        convert(ask(source, tmp_path / "c", **asked))
    assert told.value.hint.startswith(way)
    assert "`tied_scales`" in told.value.hint
    assert not (tmp_path / "c").exists()
    field, value = way.strip("`").split("=")
    convert(ask(source, tmp_path / "c", **asked, **{field: value}))


def test_an_adapter_is_merged_into_gguf_and_copied_beside_gptq(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=2, targets=("q_proj",)))
    path, manifest = convert(ask(source, tmp_path / "g", to="gptq"))
    assert "adapter/adapter_model.safetensors" in manifest.files
    card = (path / "README.md").read_text()
    assert "in `adapter/`, for peft" in card
    assert "**The adapter**: `PeftModel.from_pretrained" in card
    merged, _ = convert(ask(source, tmp_path / "m", to="gguf", dtype="fp32", merge_adapter=True))
    with torch.no_grad():
        ours = load_model(resolve(source), dtype=torch.float32)(TOKENS).logits
        read = load_model(resolve(merged / "model.gguf"), dtype=torch.float32)(TOKENS).logits
    assert (ours - read).abs().max() < 1e-3
    with pytest.raises(UsageError, match="cannot be merged"):
        convert(ask(source, tmp_path / "y", to="gptq", merge_adapter=True))
    assert not list(tmp_path.glob("[xy]*"))


def test_an_adapter_lies_beside_gguf_as_llama_cpp_takes_it(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=2, alpha=6, targets=("q_proj", "up_proj")))
    path, manifest = convert(ask(source, tmp_path / "g", to="gguf"))
    assert "adapter.gguf" in manifest.files
    assert "`llama-cli -m DIR/model.gguf --lora DIR/adapter.gguf`" in (path / "README.md").read_text()
    assert any("without the adapter beside it ('adapter.gguf')" in note for note in resolve(path).notes)
    fields = GGUFReader(path / "adapter.gguf").fields
    said = {name: fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0}
    header = read_header(path / "adapter.gguf")
    assert {name for name in header.tensors if ".1." in name} == {
        f"blk.1.{layer}.weight.lora_{part}" for layer in ("attn_q", "ffn_up") for part in "ab"
    }
    assert header.tensors["blk.0.ffn_up.weight.lora_a"].shape == (2, 64)
    _, adapters = read_adapter(source / "adapter")
    up = adapters["model.layers.0.mlp.up_proj"]["lora_B.weight"]
    assert header.data("blk.0.ffn_up.weight.lora_b").view(np.float16).tolist() == up.half().tolist()


def test_a_dora_and_an_adapter_of_experts_are_merged_into_gguf_or_nothing(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=2, dora=True))
    with pytest.raises(InputError, match=r"llama\.cpp applies LoRA only") as caught:
        convert(ask(source, tmp_path / "x", to="gguf"))
    assert caught.value.hint == "Add `merge_adapter`."
    assert not (tmp_path / "x").exists()


def test_the_size_is_said_as_llama_cpp_says_it(parent: Path, tmp_path: Path) -> None:
    path, _ = convert(ask(artifact(parent, tmp_path / "q"), tmp_path / "g", to="gguf"))
    fields = GGUFReader(path / "model.gguf").fields
    weights = sum(parameter.numel() for parameter in load_model(resolve(parent), dtype=torch.float32).parameters())
    assert fields["general.size_label"].contents() == f"{weights / 1000:.0f}K"
    assert fields["general.quantized_by"].contents() == "ulbq"
    mixtral = save_tiny("mixtral", tmp_path / "mixtral")
    dense, _ = convert(ask(mixtral, tmp_path / "m", to="gguf"))
    fields = GGUFReader(dense / "model.gguf").fields
    sizes = {
        name: tensor.numel() for name, tensor in load_model(resolve(mixtral), dtype=torch.float32).named_parameters()
    }
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    one = sum(sizes.values()) - experts + experts // 4
    assert fields["general.size_label"].contents() == f"4x{one / 1000:.0f}K"
    assert fields["general.basename"].contents() == "mixtral"
    assert "general.quantized_by" not in fields


def test_a_folder_for_mlx_says_how_it_is_packed(parent: Path, tmp_path: Path) -> None:
    path, _ = convert(ask(artifact(parent, tmp_path / "q"), tmp_path / "m", engine="mlx"))
    config = json.loads((path / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert "quantization_config" not in config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # all that mlx-lm's Llama reads
    stored = LazyTensors.folder(path)
    assert stored.shape("model.layers.1.mlp.down_proj.biases") == stored.shape("model.layers.1.mlp.down_proj.scales")
    with pytest.raises(InputError, match=r"converted for other engines \(mlx\)"):
        quantize(QuantizeRequest(source=str(path), out=tmp_path / "x", method="rtn", device="cpu", offline=True))


def test_mlx_is_told_of_layers_of_another_width() -> None:
    layers = {"a": (64, 2), "b": (64, 2), "c": (128, 4)}
    assert mlx.configuration(layers) == {
        **{"group_size": 64, "bits": 2, "mode": "affine"},
        "c": {"group_size": 128, "bits": 4},
    }


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gemma2", {}, "were not run in mlx-lm"),
        ("qwen3", {"attention_bias": True}, "biases, which mlx-lm does not read"),
        ("mistral", {"sliding_window": 8}, "slides over 8 tokens, and mlx-lm's"),
        ("mixtral", {"head_dim": 8}, "its heads have 8 values"),
        ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu', and mlx-lm's is silu"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_refused(family: str, changes: dict[str, object], why: str) -> None:
    assert why in str(mlx.model_reason(tiny_config(family, **changes)))


def test_mlx_takes_no_adapter(parent: Path, tmp_path: Path) -> None:
    source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=2))
    with pytest.raises(InputError, match="mlx-lm reads none in peft's form"):
        convert(ask(source, tmp_path / "x", to="mlx"))
    assert not (tmp_path / "x").exists()


class TestHalf:
    def test_float32_vectors_are_rounded_and_the_rest_stays(self, parent: Path, tmp_path: Path) -> None:
        source = artifact(parent, tmp_path / "q")  # the helper stores norms in float32
        notes = Notes()
        path, manifest = convert(ask(source, tmp_path / "h", to="half"), notes)
        assert isinstance(manifest, QuantizedManifest)
        before, after = resolve(source), resolve(path)
        assert after.read("model.norm.weight").dtype == torch.bfloat16
        assert torch.equal(after.read("model.norm.weight"), before.read("model.norm.weight").bfloat16())
        codes = "model.layers.0.self_attn.q_proj"
        kept = before.read_packed(codes)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in after.read_packed(codes).items())
        assert any("float32 tensors became bf16" in note for note in notes.said)
        load_model(after, dtype=torch.float32)

    def test_it_says_when_nothing_changes(self, parent: Path, tmp_path: Path) -> None:
        first, _ = convert(ask(artifact(parent, tmp_path / "q"), tmp_path / "h", to="half"))
        notes = Notes()
        again, _ = convert(ask(first, tmp_path / "again", to="half"), notes)
        assert any("nothing changed" in note for note in notes.said)
        assert all((again / f.name).read_bytes() == f.read_bytes() for f in first.glob("*.safetensors"))

    def test_samples_are_carried_along_and_no_tensors(self, parent: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(400)))
        drawn = {"calibration": str(tmp_path / "text.txt"), "samples": 2, "sequence_length": 16, "epochs": 1}
        own = {"end_to_end": "ce", "end_to_end_data": str(tmp_path / "text.txt")}
        asked = {"source": str(parent), "method": "efficientqat", "device": "cpu"}
        source = quantize(QuantizeRequest(out=tmp_path / "q", **asked, **drawn, **own))[0]
        path, _ = convert(ask(source, tmp_path / "h", to="half"))
        for name in ("calibration.safetensors", "end-to-end.safetensors"):
            assert (path / name).read_bytes() == (source / name).read_bytes()
        assert resolve(path).stored.names == resolve(source).stored.names
        load_model(resolve(path), dtype=torch.float32)
        for name in ("calibration.safetensors", "end-to-end.safetensors"):
            flip(source / name)
            with pytest.raises(InputError, match=rf"{name}' was changed"):
                convert(ask(source, tmp_path / "again", to="half"))
            flip(source / name)

    def test_weights_that_were_changed_are_not_copied(self, parent: Path, tmp_path: Path) -> None:
        source = artifact(parent, tmp_path / "q")
        flip(next(source.glob("*.safetensors")))
        with pytest.raises(InputError, match="was changed"):
            convert(ask(source, tmp_path / "h", to="half"))

    def test_a_copy_within_the_artifact_does_not_hold_itself(self, parent: Path, tmp_path: Path) -> None:
        source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=2))
        path, manifest = convert(ask(source, source / "h", to="half"))
        # A guard comes to what was made without one.
        assert manifest.files.keys() == resolve(source).manifest.files.keys() | {GUARD_NAME}
        assert (path / "adapter" / "adapter_config.json").exists()
        assert not [entry for entry in path.iterdir() if entry.name.startswith("h")]


class TestRefusals:
    @pytest.mark.parametrize(
        ("scheme", "to", "words", "holders"),
        [
            (DualBinaryScheme(group_size=32), "gptq", "integer codes", "dense, gguf, half"),
            (DualBinaryScheme(group_size=32), "compressed-tensors", "integer codes", "dense, gguf, half"),
            (BinaryMosScheme(experts=2), "gguf", "every token", "half"),
            (BinaryMosScheme(experts=2), "gptq", "integer codes", "half"),
            (AffineScheme(bits=1, group_size=32), "gptq", "not 1", "dense, gguf, half"),
        ],
    )
    def test_with_the_targets_that_can(
        self, scheme: object, to: str, words: str, holders: str, parent: Path, tmp_path: Path
    ) -> None:
        source = artifact(parent, tmp_path / "q", scheme)
        with pytest.raises(InputError, match=words) as caught:
            convert(ask(source, tmp_path / "x", to=to))
        assert caught.value.hint == f"Targets that can hold it: {holders}."
        assert caught.value.exit_code == 3
        assert [path.name for path in tmp_path.iterdir()] == ["q"]

    def test_full_precision(self, parent: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="full precision") as caught:
            convert(ask(parent, tmp_path / "x", to="gptq"))
        assert "dense, gguf" in caught.value.hint

    def test_a_foreign_folder(self, tmp_path: Path) -> None:
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign" / "manifest.json").write_text('{"name": "somebody"}')
        with pytest.raises(InputError):
            convert(ask(tmp_path / "foreign", tmp_path / "x", to="gptq"))
        assert not list(tmp_path.glob("x*"))

    def test_a_missing_adapter(self, parent: Path, tmp_path: Path) -> None:
        source = artifact(parent, tmp_path / "q", adapter=AdapterConfig(rank=2))
        shutil.rmtree(source / "adapter")
        with pytest.raises(InputError, match=r"no adapter|missing"):
            convert(ask(source, tmp_path / "x", merge_adapter=True))
        assert not list(tmp_path.glob("x*"))

    def test_a_damaged_write_is_noticed(self, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = packed_module.write_shard

        def damage(path: Path, tensors: dict[str, torch.Tensor]) -> None:
            flipped = {n: t ^ 1 if n.endswith("qweight") else t for n, t in tensors.items()}
            write(path, flipped)

        monkeypatch.setattr(packed_module, "write_shard", damage)
        with pytest.raises(Exception, match="does not decode to the artifact's weights"):
            convert(ask(artifact(parent, tmp_path / "q"), tmp_path / "x", to="gptq"))
        assert not list(tmp_path.glob("x*"))

    @pytest.mark.parametrize("to", ["gptq", "gguf"])
    def test_a_full_disk(self, to: str, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = artifact(parent, tmp_path / "q")

        def full(*arguments: object, **named: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(packed_module, "write_shard", full)
        monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
        with pytest.raises(ResourceError, match="disk is full"):
            convert(ask(source, tmp_path / "x", to=to))
        assert not list(tmp_path.glob("x*"))

    def test_an_unknown_architecture_or_window_in_gguf(self, tmp_path: Path) -> None:
        for family, words in (("gemma", "llama, mistral, qwen2, qwen3"), ("mistral", "slides over 8 tokens")):
            with pytest.raises(InputError, match=words):
                convert(ask(save_tiny(family, tmp_path / family), tmp_path / "x", to="gguf"))


_W2, _W2S = AffineScheme(bits=2, group_size=32), AffineScheme(bits=2, group_size=32, symmetric=True)
_W4, _W4S = AffineScheme(bits=4, group_size=32), AffineScheme(bits=4, group_size=32, symmetric=True)
_W8, _W4_16 = AffineScheme(bits=8, group_size=32), AffineScheme(bits=4, group_size=16)
_ODD = DualBinaryScheme(group_size=32)


class TestEngines:
    @pytest.mark.parametrize(
        ("engine", "scheme", "outcome"),
        [
            ("vllm", _W2, "compressed-tensors"),
            ("vllm", _W4S, "compressed-tensors"),
            ("vllm", _ODD, "dense"),
            ("vllm", _W4_16, "compressed-tensors"),
            ("vllm-cpu", _W2, "dense"),
            ("vllm-cpu", _W4, "compressed-tensors"),
            ("vllm-cpu", _W8, "dense"),
            ("sglang", _W2, "compressed-tensors"),
            ("sglang", _W2S, "compressed-tensors"),
            ("sglang", _W4, "compressed-tensors"),
            ("transformers", _W2, "gptq"),
            ("gptqmodel", _W2, "gptq"),
            ("gptqmodel", _ODD, None),
            ("auto-gptq", _W2S, "gptq"),
            ("auto-gptq", _W2, None),
            ("exllamav2", _W4S, "gptq"),
            ("exllamav2", _W4, None),
            ("exllamav2", _W2S, None),
            ("llama.cpp", _ODD, "gguf"),
        ],
    )
    def test_what_each_gets(
        self, engine: str, scheme: object, outcome: str | None, parent: Path, tmp_path: Path
    ) -> None:
        candidate = Candidate.of(resolve(artifact(parent, tmp_path / "q", scheme)))
        if outcome is None:
            with pytest.raises(InputError) as caught:
                judge(engine, candidate)
            assert caught.value.hint
        else:
            chosen, sentence = judge(engine, candidate)
            assert chosen.name == outcome
            assert sentence

    def test_the_choice_is_said_and_taken(self, parent: Path, tmp_path: Path) -> None:
        notes = Notes()
        _, manifest = convert(ask(artifact(parent, tmp_path / "q", _W2), tmp_path / "v", engine="vllm"), notes)
        assert isinstance(manifest, ConvertedManifest)
        assert manifest.target == "compressed-tensors"
        assert notes.said[0] == (
            "vLLM loads this as compressed-tensors (2 bits, groups of 32, asymmetric). Hardware: NVIDIA GPU. "
            "Its CPU build takes 4 bits or dense weights: `engine=vllm-cpu`."
        )

    @pytest.mark.parametrize(
        ("engine", "to", "scheme", "said"),
        [
            ("vllm", None, _W2, ""),
            ("vllm", None, _W4_16, ""),
            ("vllm", "gptq", _W2, "Start it with --quantization humming."),
            ("vllm", "gptq", _W4S, ""),
            ("vllm", "gptq", _W4, "Start it with --quantization humming."),
            ("vllm-cpu", None, _W4, "Without VLLM_CPU_INT4_W4A8=0 it rounds activations to 8 bits"),
            ("sglang", None, _W2, "Start it with --quantization humming."),
            ("sglang", None, _W8, ""),
            ("sglang", None, _W4_16, "Start it with --quantization humming."),
        ],
    )
    def test_what_its_command_needs(self, engine: str, to: str | None, scheme: object, said: str, parent: Path) -> None:
        layers = {"model.layers.0.mlp.up_proj": Layer(scheme, (64, 64))}
        _, sentence = judge(engine, Candidate("q", tiny_config("llama"), layers), to)
        assert said in sentence
        assert ("humming" in sentence) == ("humming" in said)

    @pytest.mark.parametrize("groups", [-1, 8])
    def test_humming_takes_groups_of_16_and_more(self, groups: int) -> None:
        layers = {"model.layers.0.mlp.up_proj": Layer(AffineScheme(bits=2, group_size=groups), (64, 64))}
        chosen, sentence = judge("sglang", Candidate("q", tiny_config("llama"), layers))
        assert chosen.name == "dense"
        assert "its groups " in sentence

    def test_humming_takes_one_width(self) -> None:
        layers = {
            f"model.layers.{index}.mlp.up_proj": Layer(scheme, (64, 64)) for index, scheme in enumerate((_W2, _W4))
        }
        candidate = Candidate("q", tiny_config("llama"), layers)
        assert judge("vllm", candidate)[0].name == "compressed-tensors"  # layer by layer, without the option
        assert judge("sglang", candidate)[0].name == "dense"

    def test_a_target_that_the_engine_does_not_read(self, parent: Path, tmp_path: Path) -> None:
        source = artifact(parent, tmp_path / "q", _W2)
        with pytest.raises(InputError, match=r"exllamav2 does not read gguf") as caught:
            convert(ask(source, tmp_path / "x", engine="exllamav2", to="gguf"))
        assert "gptq" in caught.value.hint
        with pytest.raises(InputError, match="it has 2 bits, and vLLM on a CPU reads 4 in this layout"):
            convert(ask(source, tmp_path / "x", engine="vllm-cpu", to="gptq"))

    def test_auto_gptq_gets_a_head_of_its_own(self, tmp_path: Path) -> None:
        source = artifact(save_tiny("llama", tmp_path / "tied", tied=True), tmp_path / "q", _W2S)
        path, _ = convert(ask(source, tmp_path / "a", engine="auto-gptq"))
        stored = LazyTensors.folder(path)
        assert torch.equal(stored.read("lm_head.weight"), stored.read("model.embed_tokens.weight"))
        assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is False

    def test_every_engine_reads_a_target_and_no_target_names_another(self) -> None:
        assert all(targets_of(engine) for engine in ENGINES)
        assert {engine for name in TARGETS for engine in target(name).readers} == ENGINES.keys()
        assert list(targets_of("vllm")) == ["compressed-tensors", "gptq", "dense"]
        assert list(targets_of("transformers")) == ["gptq", "compressed-tensors", "auto-round", "dense"]


def test_the_card_says_what_it_is(parent: Path, tmp_path: Path) -> None:
    from ulbq.config.quantize import QuantizeRequest
    from ulbq.pipeline.quantize import quantize

    source, _ = quantize(
        QuantizeRequest(
            source=str(parent), out=tmp_path / "q", method="rtn", bits=4, group_size=32, device="cpu", offline=True
        )
    )
    for folder in (source, convert(ask(source, tmp_path / "g", to="gptq"))[0]):
        text = (folder / "README.md").read_text()
        head = yaml.safe_load(text.split("---")[1])
        assert (head["license"], head["language"]) == ("apache-2.0", ["en"])
        assert "rtn" in head["tags"]
        assert "gptqmodel" in text
        assert "4 bits, groups of 32, asymmetric" in text
        assert read_manifest(folder).files["README.md"]
