"""Models whose blocks are read as they run, against the same models loaded."""

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import save_tiny
from ulbq.artifacts.shards import LazyTensors
from ulbq.blockwise import streamed as streamed_module
from ulbq.blockwise.streamed import StreamedModel, whole_model
from ulbq.errors import InputError
from ulbq.models import tables
from ulbq.models.blocks import empty_copy
from ulbq.models.load import load_model, loading_memory, model_memory, unfilled_model
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.quant_linear import QuantLinear

GOLDEN = Path(__file__).parents[1] / "golden" / "artifacts"
PACKED = ("affine", "affine-rotated", "binary-mos", "codebook", "dual-binary", "trellis")
TOKENS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))


def streamed(source: ModelSource, directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> StreamedModel:
    return StreamedModel(source, dtype=dtype, device=torch.device("cpu"), directory=directory, **options)


def check_same(source: ModelSource, directory: Path, dtype: torch.dtype, **options: Any) -> None:
    """Logits of batches, of all of them and of some positions, are those of the loaded model to the bit."""
    loaded, model = load_model(source, dtype=dtype), streamed(source, directory, dtype, **options)
    tokens = TOKENS % int(loaded.config.get_text_config().vocab_size)
    passed, whole = model.pass_blocks(tokens, 2), model.whole()
    with torch.inference_mode():
        for start in (0, 2, 4):
            rows = slice(start, start + 2)
            expected = loaded(input_ids=tokens[rows], use_cache=False).logits
            assert torch.equal(passed.logits(rows), expected)
            assert torch.equal(whole(input_ids=tokens[rows], use_cache=False).logits, expected)
        torch.testing.assert_close(passed.logits(slice(4, 5), slice(3, 7)), expected[:, 3:7])
    for layer in loaded.modules():
        if isinstance(layer, QuantLinear):
            layer.prepare()
    assert model.held == model_memory(loaded).weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gemma2", True), ("qwen3_moe", False), ("gpt_oss", False)]
)
def test_computes_what_the_loaded_model_does(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    check_same(resolve(save_tiny(family, tmp_path / "model", tied=tied)), tmp_path, dtype)


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("name", PACKED)
def test_computes_what_a_loaded_artifact_does(name: str, limit: int, tmp_path: Path) -> None:
    check_same(resolve(GOLDEN / name, offline=True), tmp_path, torch.float32, limit=limit)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["adapted", "finetuned"])
def test_an_adapter_stands_beside_its_layers(name: str, dtype: torch.dtype, close: float, tmp_path: Path) -> None:
    source = resolve(GOLDEN / name, offline=True)
    tokens = TOKENS % source.config.vocab_size
    logits = {
        adapter: streamed(source, tmp_path, dtype, adapter=adapter).pass_blocks(tokens, 5).logits(slice(None)).float()
        for adapter in (True, False)
    }
    for adapter, found in logits.items():
        with torch.no_grad():
            expected = load_model(source, dtype=dtype, adapter=adapter)(tokens).logits.float()
        torch.testing.assert_close(found, expected, atol=close * float(expected.abs().max()), rtol=0)
    assert not torch.equal(logits[True], logits[False])


def test_writes_what_the_loaded_model_writes(tiny_llama: Path, tmp_path: Path) -> None:
    source, settings = resolve(tiny_llama), {"max_new_tokens": 6, "do_sample": False}
    loaded, model = load_model(source, dtype=torch.float32), streamed(source, tmp_path)
    assert whole_model(loaded) is loaded
    found = whole_model(model).generate(TOKENS[:2], **settings)
    assert torch.equal(found, loaded.generate(TOKENS[:2], **settings))


