"""Whether several processes hold parts of a model that they train, and what that is predicted to take."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import together
from tests.models.tiny import save_tiny
from ulbq import distributed, runtime
from ulbq.errors import UsageError
from ulbq.pipeline.quantize import plan
from ulbq.pipeline.samples import choose_sharded
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
