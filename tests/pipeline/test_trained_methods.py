"""Whole runs of the trained methods on tiny models: adapters, stages, saliency, and going on from an artifact."""

import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import save_tiny
from tests.pipeline.runs import TOKENS, logits, request, shards
from ulbq.artifacts.manifest import read_manifest
from ulbq.artifacts.whole import verify
from ulbq.blockwise.activations import ActivationStore
from ulbq.config.saliency import SaliencyRequest
from ulbq.config.stages import Stage
from ulbq.errors import InputError, NumericsError, UsageError
from ulbq.formats import AnyScheme
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.adapter import Adapter
from ulbq.pipeline import predict
from ulbq.pipeline.quantize import plan, quantize
from ulbq.pipeline.saliency import saliency
from ulbq.runtime import MAX_SEED
from ulbq.training.layers import LayerwiseTrainer


@pytest.fixture
def trained(samples: Path) -> dict[str, Any]:
    """Options of a run of seconds."""
    size = {"samples": 8, "sequence_length": 32, "epochs": 2, "precision": "fp32"}
    return {"calibration": str(samples), "group_size": 32, **size}


@pytest.fixture
def scores(tiny_llama: Path, samples: Path, tmp_path: Path) -> Path:
    asked = SaliencyRequest(
        source=str(tiny_llama),
        out=tmp_path / "scores",
        calibration=str(samples),
        samples=4,
        sequence_length=32,
        device="cpu",
        offline=True,
    )
    return saliency(asked)[0]


