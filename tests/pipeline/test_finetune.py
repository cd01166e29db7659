"""Fine-tuning end to end: method and form come from the artifact, and what it makes is an artifact as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ulbq.artifacts.whole import verify
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, UsageError
from ulbq.pipeline.finetune import end_to_end_request, telling_name
from ulbq.pipeline.quantize import quantize

MADE: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 3, "group_size": 32},
    "tables": {"method": "rtn", "bits": 3, "group_size": 32, "embedding_bits": 4, "head_bits": 8},
    "rtn-symmetric": {"method": "rtn", "bits": 4, "group_size": -1, "symmetric": True},
    "gptq": {"method": "gptq", "bits": 2, "group_size": 64},
    "ulb-sapr": {"method": "ulb-sapr", "bits": 2, "group_size": 32, "rank": 4, "targets": ("q_proj",), "epochs": 0},
    "apiq-dora": {"method": "apiq", "bits": 2, "group_size": 32, "rank": 2, "alpha": 3.0, "dora": True, "epochs": 0},
    "db-llm": {"method": "db-llm", "group_size": 16, "epochs": 0},
    "db-llm-tied": {"method": "db-llm", "group_size": 16, "tied_scales": True, "epochs": 0},
    "claq": {"method": "claq", "target_bits": 4.6, "bits": 2},
    "trellis": {"method": "trellis", "target_bits": 3.0},
    "binary-mos": {"method": "binary-mos", "experts": 2, "zeros": "output", "epochs": 0},
}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.safetensors"
    # What is held out is what trains, too: whether learning carries over is none of these tests' business.
    generator = torch.Generator().manual_seed(7)
    steps = 1 + torch.randint(0, 2, (6, 24), generator=generator)
    tokens = 3 + (torch.randint(0, 40, (6, 1), generator=generator) + steps.cumsum(1)) % 40
    tokens[4:] = tokens[:2]
    save_file({"tokens": tokens.int()}, path)
    return path


def make(name: str, source: Path, samples: Path, out: Path) -> Path:
    values = dict(MADE[name])
    if values["method"] != "rtn":
        values |= {"calibration": str(samples), "samples": 4, "sequence_length": 24, "precision": "fp32"}
    return quantize(QuantizeRequest(source=str(source), out=out, device="cpu", offline=True, **values))[0]


def asked(source: Path, samples: Path, out: Path, **changes: Any) -> QuantizeRequest:
    options = {
        "end_to_end": "ce",
        "end_to_end_epochs": 2,
        "end_to_end_data": str(samples),
        "samples": 4,
        "sequence_length": 24,
    }
    options |= {"end_to_end_lr_factor": 0.5, "gradient_accumulation": 1, "precision": "fp32"} | changes
    return end_to_end_request(str(source), {**options, "out": out, "device": "cpu", "offline": True})


@pytest.mark.parametrize("name", MADE)
def test_every_artifact_learns_in_its_own_form(name: str, tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    first = make(name, tiny_llama, samples, tmp_path / "first")
    path, manifest = quantize(asked(first, samples, tmp_path / "second"))
    verify(path)
    assert manifest.end_to_end is not None
    assert manifest.end_to_end.end_error < manifest.end_to_end.start_error
    # Who found the codes made them, whoever trained them afterwards.
    assert manifest.method == MADE[name]["method"]
    assert [parent.kind for parent in manifest.parents] == ["folder", "quantized"]
    before, after = (load_file(folder / "model-block-00001.safetensors") for folder in (first, path))
    assert before.keys() == after.keys()
    moved = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert not moved & {"codes", "columns", "outliers"}
    assert (first / "adapter").exists() == (path / "adapter").exists()
    again, _ = quantize(asked(path, samples, tmp_path / "third"))
    verify(again)


def test_weights_train_where_they_are_asked_to(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    for name in ("gptq", "claq"):
        first = make(name, tiny_llama, samples, tmp_path / f"{name}-first")
        path, _ = quantize(asked(first, samples, tmp_path / name, end_to_end_train="all"))
        before, after = (load_file(folder / "model-block-00001.safetensors") for folder in (first, path))
        assert any(not torch.equal(before[key], after[key]) for key in before if key.endswith("codes"))


def test_codes_that_cannot_train_are_said_so(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    first = make("trellis", tiny_llama, samples, tmp_path / "first")
    with pytest.raises(UsageError, match=r"end_to_end_train=all.*'scales'"):
        quantize(asked(first, samples, tmp_path / "q", end_to_end_train="all"))


def test_what_is_no_quantized_artifact_is_refused(tiny_llama: Path, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no quantized artifact") as caught:
        asked(tiny_llama, samples, tmp_path / "q")
    assert "ulbq quantize" in caught.value.hint


def test_the_name_tells_what_it_was_made_from() -> None:
    assert telling_name("some/where/m-gptq-w2g64/") == "m-gptq-w2g64-end-to-end"
