"""Going on from an artifact: its adapter is taken over whole, or left behind where that is asked for."""

from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.runs import request
from ulbq.config.saliency import SaliencyKind
from ulbq.errors import InputError
from ulbq.pipeline.quantize import plan, quantize
from ulbq.sensitivity import KINDS

ADAPTED = {"method": "db-llm", "adapter": True, "rank": 2, "alpha": 4}


@pytest.fixture
def size(samples: Path) -> dict[str, Any]:
    amount = {"samples": 2, "sequence_length": 16, "epochs": 0, "precision": "fp32"}
    return {"calibration": str(samples), "group_size": 32, **amount}


def test_a_method_without_an_adapter_does_not_lose_one_unasked(
    tiny_llama: Path, size: dict[str, Any], tmp_path: Path
) -> None:
    first, _ = quantize(request(tiny_llama, tmp_path / "first", **ADAPTED, **size))
    with pytest.raises(InputError, match=r"an adapter of rank 2, alpha 4, and this run would lose it") as refused:
        plan(request(first, tmp_path / "q", method="db-llm", **size))
    assert "`adapter` `rank=2` `alpha=4` to keep it" in refused.value.hint
    assert "`adapter=False` to leave it behind" in refused.value.hint
    left, manifest = quantize(request(first, tmp_path / "left", method="db-llm", adapter=False, **size))
    assert "adapter" not in manifest.bits.parts
    assert not (left / "adapter").exists()
    kept, _ = quantize(request(first, tmp_path / "kept", **ADAPTED, **size))
    name = "adapter/adapter_model.safetensors"
    assert (kept / name).read_bytes() == (first / name).read_bytes()


def test_an_adapter_beside_other_layers_is_refused(tiny_llama: Path, size: dict[str, Any], tmp_path: Path) -> None:
    some, _ = quantize(request(tiny_llama, tmp_path / "some", targets=("q_proj", "v_proj"), **ADAPTED, **size))
    for targets in ((), ("q_proj",), ("q_proj", "k_proj")):
        with pytest.raises(InputError, match="beside other layers") as refused:
            plan(request(some, tmp_path / "q", targets=targets, **ADAPTED, **size))
        assert "`targets=self_attn.q_proj,self_attn.v_proj`" in refused.value.hint
    # As the hint has it.
    plan(request(some, tmp_path / "q", targets=("self_attn.q_proj", "self_attn.v_proj"), **ADAPTED, **size))
    everywhere, _ = quantize(request(tiny_llama, tmp_path / "all", **ADAPTED, **size))
    with pytest.raises(InputError, match="beside other layers") as refused:
        plan(request(everywhere, tmp_path / "q", targets=("q_proj",), **ADAPTED, **size))
    assert "Leave out `targets`" in refused.value.hint


def test_an_adapter_of_one_block_is_gone_on_with(tiny_llama: Path, size: dict[str, Any], tmp_path: Path) -> None:
    one = "model.layers.1.self_attn.q_proj"
    first, _ = quantize(request(tiny_llama, tmp_path / "first", targets=(one,), **ADAPTED, **size))
    with pytest.raises(InputError, match="beside other layers") as refused:
        plan(request(first, tmp_path / "q", targets=("q_proj",), **ADAPTED, **size))
    assert f"`targets={one}` to go on" in refused.value.hint
    plan(request(first, tmp_path / "q", targets=(one,), **ADAPTED, **size))


def test_the_kinds_that_can_be_computed_first_are_all_kinds() -> None:
    from typing import get_args

    assert tuple(KINDS) == get_args(SaliencyKind)
