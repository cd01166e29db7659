"""Whole runs of ``trellis`` on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import FAMILIES, save_tiny
from tests.pipeline.conftest import Quantized
from tests.pipeline.runs import StopAt, logits, request, shards, simulated_logits
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.whole import verify
from ulbq.config.options import COLUMNS, options
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, UsageError
from ulbq.methods import METHODS
from ulbq.pipeline.quantization_plan import plan
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent


def asked(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    size = {"samples": 8, "sequence_length": 32, "precision": "fp32"}
    return request(
        source, out, **{"method": "trellis", "group_size": None, "calibration": str(samples), **size, **changes}
    )


def widths(manifest: QuantizedManifest) -> list[int]:
    return [layer.scheme["bits"] for layer in manifest.layers]


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "deepseek"])
def test_families_are_packed_and_reload_to_the_simulated_model(family: str, samples: Path, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / family, num_hidden_layers=2)
    path, manifest = quantize(asked(dense, tmp_path / "q", samples))
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    stored = [tensor for file in path.glob("model-*.safetensors") for tensor in load_file(file).values()]
    assert sum(manifest.bits.parts.values()) == 8 * sum(tensor.nbytes for tensor in stored)
    verify(path)


def test_more_bits_are_nearer(quantized: Quantized, tiny_llama: Path, samples: Path) -> None:
    tokens = load_file(samples)["tokens"][:8].long()
    exact = logits(tiny_llama, tokens)

    def error(**bits: int) -> float:
        path, _ = quantized(asked, **bits)
        return (logits(path, tokens) - exact).norm().item()

    one, two, three = error(bits=1), error(), error(bits=3)
    assert one > 1.5 * two > 1.5 * 1.5 * three


def test_a_budget_is_spent_where_scores_are_high(
    quantized: Quantized, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    tokens = load_file(samples)["tokens"][:8].long()
    exact = logits(tiny_llama, tokens)
    plain, narrow = quantized(asked)
    path, manifest = quantize(asked(tiny_llama, tmp_path / "q", samples, target_bits=3.0))
    assert narrow.bits.bits_per_weight < 2.5
    assert 2.8 < manifest.bits.bits_per_weight <= 3.0
    assert set(widths(narrow)) == {2}
    assert len(set(widths(manifest))) > 1
    assert min(widths(manifest)) == 2
    assert (logits(path, tokens) - exact).norm() < 0.9 * (logits(plain, tokens) - exact).norm()
    verify(path)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    options = {"target_bits": 3.0, "end_to_end": "kl"}
    straight, _ = quantize(asked(tiny_llama, tmp_path / "straight", samples, **options))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked(tiny_llama, out, samples, **options), StopAt(out, 4))
    again, _ = quantize(asked(tiny_llama, out, samples, **options))
    assert shards(again) == shards(straight)


def test_vectors_and_norms_train_end_to_end_and_codes_stay(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    mixed, before = quantize(asked(tiny_llama, tmp_path / "mixed", samples, target_bits=3.0))
    settings = {"end_to_end": "kl", "end_to_end_epochs": 2}
    trained, after = quantize(asked(mixed, tmp_path / "trained", samples, **settings))
    assert widths(after) == widths(before)
    tokens = load_file(samples)["tokens"][:8].long()
    exact = logits(tiny_llama, tokens).log_softmax(-1)
    first, last = (
        torch.nn.functional.kl_div(logits(path, tokens).log_softmax(-1), exact, log_target=True, reduction="sum")
        for path in (mixed, trained)
    )
    assert last < first
    old, new = (
        {name: tensor for file in path.glob("model-*.safetensors") for name, tensor in load_file(file).items()}
        for path in (mixed, trained)
    )
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith(".codes"))
    changed = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert {"su", "sv"} <= changed


def test_weights_that_are_not_coded_yet_make_good_what_is(
    quantized: Quantized, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    tokens = load_file(samples)["tokens"][:8].long()
    exact = logits(tiny_llama, tokens)
    plain, _ = quantized(asked)
    path, manifest = quantize(asked(tiny_llama, tmp_path / "q", samples, epochs=4, weight_lr=0.01))
    assert (logits(path, tokens) - exact).norm() < 0.9 * (logits(plain, tokens) - exact).norm()
    first, last = ({**load_file(next(one.glob("model-block-00001*")))} for one in (plain, path))
    changed = {name.rpartition(".")[2] for name in first if not torch.equal(first[name], last[name])}
    assert {"codes", "su", "sv", "weight"} <= changed
    assert all(block.steps for block in manifest.blocks)
    torch.testing.assert_close(logits(path), simulated_logits(tiny_llama, path), atol=1e-5, rtol=1e-5)
    verify(path)


def test_a_run_that_trains_between_layers_goes_on_to_the_same_bytes(
    tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    straight, _ = quantize(asked(tiny_llama, tmp_path / "straight", samples, epochs=1))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked(tiny_llama, out, samples, epochs=1), StopAt(out, 1))
    again, _ = quantize(asked(tiny_llama, out, samples, epochs=1))
    assert shards(again) == shards(straight)


def test_an_artifacts_vectors_train_block_by_block_and_codes_stay(
    tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    mixed, before = quantize(asked(tiny_llama, tmp_path / "mixed", samples, target_bits=3.0))
    trained, after = quantize(asked(mixed, tmp_path / "trained", samples, epochs=2))
    assert widths(after) == widths(before)
    assert all(block.end_error < block.start_error for block in after.blocks)
    for one in mixed.glob("model-block-*"):
        old, new = load_file(one), load_file(trained / one.name)
        assert all(torch.equal(old[name], new[name]) for name in old if name.endswith(".codes"))
    verify(trained)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"weight_lr": 0.1}, UsageError, "`epochs` 1 or more"),
        ({"target_bits": 2.0}, UsageError, "is not between"),
        ({"target_bits": 4.5}, UsageError, "is not between"),
        ({"target_bits": 2.01}, UsageError, "scales included"),
        ({"saliency": "fisher"}, UsageError, "`target_bits`"),
        ({"target_bits": 3.0, "saliency": "wanda"}, UsageError, "compared by fisher"),
        ({"scale_lr": 0.1}, UsageError, "`end_to_end`"),
        ({"end_to_end": "ce", "end_to_end_train": "all"}, UsageError, "scales"),
        ({"group_size": 64}, UsageError, "group"),
        ({"bits": 8}, UsageError, "bits"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], error: type[Exception], said: str, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        quantize(asked(tiny_llama, tmp_path / "q", samples, **changes))
    assert not (tmp_path / "q").exists()


def test_widths_that_tiles_do_not_divide_are_refused(samples: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", intermediate_size=72)
    with pytest.raises(InputError, match=r"(up|gate)_proj.*72 × 64"):
        quantize(asked(dense, tmp_path / "q", samples))
    assert not (tmp_path / "q").exists()


def test_few_tokens_are_told(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Listening(Silent):
        def warn(self, message: str) -> None:
            told.append(message)

    short = {"samples": 1, "sequence_length": 8}
    quantize(asked(tiny_llama, tmp_path / "q", samples).model_copy(update=short), Listening())
    assert any("errors are not made good in other tiles" in message for message in told)


def test_how_codes_were_found_means_nothing_to_an_artifact(quantized: Quantized, samples: Path, tmp_path: Path) -> None:
    start, _ = quantized(asked)
    solving = {name for name, _, option in options(QuantizeRequest) if option.section == COLUMNS}
    for name in sorted(solving & METHODS["trellis"].Options.taken()):
        default = METHODS["trellis"].Options.model_fields[name].default
        with pytest.raises(UsageError, match=f"`{name}` means nothing to an artifact"):
            plan(asked(start, tmp_path / "q", samples, end_to_end="ce", **{name: default}))


def test_an_artifact_is_not_solved_again(quantized: Quantized, samples: Path, tmp_path: Path) -> None:
    path, _ = quantized(asked)
    with pytest.raises(InputError, match="does not go on"):
        quantize(asked(path, tmp_path / "two", samples))
