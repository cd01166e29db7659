"""Whole runs of the methods that make errors good column by column, on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import save_tiny
from tests.pipeline.runs import StopAt, logits, request, shards, simulated_logits
from ulbq import formats
from ulbq.artifacts.whole import verify
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, UsageError
from ulbq.methods import METHODS
from ulbq.methods.base import BlockTask
from ulbq.models.blocks import Linear, ModelStructure, skeleton, structure
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline import blocks as module
from ulbq.pipeline.quantization_plan import _check_outputs, build_method
from ulbq.pipeline.quantize import plan, quantize


def asked(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    size = {"samples": 8, "sequence_length": 32, "precision": "fp32", "group_size": 32, "bits": 3}
    return request(source, out, **{"method": "gptq", "calibration": str(samples), **size, **changes})


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "mixtral", "deepseek"])
def test_families_are_packed_and_reload_to_the_simulated_model(
    family: str,
    samples: Path,
    tmp_path: Path,
) -> None:
    dense = save_tiny(family, tmp_path / family, num_hidden_layers=2)
    path, manifest = quantize(asked(dense, tmp_path / "q", samples))
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    assert manifest.method == "gptq"
    assert manifest.bits.bits_per_weight == pytest.approx(3 + (16 + 3) / 32)
    assert manifest.blocks == ()
    assert all(0 < layer.error < 0.5 for layer in manifest.layers)
    verify(path)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_comes_closer_than_rounding(bits: int, tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    tokens = load_file(samples)["tokens"][:8].long()
    exact = logits(tiny_llama, tokens)
    path, _ = quantize(asked(tiny_llama, tmp_path / "q", samples, bits=bits))
    rounded, _ = quantize(request(tiny_llama, tmp_path / "r", method="rtn", bits=bits, group_size=32))
    assert (logits(path, tokens) - exact).norm() < 0.9 * (logits(rounded, tokens) - exact).norm()


# The second stops while outputs are weighed, the third when they have been.
@pytest.mark.parametrize(("hessian", "steps"), [("plain", 1), ("guided", 1), ("two-sided", 3)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    hessian: str, steps: int, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    straight, _ = quantize(asked(tiny_llama, tmp_path / "straight", samples, hessian=hessian))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked(tiny_llama, out, samples, hessian=hessian), StopAt(out, steps))
    resumed, _ = quantize(asked(tiny_llama, out, samples, hessian=hessian))
    assert shards(resumed) == shards(straight)
    disk, _ = quantize(asked(tiny_llama, tmp_path / "disk", samples, hessian=hessian, activation_memory=0))
    assert shards(disk) == shards(straight)


def test_every_option_reaches_the_weights(samples: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "symmetric": {"symmetric": True},
        "one pass": {"true_sequential": False},
        "order": {"act_order": False},
        "search": {"search": False},
        "damping": {"damping": 0.1},
        "tokens": {"token_weighting": "uniform"},
        "guided": {"hessian": "guided"},
        "two-sided": {"hessian": "two-sided"},
    }
    made = {}
    for name, changes in variants.items():
        folder, _ = quantize(asked(dense, tmp_path / name, samples, **changes))
        made[name] = (folder / "model-block-00000.safetensors").read_bytes()
    assert len(set(made.values())) == len(variants)


def test_the_plan_counts_the_second_moments(samples: Path, tmp_path: Path) -> None:
    wide = save_tiny("llama", tmp_path / "wide", intermediate_size=2048, num_hidden_layers=1)

    def peak(**changes: Any) -> int:
        return plan(asked(wide, tmp_path / "q", samples, **changes)).cost.peak_memory

    one, whole = peak(), peak(true_sequential=False)
    assert whole - one == pytest.approx(4 * 3 * 64**2, abs=2**21)
    few = {"samples": 1, "sequence_length": 16, "group_size": 32}
    trained = plan(request(wide, tmp_path / "t", method="apiq", calibration=str(samples), adapter=False, **few))
    # Of 256 tokens the squares on the diagonal alone; of 512 all, and what they are factored in.
    assert peak(sequence_length=64) - one > 8 * 2048**2
    assert peak(sequence_length=64) - trained.cost.peak_memory > 12 * 2048**2


def test_guided_lowers_what_errors_cost_by_the_gradients(samples: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    name, tokens = "model.layers.0.self_attn.q_proj", load_file(samples)["tokens"][:8].long()
    model = load_model(resolve(dense), dtype=torch.float32).requires_grad_(True)
    layer, costs = model.get_submodule(name), []

    def watch(module: Any, arguments: Any, output: torch.Tensor) -> None:
        # What reaches the first layer does not depend on how others are stored.
        rows = arguments[0].detach()[0]
        output.register_hook(lambda gradient: costs.append((rows, gradient[0].square())))

    layer.register_forward_hook(watch)
    for row in tokens:
        model(row[None], labels=row[None]).loss.backward()

    def cost(hessian: str) -> float:
        source = resolve(quantize(asked(dense, tmp_path / hessian, samples, bits=2, hessian=hessian))[0])
        stored = formats.dequantize(source.packed[name], source.read_packed(name), layer.in_features)
        error = stored - layer.weight.detach()
        return sum((squares * (rows @ error.T).square()).sum().item() for rows, squares in costs)

    assert cost("guided") < 0.9 * cost("plain")


def test_what_cannot_be_weighed_is_refused(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    prefix, expert = "model.layers", Linear("model.layers.0.mlp.experts.1.up_proj", 64, 64)
    found = ModelStructure(prefix, 1, (), None, tied=False, linears=((expert,),), skipped=())
    with pytest.raises(InputError, match="one of several experts"):
        _check_outputs(build_method(asked(tiny_llama, tmp_path / "q", samples, hessian="guided")), found)
    with pytest.raises(UsageError, match="token_weighting=energy"):
        plan(asked(tiny_llama, tmp_path / "q", samples, hessian="guided", token_weighting="energy"))
    with pytest.raises(UsageError, match="a codebook is found for all rows"):
        plan(request(tiny_llama, tmp_path / "q", method="claq", calibration=str(samples), hessian="two-sided"))


def test_the_plan_counts_what_outputs_cost(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    def cost(hessian: str) -> Any:
        return plan(asked(tiny_llama, tmp_path / "q", samples, hessian=hessian))

    guided, both = cost("guided"), cost("two-sided")
    tokens = 4 * 8 * 32 * guided.layers
    assert guided.cost.disk - cost("plain").cost.disk >= 4 * tokens
    between = sum(
        linear.out_features**2 for block in structure(skeleton(resolve(tiny_llama))).linears for linear in block
    )
    assert both.cost.disk - guided.cost.disk == 4 * between - 3 * tokens
    assert both.request.hessian == "two-sided"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_block_is_gone_before_its_layers_are_compared(
    method: str, tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[torch.nn.Module] = []
    quantize_block, layer_record, kept = METHODS[method].quantize_block, module.layer_record, []

    def caught(self: Any, task: BlockTask) -> Any:
        blocks.append(task.block)
        return quantize_block(self, task)

    def recorded(job: Any, name: str, original: torch.Tensor, *rest: Any) -> Any:
        kept.append(all(parameter.is_meta for parameter in blocks[-1].parameters()))
        return layer_record(job, name, original, *rest)

    monkeypatch.setattr(METHODS[method], "quantize_block", caught)
    monkeypatch.setattr(module, "layer_record", recorded)
    rounded = request(tiny_llama, tmp_path / "q", method="rtn", bits=4, group_size=32)
    quantize(rounded if method == "rtn" else asked(tiny_llama, tmp_path / "q", samples))
    assert kept
    assert all(kept)
