"""The commands as functions: the same results, typed, and errors that name what was given."""

import json
from pathlib import Path

import pytest
import torch

import ulbq
from tests.models.tiny import save_tiny
from ulbq.artifacts.manifest import ConvertedManifest, QuantizedManifest, SaliencyManifest, read_manifest
from ulbq.commands.app import main
from ulbq.errors import InputError, UsageError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("api") / "dense")


@pytest.fixture(scope="module")
def quantized(dense: Path) -> ulbq.Artifact[QuantizedManifest]:
    return ulbq.quantize(dense, method="rtn", bits=4, group_size=32, device="cpu", output=dense.parent / "q")


def test_a_function_makes_what_the_command_makes(
    dense: Path, quantized: ulbq.Artifact[QuantizedManifest], tmp_path: Path
) -> None:
    words = ["--method", "rtn", "--bits", "4", "--group-size", "32", "--device", "cpu", "-q"]
    assert main(["quantize", str(dense), *words, "-o", str(tmp_path / "q")]) == 0
    for shard in tmp_path.glob("q/*.safetensors"):
        assert shard.read_bytes() == (quantized.path / shard.name).read_bytes()
    made = read_manifest(tmp_path / "q")
    assert isinstance(made, QuantizedManifest)
    assert quantized.manifest.request == made.request | {"out": str(quantized.path)}
    assert quantized.manifest == read_manifest(quantized.path)


def test_a_model_is_loaded_with_its_tokenizer(quantized: ulbq.Artifact[QuantizedManifest]) -> None:
    model, tokenizer = ulbq.load(quantized.path, device="cpu", precision="fp32")
    tokens = tokenizer("Hello", return_tensors="pt")["input_ids"]
    assert model(tokens).logits.shape == (*tokens.shape, model.config.vocab_size)
    assert model.dtype == torch.float32


def test_the_others_give_typed_results(
    dense: Path, quantized: ulbq.Artifact[QuantizedManifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = ulbq.saliency(dense, kind="magnitude", device="cpu", output=tmp_path / "s")
    assert isinstance(scores.manifest, SaliencyManifest)
    converted = ulbq.convert(quantized.path, to="dense", dtype="fp32", output=tmp_path / "d")
    assert isinstance(converted.manifest, ConvertedManifest)
    found = ulbq.evaluate(quantized.path, prompts=["Hello"], fidelity=False, device="cpu", output=tmp_path / "e")
    assert quantized.manifest.name in [model.subject.name for model in found.results.models]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {i}", "output": f"{i}"}) + "\n" for i in range(8)))
    learnt = ulbq.finetune(
        quantized.path,
        task="instructions",
        data=str(rows),
        samples=4,
        validation_samples=2,
        sequence_length=64,
        rank=2,
        epochs=1,
        device="cpu",
        output=tmp_path / "f",
    )
    assert learnt.manifest.finetune is not None
    assert capsys.readouterr().out == ""


def test_errors_name_what_was_given(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no option `bit`"):
        ulbq.quantize(dense, method="rtn", bit=4)
    with pytest.raises(UsageError, match="no option `epoch`"):
        ulbq.finetune(dense, task="gsm8k", epoch=1)
    with pytest.raises(UsageError, match="`bits=5`"):
        ulbq.quantize(dense, method="rtn", bits=5)
    with pytest.raises(UsageError, match="`act_order` means nothing to `method=rtn`"):
        ulbq.quantize(dense, method="rtn", act_order=True)
    with pytest.raises(UsageError, match="takes `output`"):
        ulbq.convert(dense, out=tmp_path)
    with pytest.raises(UsageError, match="no `precision=fp8`"):
        ulbq.load(dense, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        ulbq.finetune(dense, task="wikitext2")