def test_one_block_is_there_at_a_time_and_read_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, alive, reads = resolve(tiny_llama), [], Counter[str]()
    read, ready = ModelSource.read, StreamedModel._ready

    def counting(self: ModelSource, name: str) -> torch.Tensor:
        reads[name] += 1
        return read(self, name)

    def noting(self: StreamedModel, index: int, block: torch.nn.Module) -> torch.nn.Module:
        gc.collect()
        assert not any(left() is not None for left in alive)
        alive.append(weakref.ref(block))
        return ready(self, index, block)

    monkeypatch.setattr(ModelSource, "read", counting)
    monkeypatch.setattr(StreamedModel, "_ready", noting)
    model = streamed(source, tmp_path)
    assert not reads
    model.pass_blocks(TOKENS, 2).logits(slice(None))
    assert {count for name, count in reads.items() if name != "model.norm.weight"} == {1}
    assert len(alive) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_no_head_stays_on_disk(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reads = resolve(save_tiny("llama", tmp_path / "m", tied=tied)), list[str]()
    read = ModelSource.read

    def noting(self: ModelSource, name: str) -> torch.Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(ModelSource, "read", noting)
    model = streamed(source, tmp_path).whole()
    assert ("model.embed_tokens.weight" in reads) == tied
    assert model.device == torch.device("cpu")
    expected = read(source, "model.embed_tokens.weight")[TOKENS]
    assert torch.equal(model.get_input_embeddings()(TOKENS), expected)
    with pytest.raises(IndexError):
        model.get_input_embeddings()(torch.tensor([[10**6]]))


@pytest.mark.parametrize("tied", [False, True])
def test_samples_pass_with_embedding_and_head_on_disk(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, parts = resolve(save_tiny("llama", tmp_path / "m", tied=tied)), list[int]()
    expected = load_model(source, dtype=torch.bfloat16)(TOKENS[:2], use_cache=False).logits
    read, rows = ModelSource.read, LazyTensors.read_rows

    def blocks_alone(self: ModelSource, name: str) -> torch.Tensor:
        assert "embed" not in name
        assert "head" not in name
        return read(self, name)

    def noting(self: LazyTensors, name: str, chosen: Sequence[int]) -> torch.Tensor:
        parts.append(len(chosen))
        return rows(self, name, chosen)

    monkeypatch.setattr(ModelSource, "read", blocks_alone)
    monkeypatch.setattr(LazyTensors, "read_rows", noting)
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 96)
    passed = streamed(source, tmp_path, torch.bfloat16).pass_blocks(TOKENS[:2], 2, head_on_disk=True)
    parts.clear()
    assert torch.equal(passed.logits(slice(0, 2)), expected)
    assert parts == [96, 96, 64]


@pytest.mark.parametrize("vocabulary", [200, 300])
def test_an_embedding_and_a_head_of_another_shape_are_refused(vocabulary: int, tmp_path: Path) -> None:
    config = save_tiny("llama", tmp_path / "m", tied=False) / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 256', f'"vocab_size": {vocabulary}'))
    model = streamed(resolve(tmp_path / "m"), tmp_path, torch.bfloat16)
    tokens = TOKENS[:2] % 200
    with pytest.raises(InputError, match=r"holds 'model\.embed_tokens\.weight' as"):
        model.pass_blocks(tokens, 2, head_on_disk=True)
    with pytest.raises(InputError, match=r"holds 'model\.embed_tokens\.weight' as"):
        model.whole()
    outer = empty_copy(unfilled_model(resolve(tmp_path / "m"), torch.bfloat16))
    assert not tables.head_from_disk(outer, resolve(tmp_path / "m").rows, torch.bfloat16, model.device)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_on_disk_adds_its_bias(bias: bool, tiny_llama: Path) -> None:
    model = load_model(resolve(tiny_llama), dtype=torch.float32)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.arange(256.0)) if bias else None
    weight, expected = head.weight, head(x := torch.randn(3, 64))
    assert tables.head_from_disk(
        model, lambda name, shape: lambda rows: weight[rows], torch.float32, torch.device("cpu")
    )
    assert not head.weight.numel()
    assert torch.equal(head(x), expected)


def test_what_loading_takes_is_known_before(tmp_path: Path) -> None:
    dense, packed = resolve(save_tiny("llama", tmp_path / "m", tied=False)), resolve(GOLDEN / "affine", offline=True)
    table = 256 * 64 * 2
    assert loading_memory(dense, torch.bfloat16) == table + sum(
        p.nbytes for p in load_model(dense, dtype=torch.bfloat16).parameters()
    )
    held = model_memory(load_model(packed, dtype=torch.float32)).weights
    assert loading_memory(packed, torch.float32) == pytest.approx(held, rel=0.5)
    assert streamed_module.ACTIVATION_MEMORY < 1 << 31
