"""Packed artifacts as plain model folders, read back by transformers itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models.stored import write_quantized, write_random_adapter
from tests.models.tiny import save_tiny
from tests.pipeline.runs import request
from tests.strangers.conftest import reseal
from ulbq.artifacts import read_manifest, verify
from ulbq.config.adapter import AdapterConfig
from ulbq.config.convert import ConvertRequest
from ulbq.errors import InputError, NumericsError
from ulbq.formats import AffineScheme
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent

GOLDEN = Path(__file__).parents[1] / "golden" / "artifacts"
TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))


def packed(dense: Path, out: Path) -> Path:
    return quantize(request(dense, out, method="rtn", bits=3, group_size=32))[0]


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", None), ("deepseek", None)])
def test_transformers_computes_the_packed_models_logits(family: str, tied: bool | None, tmp_path: Path) -> None:
    artifact = packed(save_tiny(family, tmp_path / "dense", tied=tied), tmp_path / "q")
    path, _ = convert(ConvertRequest(source=str(artifact), dtype="fp32", out=tmp_path / "plain"))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)(TOKENS).logits
        ours = load_model(resolve(artifact), dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(plain, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_every_tensor_and_the_configuration_have_the_dtype(
    name: str, dtype: torch.dtype, tiny_llama: Path, tmp_path: Path
) -> None:
    path, manifest = convert(ConvertRequest(source=str(tiny_llama), dtype=name, out=tmp_path / "plain"))
    stored = {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert (resolve(path).config.dtype, manifest.dtype) == (dtype, name)
    assert not hasattr(resolve(path).config, "quantization_config")
    original = resolve(tiny_llama)
    assert stored.keys() == original.names
    assert all(torch.equal(tensor, original.read(n).to(dtype)) for n, tensor in stored.items())


@pytest.mark.parametrize("target", ["dense", "gptq", "compressed-tensors"])
def test_what_is_not_packed_keeps_its_dtype_unless_one_is_asked_for(target: str, tmp_path: Path) -> None:
    artifact = resolve(GOLDEN / "adapted")  # trained norms in float16, embeddings in bfloat16
    unpacked = {
        name: artifact.read(name) for name in artifact.names if name.endswith(("norm.weight", "embed_tokens.weight"))
    }
    assert {tensor.dtype for tensor in unpacked.values()} == {torch.float16, torch.bfloat16}
    for asked in (None, "bf16"):
        request = ConvertRequest(source=str(GOLDEN / "adapted"), to=target, dtype=asked, out=tmp_path / str(asked))
        stored = {n: t for file in convert(request)[0].glob("*.safetensors") for n, t in load_file(file).items()}
        for name, tensor in unpacked.items():
            wanted = tensor if asked is None else tensor.bfloat16()
            assert stored[name].dtype == wanted.dtype
            assert torch.equal(stored[name], wanted)
        packed_ones = {tensor.dtype for name, tensor in stored.items() if name.endswith("q_proj.weight")}
        assert packed_ones == ({torch.bfloat16} if target == "dense" else set())


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    path, _ = convert(ConvertRequest(source=str(save_tiny("llama", tmp_path / "d", tied=True)), out=tmp_path / "plain"))
    stored = {name for file in path.glob("*.safetensors") for name in load_file(file)}
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored


def test_the_manifest_that_comes_back_is_the_one_on_disk(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = packed(tiny_llama, tmp_path / "q")
    path, manifest = convert(ConvertRequest(source=str(artifact), out=tmp_path / "plain"))
    assert manifest == read_manifest(path)
    assert manifest.digest
    assert "config.json" in manifest.files
    assert [(parent.kind, parent.sha256) for parent in manifest.parents] == [
        ("quantized", read_manifest(artifact).digest)
    ]
    verify(path)


def test_a_weight_beyond_the_dtypes_range_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    weights = load_file(dense / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="float16"):
        convert(ConvertRequest(source=str(dense), dtype="fp16", out=tmp_path / "plain"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_an_output_that_is_taken_is_refused_unless_forced(tiny_llama: Path, tmp_path: Path) -> None:
    asked = ConvertRequest(source=str(tiny_llama), out=tmp_path / "plain")
    convert(asked)
    with pytest.raises(InputError):
        convert(asked)
    convert(asked.model_copy(update={"force": True}))


class TestAdapter:
    @pytest.fixture(params=[False, True], ids=["lora", "dora"])
    def adapted(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        parent = resolve(save_tiny("qwen2", tmp_path / "dense"))
        config = AdapterConfig(rank=4, dora=request.param, targets=("q_proj", "down_proj"))
        return write_quantized(parent, tmp_path / "q", AffineScheme(bits=3, group_size=32), config)

    def test_merged_it_is_a_part_of_the_weights(self, adapted: Path, tmp_path: Path) -> None:
        asked = ConvertRequest(source=str(adapted), dtype="fp32", merge_adapter=True, out=tmp_path / "plain")
        path, manifest = convert(asked)
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        with torch.no_grad():
            ours = load_model(resolve(adapted), dtype=torch.float32)(TOKENS).logits
            torch.testing.assert_close(plain(TOKENS).logits, ours, atol=1e-4, rtol=1e-4)
        assert not (path / "adapter").exists()
        assert manifest.request["merge_adapter"] is True

    def test_merging_rounds_once(self, adapted: Path, tmp_path: Path) -> None:
        weights = {}
        for dtype in ("fp32", "bf16"):
            asked = ConvertRequest(source=str(adapted), dtype=dtype, merge_adapter=True, out=tmp_path / dtype)
            weights[dtype] = resolve(convert(asked)[0]).read("model.layers.1.self_attn.q_proj.weight")
        assert torch.equal(weights["bf16"], weights["fp32"].bfloat16())

    def test_unmerged_it_lies_beside_the_base(self, adapted: Path, tmp_path: Path) -> None:
        notes: list[str] = []

        class Notes(Silent):
            def note(self, text: str) -> None:
                notes.append(text)

        path, manifest = convert(ConvertRequest(source=str(adapted), dtype="fp32", out=tmp_path / "plain"), Notes())
        assert any("`merge_adapter`" in note for note in notes)
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= manifest.files.keys()
        with torch.no_grad():
            for adapter in (False, True):
                ours, packed_ones = (
                    load_model(resolve(source), dtype=torch.float32, adapter=adapter)(TOKENS).logits
                    for source in (path, adapted)
                )
                # Both sum in float32, in another order.
                torch.testing.assert_close(ours, packed_ones, atol=1e-4, rtol=0)

    def test_without_one_there_is_nothing_to_merge(self, tiny_llama: Path, tmp_path: Path) -> None:
        artifact = packed(tiny_llama, tmp_path / "q")
        with pytest.raises(InputError, match="has no adapter to merge"):
            convert(ConvertRequest(source=str(artifact), merge_adapter=True, out=tmp_path / "plain"))
        assert not list(tmp_path.glob("plain*"))

    def test_a_layer_that_the_model_lacks_is_refused(self, tiny_llama: Path, tmp_path: Path) -> None:
        artifact = packed(tiny_llama, tmp_path / "q")
        stranger = {"model.layers.9.self_attn.q_proj": torch.zeros(64, 64)}
        write_random_adapter(artifact / "adapter", AdapterConfig(rank=2), stranger)
        reseal(artifact, listed=("adapter/adapter_config.json", "adapter/adapter_model.safetensors"))
        with pytest.raises(InputError, match=r"another model: 'model\.layers\.9"):
            convert(ConvertRequest(source=str(artifact), merge_adapter=True, out=tmp_path / "plain"))
