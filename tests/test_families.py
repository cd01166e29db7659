"""Some families through the benchmark that tries them all: what is written loads as it was made."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForImageTextToText

import ulbq  # noqa: F401 - lets transformers load packed models
from ulbq.errors import InputError
from ulbq.models.blocks import block_list, structure
from ulbq.models.skeleton import empty_model
from ulbq.models.source import resolve

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def families() -> ModuleType:
    """The benchmark."""
    spec = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("family", "least"), [("falcon_h1", 0.5), ("nemotron_h", 0.5), ("bamba", 0.5), ("granitemoehybrid", 0.2)]
)
def test_hybrids(family: str, least: float, families: ModuleType, tmp_path: Path) -> None:
    row = families.try_out(family, tmp_path)
    assert row.quantize == ""
    assert row.gptq == ""
    assert row.lost == []
    assert row.difference < 1e-4
    assert row.share > least


@pytest.mark.parametrize("family", ["longcat_flash", "jetmoe", "step3p7", "dbrx"])
def test_experts_that_transformers_does_not_mark(family: str, families: ModuleType, tmp_path: Path) -> None:
    row = families.try_out(family, tmp_path)
    assert (row.quantize, row.gptq, row.lost) == ("", "", [])
    assert row.difference < 1e-4
    assert row.share > 0.9


@pytest.mark.parametrize("family", ["phi4_multimodal", "modernbert-decoder"])
def test_the_list_of_blocks_is_found(family: str, families: ModuleType) -> None:
    """Beside towers that have more layers, and where the class calls its head the decoder."""
    name, blocks = block_list(empty_model(families.tiny(family)))
    assert (name, len(blocks)) == ("model.layers", 2)


def test_a_family_that_draws_its_fused_experts_is_loaded_by_transformers(families: ModuleType, tmp_path: Path) -> None:
    row = families.try_out("qwen3_omni_moe_thinker", tmp_path, short=True)
    assert (row.quantize, row.lost) == ("", [])
    assert row.difference < 1e-4
    assert row.share > 0.9


def test_blocks_that_share_weights_are_refused(families: ModuleType) -> None:
    with pytest.raises(InputError, match=r"Blocks 0 and 1 of the model type 'zamba2' share 'shared_transformer\."):
        structure(empty_model(families.tiny("zamba2")))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "mistral3", "gemma3", "smolvlm", "llama4"])
def test_models_of_images(family: str, families: ModuleType, tmp_path: Path) -> None:
    row = families.try_out(family, tmp_path, short=True)
    assert row.quantize == ""
    assert row.model.endswith("ForConditionalGeneration")
    assert row.lost == []
    assert row.difference < 1e-4
    before, after = resolve(tmp_path / "m"), resolve(tmp_path / "q")
    tower = [name for name in before.names if "vision" in name or "visual" in name]
    assert len(tower) > 5
    assert all(torch.equal(before.read(name), after.read(name)) for name in tower)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "q", dtype=torch.float32)
    seen = families.inputs(model.config)
    other = seen | {"pixel_values": seen["pixel_values"] + 1}
    with torch.no_grad():
        assert not torch.equal(model(**seen).logits, model(**other).logits)
