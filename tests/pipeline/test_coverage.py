"""How much of a model is quantized is told everywhere, and a run that quantizes little of it does not pass for one."""

import json
from pathlib import Path

import pytest
import torch

from tests.models.tiny import save_tiny
from tests.pipeline.runs import request
from tests.told import Ulbq
from ulbq.artifacts.manifest import QuantizedManifest, read_manifest
from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError
from ulbq.nn.experts import Fusion
from ulbq.pipeline.quantize import plan, quantize

# Of a Mixtral of two blocks: attention; experts with their router and two norms; embedding, head and last norm.
_ATTENTION = 64 * (64 + 32 + 32 + 64)
_REST = 4 * 3 * 64 * 128 + 4 * 64 + 2 * 64
_OUTSIDE = 2 * 256 * 64 + 64


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With experts that nobody takes apart, as of a family that stores them in a way of its own."""
    monkeypatch.setattr(Fusion, "of", lambda module: None)
    return save_tiny("mixtral", tmp_path / "m", num_hidden_layers=2, tied=False, dtype=torch.bfloat16)


def test_every_value_counts_once(tiny_llama: Path, tmp_path: Path) -> None:
    asked = request(tiny_llama, tmp_path / "q", method="rtn", group_size=32)
    found = plan(asked).coverage
    path, manifest = quantize(asked)
    assert manifest.coverage is not None
    stored = LazyTensors.folder(tiny_llama)
    assert found.total == sum(stored.read(name).numel() for name in stored.names)
    assert found.quantized == manifest.bits.weights
    assert found.in_blocks == found.quantized + 3 * 2 * 64
    assert found.embeddings == 2 * 256 * 64
    assert [(kept.name, kept.why) for kept in found.kept] == [("lm_head", "the head")]
    on_disk = LazyTensors.folder(path).total_bytes * 8
    assert manifest.coverage.bits == pytest.approx(on_disk / found.total)
    assert found.bits == pytest.approx(manifest.coverage.bits)
    assert manifest.coverage == found.model_copy(update={"bits": manifest.coverage.bits})


def test_a_tied_head_counts_with_its_embedding(tmp_path: Path) -> None:
    found = plan(request(save_tiny("llama", tmp_path, tied=True), tmp_path / "q", method="rtn")).coverage
    assert found.embeddings == 256 * 64
    assert found.total == found.in_blocks + found.embeddings + 64


def test_less_than_half_of_the_blocks_is_refused(mixture: Path, tmp_path: Path, ulbq: Ulbq) -> None:
    asked = request(mixture, tmp_path / "q", method="rtn", group_size=32, allow_partial=False)
    with pytest.raises(InputError, match=r"^Only 11.1% of the weights in the blocks would be quantized") as caught:
        plan(asked)
    assert "2 × model.layers.*.mlp.experts (0.2 M weights): MixtralExperts is no linear layer;" in caught.value.message
    assert "lm_head" not in caught.value.message
    told = ulbq("quantize", mixture, "--method", "rtn", "-o", tmp_path / "q")
    assert told.code == 3
    assert "--allow-partial" in told.err
    told = ulbq("quantize", mixture, "--method", "rtn", "--allow-partial", "-o", tmp_path / "q")
    assert told.code == 0
    manifest = read_manifest(tmp_path / "q")
    assert isinstance(manifest, QuantizedManifest)
    assert manifest.coverage is not None
    assert manifest.coverage.quantized == 2 * _ATTENTION
    assert manifest.coverage.in_blocks == 2 * (_ATTENTION + _REST)
    assert manifest.coverage.total == 2 * (_ATTENTION + _REST) + _OUTSIDE
    assert any(said.startswith("11.1% of the weights in the blocks are quantized") for said in manifest.warnings)
    share = "Quantized 0.0 of 0.3 M weights (9.6%)"
    assert share in (tmp_path / "q" / "README.md").read_text()
    assert share in " ".join(ulbq("inspect", tmp_path / "q").out.split())


def test_a_large_embedding_warns_of_nothing(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "m", num_hidden_layers=1, vocab=900)
    _, manifest = quantize(request(dense, tmp_path / "q", method="rtn", group_size=32, allow_partial=False))
    assert manifest.coverage is not None
    assert manifest.coverage.quantized < manifest.coverage.total / 2
    assert manifest.warnings == ()


def test_an_older_manifest_says_nothing_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    _, manifest = quantize(request(tiny_llama, tmp_path / "q", method="rtn", group_size=32))
    older = json.loads(manifest.model_dump_json())
    del older["coverage"]
    assert QuantizedManifest.model_validate(older).coverage is None
