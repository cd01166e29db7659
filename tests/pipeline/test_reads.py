"""How often a run reads the linear layers of the checkpoint."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import save_tiny
from tests.pipeline.runs import request
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.saliency import saliency
from ulbq.pipeline.saliency_plan import SaliencyRequest

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
DRAWN = {"samples": 4, "sequence_length": 32}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[str]:
    """How often each linear weight of the model in ``tmp_path/dense`` was read."""
    dense = save_tiny("llama", tmp_path / "dense")
    found = Counter({name: 0 for name in resolve(dense).names if name.split(".")[-2] in LINEARS})
    read = ModelSource.read

    def counted(self: ModelSource, name: str) -> torch.Tensor:
        if self.path == dense and name in found:
            found[name] += 1
        return read(self, name)

    monkeypatch.setattr(ModelSource, "read", counted)
    return found


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "rtn": ({"method": "rtn"}, 1),
    "gptq": ({"method": "gptq"}, 1),
    "efficientqat": ({"method": "efficientqat", "epochs": 1}, 1),
    "db-llm, augmented": ({"method": "db-llm", "epochs": 1, "augmented_loss": True}, 1),
    "apiq, layer by layer": ({"method": "apiq", "rank": 2, "epochs": 1, "granularity": "layer"}, 1),
    # The temperature is fitted behind the blocks, to the original; whether it can be, the first block tells.
    "db-llm, temperature": ({"method": "db-llm", "epochs": 1, "fit_temperature": True}, 2),
    # All blocks are looked at before the first is quantized.
    "claq, global": ({"method": "claq", "target_bits": 3.2, "allocation": "global", "group_size": None}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_each_weight_is_read_once(case: str, reads: Counter[str], samples: Path, tmp_path: Path) -> None:
    options, times = CASES[case]
    given = {} if options["method"] == "rtn" else {**DRAWN, "calibration": str(samples)}
    quantize(request(tmp_path / "dense", tmp_path / "q", **{"group_size": 32, **given, **options}))
    checked = int("temperature" in case)
    assert reads == {name: times + checked * name.startswith("model.layers.0.") for name in reads}


@pytest.mark.parametrize(("kind", "times"), [("magnitude", 1), ("hessian", 1), ("fisher", 2)])
def test_scoring_reads_each_weight_once_a_pass(
    kind: Any,
    times: int,
    reads: Counter[str],
    samples: Path,
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {} if kind == "magnitude" else {**DRAWN, "calibration": str(samples)}
    saliency(SaliencyRequest(source=str(tmp_path / "dense"), kind=kind, out=tmp_path / "s", device="cpu", **given))
    assert set(reads.values()) == {times}, reads
