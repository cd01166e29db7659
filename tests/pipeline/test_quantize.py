"""Whole runs on tiny models: what is written, reloaded, resumed and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.models.tiny import FAMILIES, save_tiny
from tests.pipeline.runs import StopAt, db_llm, logits, request, shards, simulated_logits
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.shards import LazyTensors
from ulbq.artifacts.whole import verify
from ulbq.errors import InputError, NumericsError, UsageError
from ulbq.models.blocks import skeleton
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline import layout
from ulbq.pipeline.quantize import plan, quantize
from ulbq.progress import Silent


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_packed_and_reloads_to_the_simulated_model(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / family)
    path, manifest = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    model = load_model(resolve(dense), dtype=torch.float32)
    outside = {id(model.get_output_embeddings())}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in outside}
    assert {layer.name for layer in manifest.layers} == linears
    verify(path)


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "deepseek"])
def test_trained_blocks_with_biases_and_buffers_reload_as_they_were_simulated(
    family: str, samples: Path, tmp_path: Path
) -> None:
    dense = save_tiny(family, tmp_path / family)
    path, manifest = quantize(db_llm(dense, tmp_path / "q", samples, group_size=-1, epochs=1))
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    assert manifest.bits.bits_per_weight < 3.1


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_bit_a_weight_and_one_scale_a_row(symmetric: bool, tiny_llama: Path, tmp_path: Path) -> None:
    asked = request(tiny_llama, tmp_path / "q", method="rtn", bits=1, group_size=-1, symmetric=symmetric)
    path, manifest = quantize(asked)
    torch.testing.assert_close(logits(path), simulated_logits(tiny_llama, path), atol=1e-5, rtol=1e-5)
    assert all(0.1 < layer.error < 1 for layer in manifest.layers)


def test_a_correction_bias_keeps_its_float32(samples: Path, tmp_path: Path) -> None:
    dense = save_tiny("deepseek", tmp_path / "dense")
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", group_size=32))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert resolve(path).read(name).dtype == torch.float32
    assert torch.equal(resolve(path).read(name), resolve(dense).read(name))


def test_what_the_quantized_stream_runs_through_is_what_the_shard_holds(samples: Path, tmp_path: Path) -> None:
    source = resolve(save_tiny("deepseek", tmp_path / "dense"))
    model = skeleton(source)
    path, manifest = quantize(request(source.path, tmp_path / "q", method="rtn", group_size=32))
    prefix = "model.layers.1."
    linears = [layer.name.removeprefix(prefix) for layer in manifest.layers if layer.name.startswith(prefix)]
    scheme = next(iter(resolve(path).packed.values()))
    block = layout.packed_block(model, 1, path / layout.block_shard(1), linears, scheme)
    stored = load_file(path / layout.block_shard(1))
    assert {prefix + name for name in block.state_dict()} == set(stored)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, stored[prefix + name].to(tensor.dtype)), name


def test_a_model_in_float16_stays_in_float16(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", dtype=torch.float16)
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", group_size=32))
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(resolve(path).read(name), resolve(dense).read(name))
    assert resolve(path).config.dtype == torch.float16


@pytest.mark.parametrize(
    ("method", "options"), [("db-llm", {}), ("gptq", {"epochs": None}), ("claq", {"epochs": None, "group_size": None})]
)
def test_a_layer_that_no_sample_calls_stays_and_is_named(
    tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: Any
) -> None:
    def by_itself(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * nn.functional.linear(x, self.up_proj.weight))

    monkeypatch.setattr(LlamaMLP, "forward", by_itself)
    path, manifest = quantize(db_llm(tiny_llama, tmp_path / "q", samples, method=method, **options))
    assert [layer.name for layer in manifest.layers if layer.name.endswith("up_proj")] == []
    assert len(manifest.layers) == 3 * 6
    assert any(said.startswith("Blocks 0 to 2, mlp.up_proj: never called") for said in manifest.warnings)
    assert manifest.coverage is not None
    assert [(kept.name, kept.modules) for kept in manifest.coverage.kept] == [
        ("model.layers.*.mlp.up_proj", 3),
        ("lm_head", 1),
    ]
    torch.testing.assert_close(logits(path), simulated_logits(tiny_llama, path), atol=1e-5, rtol=1e-5)


class _Notes(Silent):
    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, text: str) -> None:
        self.found.append(text)


def test_without_a_compiler_the_cost_is_told_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ulbq.kernels.solvers.solvers_unavailable_reason", lambda: "no C++ compiler")
    told = _Notes()
    slow, manifest = quantize(request(tiny_llama, tmp_path / "slow", method="rtn", bits=2, group_size=32), told)
    assert len({layer.name.split(".")[2] for layer in manifest.layers}) > 1
    assert [text for text in told.found if "compile" in text] == [
        "No compiled solvers (no C++ compiler): the search for the best scales takes some 40 times as long."
    ]
    quick = _Notes()
    quantize(request(tiny_llama, tmp_path / "plain", method="rtn", bits=2, group_size=32, search=False), quick)
    monkeypatch.undo()
    fast, _ = quantize(request(tiny_llama, tmp_path / "fast", method="rtn", bits=2, group_size=32), quick)
    assert not any("compile" in text for text in quick.found)
    assert (logits(slow) - logits(fast)).norm() < 0.01 * logits(fast).norm()


def test_the_accounting_is_what_lies_on_disk(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    for name, asked in (
        ("db", db_llm(tiny_llama, tmp_path / "db", samples)),
        ("rtn", request(tiny_llama, tmp_path / "rtn", method="rtn", bits=3, group_size=32)),
    ):
        path, manifest = quantize(asked)
        stored = [tensor for file in path.glob("model-*.safetensors") for tensor in load_file(file).values()]
        assert sum(manifest.bits.parts.values()) == 8 * sum(tensor.nbytes for tensor in stored), name
        weights = sum(layer.shape[0] * layer.shape[1] for layer in manifest.layers)
        assert manifest.bits.weights == weights
        assert manifest.bits.bits_per_weight == pytest.approx({"db": 2 + 32 / 32, "rtn": 3 + (16 + 3) / 32}[name])


def test_four_bits_stay_close_and_fewer_bits_are_further_away(tiny_llama: Path, tmp_path: Path) -> None:
    exact = logits(tiny_llama)
    distance = {}
    for bits in (8, 4, 2):
        path, _ = quantize(request(tiny_llama, tmp_path / str(bits), method="rtn", bits=bits, group_size=32))
        distance[bits] = (logits(path) - exact).norm() / exact.norm()
    assert distance[8] < 0.02
    assert distance[8] < distance[4] < distance[2]


def test_training_brings_the_blocks_closer_than_their_closed_form_start(
    tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    path, manifest = quantize(db_llm(tiny_llama, tmp_path / "q", samples, epochs=6))
    assert all(block.end_error < block.start_error for block in manifest.blocks)
    start, _ = quantize(db_llm(tiny_llama, tmp_path / "start", samples, epochs=0))
    held = load_file(samples)["tokens"][8:].long()
    exact = logits(tiny_llama, held)
    assert (logits(path, held) - exact).norm() < (logits(start, held) - exact).norm()


def test_the_trained_norms_are_stored(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    path, _ = quantize(db_llm(tiny_llama, tmp_path / "q", samples, norm_lr=0.05))
    frozen, _ = quantize(db_llm(tiny_llama, tmp_path / "f", samples, norm_lr=0))
    name = "model.layers.1.input_layernorm.weight"
    original = resolve(tiny_llama).read(name).float()
    # Further than the rounding of what is copied.
    assert (resolve(path).read(name) - original).abs().max() > 0.02
    torch.testing.assert_close(resolve(frozen).read(name).float(), original, atol=2**-8, rtol=2**-8)


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    blocks: int, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    straight, _ = quantize(db_llm(tiny_llama, tmp_path / "straight", samples))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(db_llm(tiny_llama, out, samples), StopAt(out, blocks))
    assert not out.exists()
    partial = out.with_name("stopped.partial")
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-block-*")}
    assert len(done) >= blocks
    resumed, _ = quantize(db_llm(tiny_llama, out, samples))
    assert shards(resumed) == shards(straight)
    kept = {name: (resumed / name).stat().st_mtime_ns for name in done}
    assert sum(kept[name] == time for name, time in done.items()) >= blocks
    assert not partial.exists()


def test_the_device_by_another_name_is_no_other_run(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize(db_llm(tiny_llama, out, samples), StopAt(out, 1))
    assert quantize(db_llm(tiny_llama, out, samples).model_copy(update={"device": "cpu:0"}))[0] == out
    assert not out.with_name("q.partial").exists()


def test_an_interrupted_run_with_other_settings_is_refused(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        quantize(db_llm(tiny_llama, out, samples), StopAt(out, 1))
    for changed in ({"epochs": 3}, {"seed": 1}, {"group_size": 16}, {"token_weighting": "uniform"}):
        with pytest.raises(InputError):
            quantize(db_llm(tiny_llama, out, samples, **changed))
    assert quantize(db_llm(tiny_llama, out, samples))[0] == out


def test_activations_on_disk_give_the_same_weights(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    memory, _ = quantize(db_llm(tiny_llama, tmp_path / "memory", samples))
    disk, _ = quantize(db_llm(tiny_llama, tmp_path / "disk", samples, activation_memory=0))
    assert shards(memory) == shards(disk)


def test_the_seed_and_the_options_reach_the_weights(samples: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", num_hidden_layers=1)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "frozen": {"train_weights": False},
        "uniform": {"token_weighting": "uniform"},
        "augmented": {"augmented_loss": True},
        "rate": {"weight_lr": 0.05},
        "scale rate": {"scale_lr": 0.02},
        "norm rate": {"norm_lr": 0.01},
        "clip": {"clip": 1e-3},
        "batch": {"batch_size": 2},
        "seed": {"seed": 1},
    }
    made = {}
    for name, changes in variants.items():
        folder, _ = quantize(db_llm(source, tmp_path / name, samples, **changes))
        made[name] = (folder / "model-block-00000.safetensors").read_bytes()
    assert len(set(made.values())) == len(variants)


def test_a_sources_side_files_travel_and_the_original_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    path, manifest = quantize(request(tiny_llama, tmp_path / "q", method="rtn", group_size=32))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(manifest.files)
    assert resolve(path).tokenizer().chat_template == resolve(tiny_llama).tokenizer().chat_template
    assert {path.name: path.read_bytes() for path in tiny_llama.iterdir()} == before


def test_the_model_writes_its_own_samples(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    first, manifest = quantize(db_llm(tiny_llama, tmp_path / "a", samples, calibration="self", epochs=1))
    assert isinstance(manifest, QuantizedManifest)
    assert manifest.calibration["name"] == "self"
    second, _ = quantize(db_llm(tiny_llama, tmp_path / "b", samples, calibration="self", epochs=1))
    assert shards(first) == shards(second)


def test_a_group_size_that_does_not_divide_is_refused_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        quantize(request(tiny_llama, tmp_path / "q", method="rtn", group_size=48))
    assert "model.layers.0" in refused.value.message
    assert "32" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_already_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path, _ = quantize(request(tiny_llama, tmp_path / "q", method="rtn", group_size=32))
    with pytest.raises(InputError, match="quantized already") as refused:
        plan(request(path, tmp_path / "q2", method="rtn", group_size=32))
    assert str(tiny_llama) in refused.value.hint


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_a_checkpoint_with_a_gap_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=name):
        plan(request(source, tmp_path / "q", method="rtn", group_size=32))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"])
def test_values_that_are_not_finite_leave_nothing(name: str, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "m", tied=False)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=name):
        quantize(request(source, tmp_path / "q", method="rtn", group_size=32))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_samples_longer_than_the_model_takes_are_no_plan(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="256 positions"):
        plan(db_llm(tiny_llama, tmp_path / "q", samples, sequence_length=300))


@pytest.mark.parametrize(
    "changes",
    [{"seed": 2**64}, {"samples": 10**9}, {"weight_lr": torch.inf}, {"clip": torch.inf}, {"norm_lr": torch.nan}],
)
def test_absurd_numbers_are_no_request(changes: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        request(tiny_llama, tmp_path / "q", method="db-llm", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "db-llm", "bits": 3},
        {"method": "db-llm", "symmetric": True},
        {"method": "db-llm", "search": False},
        {"method": "rtn", "epochs": 3},
        {"method": "rtn", "calibration": "wikitext2"},
        {"method": "rtn", "token_weighting": "energy"},
        {"method": "rtn", "precision": "bf16"},
        {"method": "rtn", "activation_memory": 0},
        {"method": "awq"},
    ],
)
def test_options_that_would_do_nothing_are_refused(changes: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        plan(request(tiny_llama, tmp_path / "q", group_size=32, **changes))


def test_the_plan_says_what_the_run_then_does(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    asked = db_llm(tiny_llama, tmp_path / "q", samples)
    planned = plan(asked)
    assert list(tmp_path.glob("q*")) == []
    path, manifest = quantize(asked)
    assert planned.bits_per_weight == pytest.approx(manifest.bits.bits_per_weight)
    assert planned.layers == len(manifest.layers)
    assert planned.blocks == len(manifest.blocks)
    assert set(planned.skipped) == set(manifest.skipped)
    on_disk = sum(file.stat().st_size for file in path.glob("model-*.safetensors"))
    assert planned.cost.artifact == pytest.approx(on_disk, rel=0.25)
    assert planned.request.model_dump(mode="json") == manifest.request


def test_the_plan_counts_the_experts(tmp_path: Path) -> None:
    asked = request(save_tiny("mixtral", tmp_path / "dense"), tmp_path / "q", method="rtn", group_size=32)
    path, _ = quantize(asked)
    on_disk = LazyTensors.folder(path).total_bytes
    assert plan(asked.model_copy(update={"out": None})).cost.artifact == pytest.approx(on_disk, rel=0.05)


def test_the_plan_counts_the_whole_model_where_it_writes_its_samples(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"samples": 1, "sequence_length": 2, "batch_size": 1, "epochs": 0}
    big = save_tiny("llama", tmp_path / "dense", num_hidden_layers=24)
    tokens = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.arange(20).view(10, 2)}, tokens)
    own, file = (
        plan(request(big, tmp_path / "q", method="db-llm", group_size=32, calibration=name, **sizes)).cost.peak_memory
        for name in ("self", str(tokens))
    )
    assert own > file
