"""Artifacts that an earlier ulbq wrote load, verify and compute what they did; every command takes them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.evaluation.sample import write_mirror
from tests.golden.make import COMMANDS, SCORES, SOURCES, TOKENS
from tests.told import Ulbq
from ulbq.models.load import load_model
from ulbq.models.source import resolve

HERE = Path(__file__).parent
MODELS = [name for name in COMMANDS if name not in SCORES]
PACKED = [name for name in MODELS if name != "dense16"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, that a command which writes there does no harm."""
    return shutil.copytree(HERE / "artifacts", tmp_path_factory.mktemp("golden") / "artifacts")


def test_all_are_there() -> None:
    assert {path.name for path in (HERE / "artifacts").iterdir()} == {*COMMANDS, *SOURCES}
    assert load_file(HERE / "logits.safetensors").keys() == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_computes_what_it_did(golden: Path, name: str) -> None:
    model = load_model(resolve(golden / name, offline=True), dtype=torch.float32)
    expected = load_file(HERE / "logits.safetensors")[name]
    # Another processor sums in another order.
    torch.testing.assert_close(model(TOKENS).logits[0, -4:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMMANDS)
def test_verifies(golden: Path, ulbq: Ulbq, name: str) -> None:
    told = ulbq("inspect", golden / name, "--verify", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["kind"] == json.loads((golden / name / "manifest.json").read_text())["kind"]


@pytest.mark.parametrize("name", PACKED)
def test_is_evaluated_converted_and_gone_on_from(golden: Path, ulbq: Ulbq, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n" for i in range(400)))
    write_mirror(tmp_path / "mirror")
    told = ulbq("generate", golden / name, "-p", "Line 7", "-n", "4", "--offline")
    assert told.code == 0, told.err
    told = ulbq(
        *("eval", golden / name, "--perplexity", "wikitext2", "--fidelity", "--context", "32", "--limit", "2"),
        *("--data-dir", tmp_path / "mirror", "--offline", "-q", "-o", tmp_path / "eval"),
    )
    assert told.code == 0, told.err  # its parent is found beside it
    target = "half" if name == "binary-mos" else "dense"  # its scales are mixed for every token
    told = ulbq("convert", golden / name, "--to", target, "--offline", "-q", "-o", tmp_path / "converted")
    assert told.code == 0, told.err
    if name not in ("adapted", "finetuned"):
        told = ulbq(
            *("finetune", golden / name, "--task", "end-to-end", "--data", tmp_path / "text.txt", "--samples", "2"),
            *("--sequence-length", "16", "--epochs", "1", "--offline", "-q", "-o", tmp_path / "tuned"),
        )
        assert told.code == 0, told.err


def test_scores_are_read(golden: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    told = ulbq(
        *("quantize", golden / "dense", "--method", "claq", "--target-bits", "3.2", "--allocation", "global"),
        *("--saliency", golden / "saliency", "--calibration", golden / "affine" / "calibration.safetensors"),
        *("--samples", "4", "--sequence-length", "32", "--offline", "-q", "-o", tmp_path / "q"),
    )
    assert told.code == 0, told.err
