"""Mixtures of experts through everything that linear layers go through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.data.conftest import write_jsonl
from tests.evaluation.sample import write_mirror
from tests.models.foreign.float_folders import save_fp8, save_mxfp4
from tests.models.tiny import MIXTURES, save_tiny
from tests.pipeline.runs import TOKENS, StopAt, logits, request, shards, simulated_logits
from ulbq.artifacts import verify
from ulbq.config.convert import ConvertRequest
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.generate import GenerateRequest
from ulbq.errors import InputError
from ulbq.models.blocks import load_block, skeleton
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline.convert import convert
from ulbq.pipeline.evaluate import evaluate
from ulbq.pipeline.finetune_plan import prepare
from ulbq.pipeline.finetune_run import finetune
from ulbq.pipeline.generate import generate
from ulbq.pipeline.quantize import plan, quantize
from ulbq.pipeline.tasks import load_task
from ulbq.progress import Silent

HELD = torch.randint(3, 250, (16, 32), generator=torch.Generator().manual_seed(11))


class Notes(Silent):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def transformers_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
        return result


@pytest.mark.parametrize("family", MIXTURES)
def test_every_family_is_quantized_and_reloads_everywhere(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense")
    path, manifest = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
    verify(path)
    blocks = {layer.name.split(".experts.")[0] for layer in manifest.layers if ".experts." in layer.name}
    assert sum(".experts." in layer.name for layer in manifest.layers) == len(blocks) * 4 * 3
    assert not any("experts" in name for name in manifest.skipped)
    ours = logits(path)
    torch.testing.assert_close(ours, simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    assert torch.equal(transformers_logits(path), ours)
    plain, _ = convert(ConvertRequest(source=str(path), to="dense", dtype="fp32", out=tmp_path / "plain"))
    torch.testing.assert_close(transformers_logits(plain), ours, atol=1e-5, rtol=1e-5)
    assert load_file(plain / "model-00002-of-00004.safetensors").keys() <= load_file(dense / "model.safetensors").keys()


def test_a_mixture_in_full_precision_keeps_the_modules_of_transformers(tmp_path: Path) -> None:
    model = load_model(resolve(save_tiny("qwen3_moe", tmp_path)), dtype=torch.float32)
    assert "model.layers.0.mlp.experts.gate_up_proj" in model.state_dict()


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_engines_get_packed_experts_under_the_names_of_the_hub(to: str, tmp_path: Path) -> None:
    dense = save_tiny("mixtral", tmp_path / "dense")
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=4, group_size=32, symmetric=True))
    out, _ = convert(ConvertRequest(source=str(path), to=to, out=tmp_path / "out"))
    assert "| vLLM (`vllm`) | `vllm serve OUT` | NVIDIA GPU | 4." in (path / "README.md").read_text()
    stored = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    prefix, short = "model.layers.1.block_sparse_moe.", "qweight" if to == "gptq" else "weight_packed"
    assert {f"{prefix}experts.{number}.{name}.{short}" for number in range(4) for name in ("w1", "w2", "w3")} < stored
    assert f"{prefix}gate.weight" in stored
    # Engines would look for packed routers otherwise.
    assert "block_sparse_moe" in (out / "config.json").read_text()


def test_a_family_that_stores_experts_as_one_has_no_names_for_packed_ones(tmp_path: Path) -> None:
    dense = save_tiny("gpt_oss", tmp_path / "dense")
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=4, group_size=32, symmetric=True))
    with pytest.raises(InputError, match="store their experts as one"):
        convert(ConvertRequest(source=str(path), to="gptq", out=tmp_path / "out"))
    with pytest.raises(InputError, match="none of those written here"):
        convert(ConvertRequest(source=str(path), to="gguf", out=tmp_path / "out"))
    # What cannot be packed goes dense where that is asked for, and the card says so.
    with pytest.raises(InputError, match="would become dense, at 16 bits"):
        convert(ConvertRequest(source=str(path), engine="vllm", out=tmp_path / "out"))
    assert "| vLLM (`vllm`) | `vllm serve OUT`. Not packed: convert it with" in (path / "README.md").read_text()


def test_all_experts_are_packed_layers(tmp_path: Path) -> None:
    dense = save_tiny("olmoe", tmp_path / "dense")
    path, manifest = quantize(request(dense, tmp_path / "q", method="rtn", bits=2, group_size=32))
    packed = [m for m in load_model(resolve(path), dtype=torch.float32).modules() if isinstance(m, QuantLinear)]
    assert len(packed) == len(manifest.layers)


@pytest.fixture
def unchosen(tmp_path: Path) -> Path:
    """A mixture whose last expert is chosen by no token."""
    folder = save_tiny("glm4_moe", tmp_path / "dense", num_hidden_layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate.e_score_correction_bias"][3] = -100
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def calibration(tmp_path: Path) -> dict[str, Any]:
    tokens = torch.randint(3, 250, (10, 32), generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens.int()}, tmp_path / "tokens.safetensors")
    return {"calibration": str(tmp_path / "tokens.safetensors"), "samples": 8, "sequence_length": 32}


METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 2, "group_size": 32},
    "claq": {"bits": 2},
    "trellis": {"bits": 2, "state_bits": 12},
    "efficientqat": {"bits": 2, "group_size": 32, "epochs": 1},
    "db-llm": {"group_size": 32, "epochs": 1},
}


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_no_token_reaches_is_quantized_like_the_others(
    method: str, unchosen: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    asked = request(unchosen, tmp_path / "q", method=method, precision="fp32", **METHODS[method], **calibration)
    progress = Notes()
    path, manifest = quantize(asked, progress)
    assert any("1 of 4 experts saw no token" in note for note in progress.notes)
    (seen,) = manifest.experts
    assert seen.name == "model.layers.1.mlp.experts"
    assert seen.tokens[3] == 0
    assert min(seen.tokens[:3]) > 0
    assert sum(seen.tokens) % (8 * 32) in (0, 2 * 2 * 32)  # two experts a token, held-out ones counted or not
    assert not any("rounded to nearest" in warning for warning in manifest.warnings)
    torch.testing.assert_close(logits(path), transformers_logits(path), atol=0, rtol=0)
    errors = {layer.name: layer.error for layer in manifest.layers if ".experts." in layer.name}
    alone = [error for name, error in errors.items() if ".experts.3." in name]
    others = [error for name, error in errors.items() if ".experts.3." not in name]
    assert sum(alone) / len(alone) < 2 * sum(others) / len(others)


def test_the_unseen_expert_is_no_plain_rounding(unchosen: Path, calibration: dict[str, Any], tmp_path: Path) -> None:
    plain, _ = quantize(request(unchosen, tmp_path / "rtn", method="rtn", bits=2, group_size=32))
    path, _ = quantize(request(unchosen, tmp_path / "q", method="gptq", bits=2, group_size=32, **calibration))
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = f"model.layers.1.mlp.experts.3.{name}"
        one, other = (resolve(folder).read_packed(layer)["codes"] for folder in (plain, path))
        assert not torch.equal(one, other)


def expert_errors(dense: Path, path: Path) -> list[float]:
    """Relative squared error of each expert's outputs, of all tokens of texts that no calibration saw."""
    model, tokens = load_model(resolve(dense), dtype=torch.float32), HELD
    given: list[torch.Tensor] = []
    model.get_submodule("model.layers.1.mlp.experts").register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(tokens)
        hidden, whole = given[0], torch.ones(len(given[0]), 1)
        pair = []
        for folder in (dense, path):
            source = resolve(folder)
            block = load_block(skeleton(source), source, 1, torch.float32)
            experts = block.get_submodule("mlp.experts")
            pair.append([experts(hidden, (whole * number).long(), whole) for number in range(4)])
    return [((got - want).square().sum() / want.square().sum()).item() for want, got in zip(*pair, strict=True)]


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("method", ["gptq", "trellis"])
def test_an_expert_that_no_token_reaches_errs_at_most_twice_as_much(
    method: str, bits: int, unchosen: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    # Columns that read much and little: what an expert's own tokens, or those lent to it, are for.
    weights = load_file(unchosen / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= torch.logspace(-1, 1, 64)
    save_file(weights, unchosen / "model.safetensors", metadata={"format": "pt"})
    options = {**METHODS[method], "bits": bits, **calibration}
    path, _ = quantize(request(unchosen, tmp_path / "q", method=method, precision="fp32", **options))
    *others, unseen = expert_errors(unchosen, path)
    assert unseen < 2 * sum(others) / len(others)
    plain, _ = quantize(request(unchosen, tmp_path / "rtn", method="rtn", bits=bits, group_size=32))
    assert unseen < 0.9 * expert_errors(unchosen, plain)[3]


def test_packed_experts_are_measured_and_write(tmp_path: Path) -> None:
    dense = save_tiny("mixtral", tmp_path / "dense")
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
    plain, _ = convert(ConvertRequest(source=str(path), to="dense", dtype="fp32", out=tmp_path / "plain"))
    asked: dict[str, Any] = {"perplexity": ("wikitext2",), "context": 64, "limit": 4, "dtype": "fp32", "offline": True}
    asked |= {"sources": (str(path), str(plain)), "parent_scores": False, "fidelity": False}
    asked["data_dir"] = write_mirror(tmp_path / "mirror")
    _, manifest = evaluate(EvaluateRequest(**asked, out=tmp_path / "scores", device="cpu"))
    packed, whole = (one["perplexity"]["wikitext2"]["value"] for one in manifest.results["models"])
    assert packed == pytest.approx(whole, rel=1e-4)
    told: dict[str, Any] = {"prompt": "once upon", "max_new_tokens": 8, "dtype": "fp32", "device": "cpu"}
    texts = [generate(GenerateRequest(source=str(one), **told)).text for one in (path, plain)]
    assert texts[0] == texts[1] != ""


def test_all_experts_see_all_tokens_where_that_is_asked_for(
    unchosen: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    asked = request(unchosen, tmp_path / "q", method="gptq", group_size=32, all_experts=True, **calibration)
    _, manifest = quantize(asked)
    assert manifest.experts[0].tokens == (8 * 32,) * 4


def test_a_killed_run_goes_on_to_the_same_bytes(unchosen: Path, calibration: dict[str, Any], tmp_path: Path) -> None:
    options = {"method": "gptq", "group_size": 32, **calibration}
    whole, manifest = quantize(request(unchosen, tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        quantize(request(unchosen, tmp_path / "q", **options), StopAt(tmp_path / "q", 0))
    path, resumed = quantize(request(unchosen, tmp_path / "q", **options))
    assert shards(path) == shards(whole)
    assert resumed.experts == manifest.experts


@pytest.mark.parametrize(
    ("family", "left_out"), [("mixtral", "experts"), ("gpt_oss", "experts"), ("mixtral", "up_proj")]
)
def test_experts_that_are_left_out_stay_as_they_are(family: str, left_out: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense")
    asked = request(dense, tmp_path / "q", method="rtn", group_size=32, skip=(left_out,), allow_partial=True)
    path, manifest = quantize(asked)
    assert not any(left_out in layer.name for layer in manifest.layers)
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    assert torch.equal(transformers_logits(path), logits(path))


def test_the_plan_counts_experts(tmp_path: Path) -> None:
    found = plan(request(save_tiny("qwen3_moe", tmp_path / "dense"), tmp_path / "q", method="rtn", group_size=32))
    assert (found.experts, found.layers) == (4, 3 * (4 + 4 * 3))
    assert plan(request(save_tiny("llama", tmp_path / "llama"), tmp_path / "q", method="rtn")).experts == 0


def test_adapters_on_experts_learn_and_everybody_loads_them(tmp_path: Path) -> None:
    dense = save_tiny("qwen3_moe", tmp_path / "dense", num_hidden_layers=2)
    path, _ = quantize(request(dense, tmp_path / "q", method="rtn", bits=3, group_size=32))
    rows = [{"instruction": f"count from {n % 5}", "output": f"{n % 5} then {n % 5 + 1}"} for n in range(16)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"data": (str(tmp_path / "rows.jsonl"),), "sequence_length": 200, "batch_size": 4}
    options |= {"samples": 8, "validation_samples": 4, "epochs": 1, "rank": 2, "precision": "fp32", "device": "cpu"}
    job = prepare(str(path), load_task("instructions"), {**options, "offline": True, "out": tmp_path / "ft"}, Silent())
    tuned, manifest = finetune(job)
    assert manifest.finetune is not None
    assert manifest.finetune.end_loss < manifest.finetune.start_loss
    adapted = load_file(tuned / "adapter" / "adapter_model.safetensors")
    assert any(".mlp.experts.3.down_proj.lora_A" in name for name in adapted)
    ours = load_model(resolve(tuned), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    assert ours.config.model_type == theirs.config.model_type == "qwen3_moe"
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(TOKENS[:1], **options), theirs.generate(TOKENS[:1], **options))
    with torch.no_grad():
        expected = ours(TOKENS).logits
        assert torch.equal(theirs(TOKENS).logits, expected)
    plain, _ = convert(
        ConvertRequest(source=str(tuned), to="dense", dtype="fp32", merge_adapter=True, out=tmp_path / "plain")
    )
    torch.testing.assert_close(transformers_logits(plain), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_experts_that_are_published_in_fewer_bits(kind: str, calibration: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    dense = save_fp8("qwen3_moe", folder) if kind == "fp8" else save_mxfp4(folder)
    asked = request(dense, tmp_path / "q", method="gptq", bits=3, group_size=32, **calibration)
    found = plan(asked)
    assert found.stored_as is not None
    assert found.stored_as[0] == kind.upper()
    path, manifest = quantize(asked)
    assert sum(".experts." in layer.name for layer in manifest.layers) == 3 * 4 * 3
    ours = logits(path)
    torch.testing.assert_close(ours, simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    assert torch.equal(transformers_logits(path), ours)
    plain, _ = convert(ConvertRequest(source=str(path), to="dense", dtype="fp32", out=tmp_path / "plain"))
    torch.testing.assert_close(transformers_logits(plain), ours, atol=1e-5, rtol=1e-5)
