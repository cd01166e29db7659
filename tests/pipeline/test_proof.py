"""A run that makes a model ends by opening it: what does not load is not finished."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.models.tiny import save_tiny
from ulbq import runtime
from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.blockwise.streamed import PassedBlocks, StreamedModel
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, NumericsError
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.quant_linear import QuantLinear
from ulbq.pipeline import proof
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent


class Notes(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def request(tmp_path: Path, out: str = "q") -> QuantizeRequest:
    source = save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.bfloat16)
    return QuantizeRequest(source=str(source), method="rtn", bits=4, group_size=32, symmetric=True, out=tmp_path / out)


def test_what_loads_is_said_to(tmp_path: Path) -> None:
    notes = Notes()
    out, _ = quantize(request(tmp_path), notes)
    assert notes.said[-1] == "Opened again, and ran 8 tokens."
    ends = {"dense": "Opened again, and ran 8 tokens.", "half": "Opened again, and ran 8 tokens."}
    ends["gguf"] = "Opened again by transformers' reader of GGUF files, and ran 8 tokens."
    ends["compressed-tensors"] = "opened again by transformers, and ran 8 tokens."
    for target, end in ends.items():
        convert(ConvertRequest(source=str(out), to=target, out=tmp_path / target), notes)  # type: ignore[arg-type]
        assert notes.said[-1].endswith(end) or any(said.endswith(end) for said in notes.said[-2:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: make_infinite(folder / "model-outer.safetensors"),  # not what was hashed
    ],
)
def test_what_does_not_load_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    look = proof._look

    def look_damaged(*given: Any) -> None:
        damage(given[-1])
        look(*given)

    monkeypatch.setattr(proof, "_look", look_damaged)
    with pytest.raises(InputError):
        quantize(request(tmp_path))
    assert not (tmp_path / "q").exists()
    monkeypatch.undo()
    for name in ("config.json", "tokenizer.json", "model-outer.safetensors"):
        (tmp_path / "q.partial" / name).unlink(missing_ok=True)
    quantize(request(tmp_path))


@pytest.mark.parametrize("rows", [1, 64])
def test_a_kernel_that_computes_something_else_is_loud(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(quantize(request(tmp_path))[0])
    proof.check_products(source, torch.device("cpu"))
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda layer, x: forward(layer, x) * (0.9 if len(x) == rows else 1.0))
    with pytest.raises(InputError, match=r"kernels of cpu .*'model\.layers\.0\.self_attn\.q_proj'"):
        proof.check_products(source, torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 0.5), ("num_key_value_heads", 1), ("hidden_act", "gelu"), ("rope_theta", 2.0)]
)
def test_a_configuration_that_makes_another_model_is_not_finished(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = proof.open_again

    def open_changed(folder: Path) -> ModelSource:
        source = opened(folder)
        values = source.config.to_dict()
        if key == "rope_theta":
            values["rope_parameters"][key] = value
        else:
            values[key] = value
        return dataclasses.replace(source, config=type(source.config).from_dict(values))

    monkeypatch.setattr(proof, "open_again", open_changed)
    monkeypatch.setattr(runtime, "available_memory", lambda: 1000)  # blocks are compared all the same
    monkeypatch.setattr("ulbq.pipeline.quantize.check_room", lambda job, progress: None)
    with pytest.raises(InputError):
        quantize(request(tmp_path))
    assert not (tmp_path / "q").exists()


def test_what_predicts_no_numbers_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = proof.load_model

    def overflowing(source: ModelSource, **options: Any) -> PreTrainedModel:
        model = load(source, **options)
        with torch.no_grad():
            model.lm_head.weight[5] = torch.inf
        return model

    monkeypatch.setattr(proof, "load_model", overflowing)
    with pytest.raises(NumericsError, match="predicts what is no number"):
        quantize(request(tmp_path))
    assert not (tmp_path / "q").exists()


def test_what_memory_has_no_room_for_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = quantize(request(tmp_path))
    monkeypatch.setattr(runtime, "available_memory", lambda: 1000)
    notes = Notes()
    convert(ConvertRequest(source=str(out), to="dense", out=tmp_path / "dense"), notes)
    assert notes.said[-1].startswith("Not opened again: that takes")


def test_an_artifact_that_would_take_more_than_the_run_is_opened_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "peak_memory", lambda: 1000)
    monkeypatch.setattr(proof, "load_model", lambda *given, **options: pytest.fail("it was loaded"))
    monkeypatch.setattr(StreamedModel, "whole", lambda model: pytest.fail("embedding and head were loaded together"))
    notes = Notes()
    quantize(request(tmp_path), notes)
    assert notes.said[-1] == "Opened again, and ran 8 tokens."


def test_what_is_opened_block_by_block_must_predict_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "peak_memory", lambda: 1000)
    monkeypatch.setattr(PassedBlocks, "logits", lambda *given: torch.full((1, 8, 256), torch.nan))
    with pytest.raises(NumericsError, match="predicts what is no number"):
        quantize(request(tmp_path))


def make_infinite(shard: Path) -> None:
    stored = LazyTensors([shard])
    tensors = {name: stored.read(name) for name in stored.names}
    tensors["model.norm.weight"][:] = 3e38
    write_shard(shard, tensors)
