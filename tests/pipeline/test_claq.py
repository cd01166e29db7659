"""Whole runs of ``claq`` on tiny models."""

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
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import UsageError
from ulbq.formats.codebook import CodebookScheme
from ulbq.pipeline.quantize import plan, quantize
from ulbq.progress import Silent
from ulbq.sensitivity import Saliency


def asked(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    size = {"samples": 8, "sequence_length": 32, "precision": "fp32"}
    return request(source, out, **{"method": "claq", "calibration": str(samples), **size, **changes})


def linear_bits(manifest: QuantizedManifest) -> int:
    return sum(bits for layer in manifest.layers for bits in layer.bits.values())


def mean_widths(manifest: QuantizedManifest) -> list[float]:
    """Mean width of the columns of each layer."""
    schemes = [(CodebookScheme.model_validate(layer.scheme), layer.shape[1]) for layer in manifest.layers]
    return [
        sum(width * count for width, count in scheme.columns(columns).items()) / columns for scheme, columns in schemes
    ]


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "deepseek"])
def test_families_are_packed_and_reload_to_the_simulated_model(
    family: str,
    samples: Path,
    tmp_path: Path,
) -> None:
    dense = save_tiny(family, tmp_path / family, num_hidden_layers=2)
    path, manifest = quantize(asked(dense, tmp_path / "q", samples, target_bits=4.6, refit=False))
    torch.testing.assert_close(logits(path), simulated_logits(dense, path), atol=1e-5, rtol=1e-5)
    assert 4.5 < manifest.bits.bits_per_weight <= 4.6
    stored = [tensor for file in path.glob("model-*.safetensors") for tensor in load_file(file).values()]
    assert sum(manifest.bits.parts.values()) == 8 * sum(tensor.nbytes for tensor in stored)
    verify(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "global"},
        {"allocation": "layer", "outlier_bits": 0.2},
        {"allocation": "outlier", "outlier_bits": 0.1},
        {"allocation": "hessian"},
    ],
    ids=str,
)
def test_a_budget_is_spent_and_pays(
    changes: dict[str, Any],
    quantized: Quantized,
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    tokens = load_file(samples)["tokens"][:8].long()
    exact = logits(tiny_llama, tokens)
    plain, narrow = quantized(asked)
    path, manifest = quantize(asked(tiny_llama, tmp_path / "q", samples, target_bits=4.4, **changes))
    assert narrow.bits.bits_per_weight < 4.1
    assert 4.35 < manifest.bits.bits_per_weight <= 4.4
    assert ("outliers" in manifest.bits.parts) == (changes["allocation"] == "global" or "outlier_bits" in changes)
    assert (logits(path, tokens) - exact).norm() < 0.9 * (logits(plain, tokens) - exact).norm()
    widths = mean_widths(manifest)
    assert min(widths) < max(widths)


def test_outliers_alone(quantized: Quantized, tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    _, narrow = quantized(asked)
    _, manifest = quantize(asked(tiny_llama, tmp_path / "q", samples, outlier_bits=0.3, allocation="outlier"))
    assert max(mean_widths(manifest)) < 2.1  # what the outliers left over
    assert 0.2 < manifest.bits.bits_per_weight - narrow.bits.bits_per_weight <= 0.3


def test_the_global_budget_follows_the_scores(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    """Scores a hundred times as high in the layers of one block widen that block's columns."""
    options = {"target_bits": 4.3, "allocation": "global", "saliency": "fisher"}
    _, plain = quantize(asked(tiny_llama, tmp_path / "plain", samples, **options))
    raised = Saliency.score

    def louder(self: Saliency, name: str) -> torch.Tensor:
        return raised(self, name) * (100 if name.startswith("model.layers.1.") else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saliency, "score", louder)
        _, loud = quantize(asked(tiny_llama, tmp_path / "loud", samples, **options))
    before, after = mean_widths(plain), mean_widths(loud)
    assert sum(after[7:14]) > sum(before[7:14]) + 1
    assert sum(after[:7]) < sum(before[:7])


def test_as_published_is_nominal(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    _, manifest = quantize(
        asked(tiny_llama, tmp_path / "q", samples, as_published=True, target_bits=2.32, outlier_bits=0.12)
    )
    for layer in manifest.layers:
        scheme, columns = CodebookScheme.model_validate(layer.scheme), layer.shape[1]
        assert scheme.columns(columns)[4] == round(0.1 * columns)
        assert scheme.outliers > 0


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    options = {"target_bits": 4.3, "allocation": "global", "saliency": "fisher", "epochs": 1}
    straight, _ = quantize(asked(tiny_llama, tmp_path / "straight", samples, **options))
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        # After the first line, the scores of two blocks, the decisions and the first block.
        quantize(asked(tiny_llama, out, samples, **options), StopAt(out, 4))

    def again(*args: Any) -> Any:
        raise AssertionError("the decisions are on disk")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ulbq.pipeline.sensitivity.survey", again)
        resumed, _ = quantize(asked(tiny_llama, out, samples, **options))
    assert shards(resumed) == shards(straight)


def test_sweeps_leave_the_bits_and_go_on_to_the_same_bytes(
    quantized: Quantized, tiny_llama: Path, samples: Path, tmp_path: Path
) -> None:
    folder, plain = quantized(asked)
    straight, manifest = quantize(asked(tiny_llama, tmp_path / "straight", samples, sweeps=2))
    assert manifest.bits == plain.bits
    assert shards(straight) != shards(folder)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked(tiny_llama, out, samples, sweeps=2), StopAt(out, 2))
    resumed, _ = quantize(asked(tiny_llama, out, samples, sweeps=2))
    assert shards(resumed) == shards(straight)


@pytest.mark.parametrize("train_weights", [False, True])
def test_training_lowers_the_errors_and_leaves_the_bits(
    train_weights: bool,
    quantized: Quantized,
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    start, before = quantized(asked, outlier_bits=0.1)
    options = {"outlier_bits": 0.1, "epochs": 4, "batch_size": 1, "train_weights": train_weights}
    trained, after = quantize(asked(tiny_llama, tmp_path / "trained", samples, **options))
    assert all(block.end_error <= block.start_error for block in after.blocks)
    assert any(block.end_error < 0.98 * block.start_error for block in after.blocks)
    assert [layer.bits for layer in after.layers] == [layer.bits for layer in before.layers]
    torch.testing.assert_close(logits(trained), simulated_logits(tiny_llama, trained), atol=1e-5, rtol=1e-5)
    # An artifact is gone on from: without an epoch it is the same, with one it learns.
    again, _ = quantize(asked(start, tmp_path / "again", samples))
    torch.testing.assert_close(logits(again), logits(start))
    _, further = quantize(asked(start, tmp_path / "further", samples, epochs=2, train_weights=train_weights))
    assert all(block.end_error <= block.start_error for block in further.blocks)
    assert any(block.end_error < block.start_error for block in further.blocks)


def test_codes_move_only_where_weights_train(quantized: Quantized, samples: Path, tmp_path: Path) -> None:
    start, _ = quantized(asked)
    codes = {}
    for train in (False, True):
        path, _ = quantize(asked(start, tmp_path / str(train), samples, epochs=2, train_weights=train))
        codes[train] = load_file(path / "model-block-00000.safetensors")["model.layers.0.mlp.up_proj.codes"]
    before = load_file(start / "model-block-00000.safetensors")["model.layers.0.mlp.up_proj.codes"]
    assert torch.equal(codes[False], before)
    assert not torch.equal(codes[True], before)


def test_a_whole_model_trains_end_to_end(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    options = {"target_bits": 4.3, "end_to_end": "kl", "end_to_end_lr_factor": 0.3}
    path, manifest = quantize(asked(tiny_llama, tmp_path / "q", samples, **options))
    assert manifest.end_to_end is not None
    assert manifest.end_to_end.end_error < manifest.end_to_end.start_error
    torch.testing.assert_close(logits(path), simulated_logits(tiny_llama, path), atol=1e-5, rtol=1e-5)
    verify(path)


def test_few_tokens_are_said_aloud(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Listening(Silent):
        def warn(self, message: str) -> None:
            told.append(message)

    short = {"samples": 1, "sequence_length": 8}
    path, _ = quantize(asked(tiny_llama, tmp_path / "q", samples).model_copy(update=short), Listening())
    assert torch.isfinite(logits(path)).all()
    assert any("too few" in message for message in told)


def test_every_option_reaches_the_weights(samples: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "three": {"bits": 3},
        "no fit": {"refit": False},
        "order": {"act_order": False},
        "one pass": {"true_sequential": False},
        "damping": {"damping": 0.1},
        "tokens": {"token_weighting": "uniform"},
        "guided": {"hessian": "guided"},
        "full inputs": {"target_inputs": "full"},
        "outliers": {"outlier_bits": 0.1},
        "published": {"outlier_bits": 0.1, "as_published": True},
    }
    made = {}
    for name, changes in variants.items():
        folder, _ = quantize(asked(dense, tmp_path / name, samples, **changes))
        made[name] = (folder / "model-block-00000.safetensors").read_bytes()
    assert len(set(made.values())) == len(variants)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_bits": 2.0}, "leaves nothing"),
        ({"target_bits": 2.1}, "codebooks and scales included"),
        ({"target_bits": 3.4, "outlier_bits": 0.95, "allocation": "outlier"}, "for outliers"),
        ({"target_bits": 9.0}, "codes of 4 bits"),
        ({"target_bits": 4.5, "bits": 4}, "none is wider"),
        ({"outlier_bits": 0.3}, "by loss"),
        ({"target_bits": 2.05, "outlier_bits": 0.07, "as_published": True}, "leaves nothing"),
        ({"target_bits": 4.3, "allocation": "global", "saliency": "wanda"}, "compared by fisher"),
        ({"hessian": "guided", "as_published": True}, "not as published"),
        ({"target_inputs": "full", "as_published": True}, "not as published"),
        ({"scale_lr": 0.1}, "`epochs` 1"),
        ({"penalty": 1.0}, "`epochs` 1"),
        ({"adapter": True}, "`epochs` 1"),
        ({"allocation": "layer"}, "`target_bits`"),
        ({"saliency": "fisher"}, "`target_bits`"),
        ({"target_bits": 4.3, "allocation": "layer", "saliency": "fisher"}, "`allocation=global`"),
        ({"as_published": True, "refit": True}, "not as published"),
        ({"as_published": True, "target_bits": 2.2, "allocation": "global"}, "not as published"),
        ({"group_size": 32}, "`group_size`"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any],
    words: str,
    tiny_llama: Path,
    samples: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=words):
        plan(asked(tiny_llama, tmp_path / "q", samples, **changes))


def test_what_an_artifact_has_already_is_not_asked_for(quantized: Quantized, samples: Path, tmp_path: Path) -> None:
    start, _ = quantized(asked)
    for changes in ({"target_bits": 4.3}, {"outlier_bits": 0.1}, {"refit": False}, {"damping": 0.1}):
        with pytest.raises(UsageError, match="means nothing to an artifact"):
            plan(asked(start, tmp_path / "q", samples, **changes))


def test_the_plan_tells_the_target(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    found = plan(asked(tiny_llama, tmp_path / "q", samples, target_bits=4.3))
    assert found.bits_per_weight == pytest.approx(4.3)
    assert found.request.epochs == 0
    adapted = plan(asked(tiny_llama, tmp_path / "a", samples, target_bits=4.3, epochs=1, adapter=True, rank=4))
    assert adapted.bits_per_weight > 4.31
    narrow = plan(asked(tiny_llama, tmp_path / "n", samples))
    assert narrow.bits_per_weight < 4.2
    assert found.cost.artifact > narrow.cost.artifact
    beside = plan(asked(tiny_llama, tmp_path / "o", samples, outlier_bits=0.2))
    assert beside.bits_per_weight == pytest.approx(narrow.bits_per_weight + 0.2)


def test_as_published_alone_is_plain_squares_and_no_common_fit(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    request = plan(asked(tiny_llama, tmp_path / "q", samples, as_published=True)).request
    assert (request.token_weighting, request.refit, request.allocation) == ("uniform", False, None)
