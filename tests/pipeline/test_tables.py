"""The table of tokens and the head in few bits: counted, run, trained beside, gone on from and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models.tiny import save_tiny
from tests.pipeline.runs import TOKENS, db_llm, logits, request, shards
from ulbq.artifacts.manifest import QuantizedManifest, read_manifest
from ulbq.artifacts.shards import LazyTensors
from ulbq.config.convert import ConvertRequest
from ulbq.errors import InputError, UsageError
from ulbq.formats.bits import packed_length
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_embedding import QuantEmbedding, TiedHead
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import plan, quantize

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def parent(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "parent", tied=request.param)


def made(parent: Path, out: Path, **changes: Any) -> tuple[Path, QuantizedManifest]:
    return quantize(request(parent, out, **{"method": "rtn", "group_size": 32, **changes}))


def is_tied(parent: Path) -> bool:
    return bool(resolve(parent).config.tie_word_embeddings)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_bits_and_bytes_are_what_was_predicted(parent: Path, tmp_path: Path, bits: int) -> None:
    options = {"embedding_bits": bits, "head_bits": bits, "method": "rtn", "group_size": 32}
    foreseen = plan(request(parent, tmp_path / "out", **options))
    folder, manifest = made(parent, tmp_path / "out", **options)
    tables = 1 if is_tied(parent) else 2
    group = 32 if bits == 4 else 64
    size = 256 * (bits * packed_length(64) * 8 + 16 * 64 // group)
    assert [sum(table.bits.values()) for table in manifest.tables] == [size] * tables
    assert manifest.bits.parts["embeddings"] == size * tables
    stored = LazyTensors([folder / "model-outer.safetensors"])
    assert stored.names.isdisjoint((f"{EMBEDDING}.weight", f"{HEAD}.weight"))
    assert foreseen.coverage == manifest.coverage
    assert foreseen.coverage.embedding_bits == bits + 16 / group
    weights = sum(LazyTensors([path]).total_bytes for path in folder.glob("model-*.safetensors"))
    assert foreseen.cost.artifact == weights
    assert HEAD not in manifest.skipped


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_way_of_loading_computes_with_the_stored_table(parent: Path, tmp_path: Path, bits: int) -> None:
    folder, _ = made(parent, tmp_path / "q", embedding_bits=bits, head_bits=bits)
    source = resolve(folder)
    ours = load_model(source, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kinds = (TiedHead if is_tied(parent) else QuantLinear), QuantEmbedding
    for model in (ours, theirs):
        assert (type(model.get_output_embeddings()), type(model.get_input_embeddings())) == kinds
    dense, _ = convert(ConvertRequest(source=str(folder), to="dense", dtype="fp32", out=tmp_path / "dense"))
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert torch.equal(plain.get_input_embeddings().weight, source.read(f"{EMBEDDING}.weight"))
    with torch.no_grad():
        wanted = plain(TOKENS).logits
        torch.testing.assert_close(ours(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
        full = logits(parent)
    assert 0 < (wanted - full).norm() / full.norm() < 1


def test_saved_by_transformers_it_is_read_again(parent: Path, tmp_path: Path) -> None:
    folder, _ = made(parent, tmp_path / "q", embedding_bits=8, head_bits=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert f"{HEAD}.codes" not in load_file(tmp_path / "saved" / "model.safetensors") or not is_tied(parent)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    model.tie_weights()
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)


def test_of_a_tied_model_one_option_counts_for_both(tmp_path: Path) -> None:
    tied = save_tiny("llama", tmp_path / "parent", tied=True)
    for name in ("embedding_bits", "head_bits"):
        _, manifest = made(tied, tmp_path / name, **{name: 8})
        assert [table.name for table in manifest.tables] == [EMBEDDING]
    with pytest.raises(UsageError, match="differ, and the head of this model is its table"):
        made(tied, tmp_path / "both", embedding_bits=8, head_bits=4)


def test_untied_they_stand_by_themselves(tmp_path: Path) -> None:
    parent = save_tiny("llama", tmp_path / "parent", tied=False)
    _, manifest = made(parent, tmp_path / "head", head_bits=6)
    assert [table.name for table in manifest.tables] == [HEAD]
    _, manifest = made(parent, tmp_path / "both", embedding_bits=4, head_bits=8)
    assert [(table.name, table.scheme["bits"]) for table in manifest.tables] == [(EMBEDDING, 4), (HEAD, 8)]


def test_a_table_that_computes_more_is_refused(tmp_path: Path) -> None:
    parent = save_tiny("gemma3", tmp_path / "parent")
    with pytest.raises(InputError, match="wants a plain table of tokens in the model, and it is a Gemma3"):
        made(parent, tmp_path / "q", embedding_bits=8)
    with pytest.raises(InputError, match="`head_bits` wants a plain table of tokens") as refused:
        made(parent, tmp_path / "q", head_bits=8)
    assert refused.value.hint == "Leave out `head_bits`."


def test_trained_and_gone_on_from(parent: Path, tmp_path: Path, samples: Path) -> None:
    """Blocks learn on the stored table's states, the end-to-end phase leaves it alone, and a second run keeps it."""
    more: dict[str, Any] = {"end_to_end": "kl", "end_to_end_samples": 8, "fit_temperature": True}
    options = {"embedding_bits": 4, "head_bits": 4, "epochs": 1, **more}
    folder, manifest = quantize(db_llm(parent, tmp_path / "q", samples, **options))
    plain, _ = quantize(db_llm(parent, tmp_path / "plain", samples, epochs=1))
    assert shards(folder)["model-block-00000.safetensors"] != shards(plain)["model-block-00000.safetensors"]
    assert manifest.end_to_end is not None
    assert manifest.end_to_end.finite
    again, second = quantize(db_llm(folder, tmp_path / "again", samples, epochs=1))
    assert second.tables == manifest.tables
    assert torch.equal(resolve(again).read(f"{EMBEDDING}.weight"), resolve(folder).read(f"{EMBEDDING}.weight"))
    with pytest.raises(UsageError, match="means nothing to an artifact whose table"):
        quantize(db_llm(folder, tmp_path / "other", samples, epochs=1, embedding_bits=8))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("target", ["gguf", "mlx", "compressed-tensors", "gptq", "half"])
def test_exports_decode_to_the_stored_table(parent: Path, tmp_path: Path, target: str, bits: int) -> None:
    folder, _ = made(parent, tmp_path / "q", bits=4, symmetric=True, embedding_bits=bits, head_bits=bits)
    wanted = {
        name: resolve(folder).read(f"{name}.weight") for name in (EMBEDDING, *([] if is_tied(parent) else [HEAD]))
    }
    out, _ = convert(ConvertRequest(source=str(folder), to=target, out=tmp_path / "out"))  # type: ignore[arg-type]
    source = resolve(out)
    for name, weight in wanted.items():
        stored = source.read(f"{name}.weight")
        packed = target in ("gguf", "mlx", "half")
        assert torch.equal(stored.float(), weight if packed else weight.to(stored.dtype).float())
    if target == "mlx":
        said = json.loads((out / "config.json").read_text())["quantization"]
        assert bits == 4 or said[EMBEDDING]["bits"] == bits
    if target == "half":
        manifest = read_manifest(out)
        assert isinstance(manifest, QuantizedManifest)
        assert manifest.tables
