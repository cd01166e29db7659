"""Whether several processes hold parts of a model that they train, and what that is predicted to take."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import together
from tests.models.tiny import save_tiny
from ulbq import distributed, runtime
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import UsageError
from ulbq.models.blocks import block_list, skeleton
from ulbq.pipeline import finetune_plan
from ulbq.pipeline.memory import part_of_blocks
from ulbq.pipeline.quantize import plan, quantize
from ulbq.pipeline.samples import choose_sharded, choose_streamed
from ulbq.pipeline.tasks import load_task
from ulbq.progress import Silent

CPU = torch.device("cpu")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes, of which one has 50 bytes free and the others 100."""
    monkeypatch.setattr(distributed, "_world", distributed._World(0, 4, None))
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value, value // 2, value])
    monkeypatch.setattr(runtime, "free_memory", lambda device: 100)


@pytest.mark.parametrize(("asked", "needed", "words"), [(True, 1, "there is one"), (False, 0, "means nothing here")])
def test_what_cannot_be_sharded_is_refused(asked: bool, needed: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_sharded(asked, needed, CPU, Silent())


def test_one_process_holds_all() -> None:
    assert not choose_sharded(None, 1 << 60, CPU, Silent())


@pytest.mark.parametrize(
    ("asked", "needed", "sharded"),
    [(None, 0, False), (None, 50, False), (None, 51, True), (False, 51, False), (True, 1, True)],
)
@pytest.mark.usefixtures("several")
def test_the_process_with_the_least_room_decides(asked: bool | None, needed: int, sharded: bool) -> None:
    assert choose_sharded(asked, needed, CPU, Silent()) == sharded


def test_the_process_that_needs_most_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_world", distributed._World(0, 2, None))
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value + 20])
    monkeypatch.setattr(runtime, "free_memory", lambda device: 100)
    for choose in (choose_sharded, choose_streamed):
        assert [choose(None, needed, CPU, Silent()) for needed in (80, 81)] == [False, True]


@pytest.mark.parametrize("teacher", ["streamed", "cached"])
def test_parts_are_predicted(teacher: str, tmp_path: Path, several: None, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / together.MODEL, hidden_size=512, num_hidden_layers=24)
    (tmp_path / together.TOKENS).touch()
    monkeypatch.setattr(runtime, "free_memory", lambda device: 1 << 40)
    options: dict[str, Any] = {"method": "efficientqat", "epochs": 0, "end_to_end": "kl", "teacher": teacher}
    options |= {"calibration": "wikitext2", "samples": 8, "offline": False, "end_to_end_train": "all"}
    found = [plan(together._request(tmp_path, tmp_path / "q", **options, shard=shard)) for shard in (None, True)]
    assert [one.sharded for one in found] == [False, True]
    memory = [one.cost.peak_memory for one in found]
    assert memory[1] < memory[0] - 100_000_000


def test_packed_tables_are_whole_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together.prepare(tmp_path)
    values: dict[str, Any] = {"method": "rtn", "bits": 3, "group_size": 32, "embedding_bits": 8, "head_bits": 8}
    values |= {"source": str(tmp_path / together.MODEL), "device": "cpu", "offline": True, "out": tmp_path / "tables"}
    path, manifest = quantize(QuantizeRequest(**values))
    options: dict[str, Any] = {"data": (str(tmp_path / together.ROWS),), "sequence_length": 128, "samples": 8}
    options |= {"validation_samples": 3, "device": "cpu", "offline": True, "out": tmp_path / "q"}
    job = finetune_plan.prepare(str(path), load_task("instructions"), options, Silent())
    asked = (job.request, job.source, job.manifest, skeleton(job.source), job.adapter, job.linears, job.examples)
    monkeypatch.setattr(distributed, "_world", distributed._World(0, 4, None))
    whole, parts = (finetune_plan._cost(*asked, job.precision, sharded=on)[1].base for on in (False, True))
    inside = sum(sum(layer.bits.values()) for layer in manifest.layers) // 8
    assert whole - parts == inside - part_of_blocks(inside, len(block_list(skeleton(job.source))[1]))
