"""The temperature that is fitted after the blocks: what it is, where it goes, what keeps it and what refuses it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import save_tiny
from ulbq.artifacts.records import TemperatureRecord
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline import quantize as pipeline
from ulbq.pipeline.quantize import quantize

NORM = "model.norm.weight"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.randint(3, 100, (6, 24), generator=torch.Generator().manual_seed(5)).int()}, path)
    return path


@pytest.fixture
def sure(tmp_path: Path) -> Path:
    """A model whose logits are as large as a trained one's."""
    folder = save_tiny("llama", tmp_path / "sure")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[NORM] = tensors[NORM] * 30
    save_file(tensors, file, {"format": "pt"})
    return folder


def request(source: Path, out: Path, samples: Path, **changes: Any) -> QuantizeRequest:
    values: dict[str, Any] = {"method": "gptq", "bits": 2, "group_size": 32, "fit_temperature": True} | changes
    return QuantizeRequest(
        source=str(source),
        out=out,
        calibration=str(samples),
        samples=4,
        sequence_length=24,
        precision="fp32",
        device="cpu",
        offline=True,
        **values,
    )


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(resolve(folder), dtype=torch.float32)(tokens).logits


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    expected, predicted = theirs.log_softmax(-1), ours.log_softmax(-1)
    return float((expected.exp() * (expected - predicted)).sum(-1).mean())


def record_of(folder: Path, samples: Path, out: Path, **changes: Any) -> TemperatureRecord:
    _, manifest = quantize(request(folder, out, samples, **changes))
    assert manifest.temperature is not None
    return manifest.temperature


def test_the_factor_is_the_best_one_on_the_samples_held_out(sure: Path, samples: Path, tmp_path: Path) -> None:
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    quantize(request(sure, plain, samples, fit_temperature=None))
    found = record_of(sure, samples, fitted)
    held = load_file(samples)["tokens"][4:].long()
    ours, theirs = logits(plain, held), logits(sure, held)
    grid = torch.linspace(0.25, 2, 701)
    best = min(grid.tolist(), key=lambda factor: divergence(factor * ours, theirs))
    assert found.vectors == (NORM,)
    assert found.factor == pytest.approx(best, abs=0.006)
    assert abs(found.factor - 1) > 0.02
    assert found.start_error == pytest.approx(divergence(ours, theirs), rel=1e-2)
    assert found.end_error == pytest.approx(divergence(logits(fitted, held), theirs), rel=1e-2)
    assert found.end_error < found.start_error


def test_nothing_but_the_last_norm_changes(sure: Path, samples: Path, tmp_path: Path) -> None:
    plain, fitted = tmp_path / "plain", tmp_path / "fitted"
    quantize(request(sure, plain, samples, fit_temperature=None))
    factor = record_of(sure, samples, fitted).factor
    for file in sorted(plain.glob("*.safetensors")):
        before, after = load_file(file), load_file(fitted / file.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if name == NORM:
                torch.testing.assert_close(after[name].float(), factor * tensor.float(), rtol=5e-3, atol=0)
            else:
                assert torch.equal(tensor, after[name]), name


def test_it_can_be_fitted_to_an_artifact_whose_blocks_stay(sure: Path, samples: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"method": "efficientqat", "epochs": 0}
    at_once = record_of(sure, samples, tmp_path / "at-once", **values)
    quantize(request(sure, tmp_path / "plain", samples, fit_temperature=None, **values))
    later = record_of(tmp_path / "plain", samples, tmp_path / "later", **values)
    assert later == at_once
    # Fitted again it is that of the original's predictions, not one on top of the other.
    assert record_of(tmp_path / "later", samples, tmp_path / "again", **values) == at_once
    stored = [load_file(tmp_path / name / "model-outer.safetensors")[NORM] for name in ("at-once", "later", "again")]
    assert torch.equal(stored[0], stored[1])
    assert torch.equal(stored[0], stored[2])


def test_an_end_to_end_phase_goes_on_from_it(sure: Path, samples: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"method": "efficientqat", "epochs": 0}
    first = record_of(sure, samples, tmp_path / "first", **values)
    after = {"end_to_end": "kl", "end_to_end_epochs": 1, "fit_temperature": None}
    _, manifest = quantize(request(tmp_path / "first", tmp_path / "second", samples, **values | after))
    assert manifest.temperature == first
    assert manifest.end_to_end is not None
    assert manifest.end_to_end.start_error == pytest.approx(first.end_error, rel=1e-2)
    stored = [load_file(tmp_path / name / "model-outer.safetensors")[NORM] for name in ("first", "second")]
    assert torch.equal(*stored)


def test_a_resumed_run_takes_over_what_was_fitted(
    sure: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record_of(sure, samples, tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize(request(sure, tmp_path / "resumed", samples))
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "fit_temperature", killed)
        assert record_of(sure, samples, tmp_path / "resumed") == whole
    stored = [load_file(tmp_path / name / "model-outer.safetensors")[NORM] for name in ("whole", "resumed")]
    assert torch.equal(*stored)


def test_a_model_that_caps_its_logits_is_refused_before_any_block(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("gemma2", tmp_path / "gemma2")
    monkeypatch.setattr(pipeline, "BlockQuantizer", None)
    with pytest.raises(InputError, match="scales the logits of the model type 'gemma2'"):
        quantize(request(folder, tmp_path / "out", samples))
    assert not (tmp_path / "out").exists()