def test_apiq_writes_an_adapter_that_counts_and_is_scored(
    tiny_llama: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    path, manifest = quantize(request(tiny_llama, tmp_path / "q", method="apiq", bits=2, rank=4, **trained))
    verify(path)
    stored = load_file(path / "adapter" / "adapter_model.safetensors")
    assert manifest.bits.parts["adapter"] == 16 * sum(tensor.numel() for tensor in stored.values())
    base = load_model(resolve(path), dtype=torch.float32, adapter=False)
    with torch.no_grad():
        assert not torch.equal(base(TOKENS).logits, logits(path))
    predicted = plan(request(tiny_llama, tmp_path / "p", method="apiq", bits=2, rank=4, **trained))
    assert predicted.bits_per_weight == pytest.approx(manifest.bits.bits_per_weight)


def test_the_stream_of_later_blocks_is_the_stored_model(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states after the last block of the run are those of the artifact as others load it."""
    from ulbq.pipeline.streams import Streams

    last: dict[str, torch.Tensor] = {}
    advance = Streams.advance_quantized

    def watched(self: Streams, index: int, shard: Path, schemes: Mapping[str, AnyScheme]) -> None:
        advance(self, index, shard, schemes)
        last["hidden"] = self._quantized.get(slice(0, 2))
        last["index"] = torch.tensor(index)

    monkeypatch.setattr(Streams, "advance_quantized", watched)
    # In bfloat16 from the start: what training leaves alone is stored as it came.
    source = save_tiny("llama", tmp_path / "m")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    path, _ = quantize(request(source, tmp_path / "q", method="apiq", rank=4, dora=True, **trained))
    tokens = load_file(path / "calibration.safetensors")["tokens"][:2].long()
    model = load_model(resolve(path), dtype=torch.float32)
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[int(last["index"]) + 1], last["hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_apiq_runs_by_block_and_by_layer(
    granularity: str, symmetric: bool, tiny_llama: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    asked = request(
        tiny_llama,
        tmp_path / "q",
        method="apiq",
        symmetric=symmetric,
        granularity=granularity,
        adapter=False,
        **trained,
    )
    _, manifest = quantize(asked)
    assert "adapter" not in manifest.bits.parts
    layers = manifest.layers[0].name.startswith("model.layers.0") and granularity == "layer"
    # Every group of layers has steps of its own: q, k, v; o; gate and up; down.
    assert all(block.steps == (32 if layers else 8) for block in manifest.blocks)
    # Layers are trained each on its own output: a block may lose what the next ones win.
    better = [block.end_error < block.start_error for block in manifest.blocks]
    assert all(better) or granularity == "layer"
    assert sum(block.end_error for block in manifest.blocks) < sum(block.start_error for block in manifest.blocks)


def test_targets_that_no_layer_has_are_said(tiny_llama: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is called 'query'"):
        plan(request(tiny_llama, tmp_path / "q", method="apiq", targets=("query",), **trained))


def test_targets_limit_the_adapter(tiny_llama: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    asked = request(tiny_llama, tmp_path / "q", method="apiq", targets=("q_proj", "v_proj"), rank=4, **trained)
    path, _ = quantize(asked)
    names = load_file(path / "adapter" / "adapter_model.safetensors").keys()
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


def test_targets_name_the_layers_of_single_blocks(tiny_llama: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    asked = request(
        tiny_llama, tmp_path / "q", method="apiq", targets=("layers.1.self_attn.q_proj",), rank=4, **trained
    )
    path, manifest = quantize(asked)
    names = load_file(path / "adapter" / "adapter_model.safetensors").keys()
    assert {name.rpartition(".lora")[0] for name in names} == {"base_model.model.model.layers.1.self_attn.q_proj"}
    assert plan(asked).bits_per_weight == pytest.approx(manifest.bits.bits_per_weight)


def test_the_largest_seed_is_taken(tiny_llama: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    trained["epochs"] = 1
    path, manifest = quantize(request(tiny_llama, tmp_path / "q", method="apiq", rank=4, seed=MAX_SEED, **trained))
    assert manifest.seed == MAX_SEED
    assert logits(path).isfinite().all()


def test_an_adapter_that_float16_does_not_hold_is_said(
    tiny_llama: Path, trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "tensors", lambda self: {"lora_A.weight": torch.full((4, 4), torch.inf).half()})
    with pytest.raises(NumericsError, match="Block 0"):
        quantize(request(tiny_llama, tmp_path / "q", method="apiq", rank=4, **trained))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """The most bytes of activations that were at once in memory, and on disk."""
    stores: weakref.WeakSet[ActivationStore] = weakref.WeakSet()
    most = [0, 0]
    plain = ActivationStore.__init__

    def counted(self: ActivationStore, *arguments: Any, **named: Any) -> None:
        plain(self, *arguments, **named)
        stores.add(self)
        for place in (0, 1):
            most[place] = max(most[place], sum(x.nbytes for x in stores if x.in_memory is (place == 0)))

    monkeypatch.setattr(ActivationStore, "__init__", counted)
    return lambda: (most[0], most[1])


@pytest.mark.parametrize("changes", [{}, {"augmented_loss": True}], ids=str)
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_activations_keep_to_their_memory_and_the_plan_knows_the_rest(
    granularity: str,
    changes: dict[str, Any],
    tiny_llama: Path,
    trained: dict[str, Any],
    tmp_path: Path,
    live: Callable[[], tuple[int, int]],
) -> None:
    options = {"method": "apiq", "granularity": granularity, "adapter": False, **trained, **changes, "epochs": 1}
    # Enough for the streams in memory, layer by layer for nothing else.
    limit = 4 * (8 + 2) * 32 * 64 * 4
    quantize(request(tiny_llama, tmp_path / "held", activation_memory=limit, **options))
    assert live()[0] <= limit
    asked = request(tiny_llama, tmp_path / "q", activation_memory=0, **options)
    cost = plan(asked).cost
    quantize(asked)
    # Beside the weights lie the files of a tokenizer of 256 tokens.
    assert cost.disk - cost.artifact - predict._TOKENIZER_BYTES * 256 == live()[1]


def test_the_plan_counts_adapters_scores_and_references(
    tiny_llama: Path, scores: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    def cost(**changes: Any) -> Any:
        options = {"method": "ulb-sapr", "rank": 4, "penalty": 1.0, "saliency": "none", **trained, **changes}
        return plan(request(tiny_llama, tmp_path / "q", **options)).cost

    trained["samples"] = 4
    path, _ = quantize(request(tiny_llama, tmp_path / "q", method="apiq", rank=4, **trained))
    stored = sum(tensor.nbytes for tensor in load_file(path / "adapter" / "adapter_model.safetensors").values())
    without, adapted, weighed = cost(adapter=False, rank=None), cost(), cost(saliency=str(scores))
    assert adapted.artifact - without.artifact == stored
    # Each in turn: what the process had at its peak before can only grow.
    assert adapted.peak_memory > without.peak_memory
    assert weighed.peak_memory > adapted.peak_memory
    assert cost(granularity="layer").peak_memory > cost().peak_memory
    weights = sum(file.stat().st_size for file in scores.glob("saliency-block-*.safetensors"))
    assert cost(saliency="fisher").disk - weighed.disk == pytest.approx(weights, rel=0.02)
    # Beyond the memory, the way back needs the inputs of all blocks on disk; with many samples nothing needs more.
    many = cost(saliency="fisher", activation_memory=0, samples=64).disk
    assert many == pytest.approx(weights + 4 * 64 * 32 * 64 * 4, rel=0.02)


def test_layer_by_layer_the_model_itself_is_learned_and_not_the_artifact(
    tiny_llama: Path, trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "apiq", "adapter": False, **trained}
    first, _ = quantize(request(tiny_llama, tmp_path / "first", **options))
    seen: list[list[torch.Tensor]] = []

    class Watched(LayerwiseTrainer):
        def __init__(self, *blocks: Any, **others: Any) -> None:
            seen.append([block.get_submodule("input_layernorm").weight.detach().clone() for block in blocks[:2]])
            super().__init__(*blocks, **others)

    monkeypatch.setattr("ulbq.methods.training.LayerwiseTrainer", Watched)
    quantize(request(first, tmp_path / "more", granularity="layer", **options))
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(seen[0][0], resolve(first).read(name))
    assert torch.equal(seen[0][1], resolve(tiny_llama).read(name))
    assert not torch.equal(*seen[0])


def test_ulb_sapr_takes_scores_as_source_by_path_and_on_the_fly(
    tiny_llama: Path, scores: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    options = {"method": "ulb-sapr", "rank": 4, "penalty": 3.0, **trained}
    piped, manifest = quantize(request(scores, tmp_path / "piped", **options))
    named, _ = quantize(request(tiny_llama, tmp_path / "named", saliency=str(scores), **options))
    assert shards(piped) == shards(named)
    assert [parent.kind for parent in manifest.parents] == ["folder", "saliency"]
    computed, _ = quantize(request(tiny_llama, tmp_path / "computed", saliency="fisher", **options))
    alike, _ = quantize(request(tiny_llama, tmp_path / "alike", saliency="none", **options))
    assert shards(computed) != shards(alike)
    assert shards(piped) != shards(alike)


def test_stages_and_the_growth_of_lambda_decide_the_weights(
    tiny_llama: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    del trained["epochs"]
    stages = (Stage(name="wpt", epochs=1), Stage(name="mixed", epochs=1), Stage(name="opt", epochs=1))
    made = {}
    for name, changes in {
        "plain": {},
        "grown": {"block_multiplier": 2.0},
        "after": {"penalize": "after-adapter"},
    }.items():
        options = {"stages": stages, "saliency": "none", "rank": 4, "penalty": 1.0, **changes}
        path, manifest = quantize(request(tiny_llama, tmp_path / name, method="ulb-sapr", **options, **trained))
        made[name] = shards(path)
        assert manifest.request["stages"][0]["name"] == "wpt"
    first = "model-block-00000.safetensors"
    assert made["grown"][first] == made["plain"][first]
    assert made["grown"] != made["plain"]
    assert made["after"] != made["plain"]


def test_scores_of_another_model_are_refused(scores: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    other = save_tiny("qwen2", tmp_path / "other")
    with pytest.raises(InputError, match="another model"):
        plan(request(other, tmp_path / "q", method="ulb-sapr", saliency=str(scores), **trained))


def test_a_saliency_that_is_neither_path_nor_kind_is_said(
    tiny_llama: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no saliency artifact 'fischer'"):
        plan(request(tiny_llama, tmp_path / "q", method="ulb-sapr", saliency="fischer", **trained))


def test_scores_mean_nothing_to_rounding(scores: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="saliency"):
        plan(request(scores, tmp_path / "q", method="rtn"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("apiq", {"bits": 2, "rank": 4}),
        ("apiq", {"bits": 3, "rank": 4, "dora": True}),
        ("apiq", {"bits": 1, "symmetric": True, "adapter": False}),
        ("db-llm", {}),
        ("binary-mos", {"experts": 2, "group_size": None}),
        ("apiq", {"adapter": False, "norm_lr": 0.0}),
    ],
)
def test_no_epochs_from_an_artifact_export_it_again(
    method: str, options: dict[str, Any], tiny_llama: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    options = {"method": method, **trained, **options}
    first, made = quantize(request(tiny_llama, tmp_path / "first", **options))
    again, manifest = quantize(request(first, tmp_path / "again", **{**options, "epochs": 0}))
    assert shards(again) == shards(first)
    assert [parent.kind for parent in manifest.parents] == ["folder", "quantized"]
    assert manifest.parents[1].sha256 == made.digest
    if (first / "adapter").is_dir():
        name = "adapter/adapter_model.safetensors"
        assert (again / name).read_bytes() == (first / name).read_bytes()
    else:
        assert not (again / "adapter").exists()


def test_going_on_trains_further(tiny_llama: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    options = {"method": "apiq", "rank": 4, **trained}
    first, made = quantize(request(tiny_llama, tmp_path / "first", **options))
    _, manifest = quantize(request(first, tmp_path / "more", **options))
    assert manifest.blocks[0].start_error == pytest.approx(made.blocks[0].end_error, rel=0.02)
    assert manifest.blocks[0].end_error < made.blocks[0].end_error


def test_an_adapter_can_be_left_behind_or_added(tiny_llama: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    with_adapter, _ = quantize(request(tiny_llama, tmp_path / "a", method="apiq", rank=4, **trained))
    without, manifest = quantize(request(with_adapter, tmp_path / "b", method="apiq", adapter=False, **trained))
    assert "adapter" not in manifest.bits.parts
    _, manifest = quantize(request(without, tmp_path / "c", method="ulb-sapr", saliency="none", rank=2, **trained))
    assert manifest.bits.parts["adapter"] > 0


def test_another_format_or_another_adapter_is_refused(
    tiny_llama: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    first, _ = quantize(request(tiny_llama, tmp_path / "first", method="apiq", rank=4, **trained))
    with pytest.raises(InputError, match=r"stores affine w2g32, this run dual_binary"):
        plan(request(first, tmp_path / "q", method="db-llm", **trained))
    with pytest.raises(InputError, match="rank 4"):
        plan(request(first, tmp_path / "q", method="apiq", rank=8, **trained))


def test_a_model_that_is_gone_is_said(trained: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "m")
    first, _ = quantize(request(model, tmp_path / "first", method="apiq", adapter=False, **trained))
    shutil.rmtree(model)
    with pytest.raises(InputError, match="not there any more"):
        plan(request(first, tmp_path / "q", method="apiq", adapter=False, **trained))
    save_tiny("qwen2", model)
    with pytest.raises(InputError, match="has changed"):
        plan(request(first, tmp_path / "q", method="apiq", adapter=False, **trained))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_killed_run_with_adapter_and_scores_goes_on_to_the_same_bytes(
    dropout: float, tiny_llama: Path, trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "ulb-sapr", "rank": 4, "saliency": "fisher", "penalty": 1.0, "dropout": dropout, **trained}
    whole, _ = quantize(request(tiny_llama, tmp_path / "whole", **options))
    from ulbq.methods import UlbSapr

    quantize_block = UlbSapr.quantize_block

    def dies(self: UlbSapr, task: Any) -> Any:
        if task.index == 1:
            raise KeyboardInterrupt
        return quantize_block(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(UlbSapr, "quantize_block", dies)
        with pytest.raises(KeyboardInterrupt):
            quantize(request(tiny_llama, tmp_path / "cut", **options))
    resumed, _ = quantize(request(tiny_llama, tmp_path / "cut", **options))
    assert shards(resumed) == shards(whole)
    name = "adapter/adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert read_manifest(resumed).fingerprint == read_manifest(whole).fingerprint
