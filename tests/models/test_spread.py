"""A model's blocks over several devices; that nothing is mixed then shows on a pretended GPU (``test_pretended``)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.tiny import save_tiny
from ulbq import runtime
from ulbq.errors import ResourceError, UsageError
from ulbq.evaluation import measurer
from ulbq.models import spread
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.progress import Silent

GPUS = (torch.device("cuda:0"), torch.device("cuda:1"))
CPU = torch.device("cpu")


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, int]:
    """What each device has free, which a test sets."""
    found: dict[torch.device, int] = {}
    monkeypatch.setattr(runtime, "free_memory", lambda device: found[device])
    return found


@pytest.mark.parametrize(
    ("free", "devices", "places"),
    [
        ((1000, 1000), GPUS, [0, 0, 0, 1, 1, 1]),
        ((1000, 500), GPUS, [0, 0, 0, 0, 1, 1]),
        ((1000, 0), GPUS, [0, 0, 0, 0, 0, 0]),
        ((60, 60), GPUS, None),
        ((23, 34), (*GPUS, CPU), [0, 0, 1, 1, 1, 2]),
        ((5, 0), (*GPUS, CPU), [2, 2, 2, 2, 2, 2]),
        ((0, 0), (*GPUS, CPU), [2, 2, 2, 2, 2, 2]),
        ((1000, 0), (GPUS[0], CPU), [0, 0, 0, 0, 0, 0]),
    ],
)
def test_blocks_are_shared_by_what_is_free(
    free: tuple[int, int],
    devices: tuple[torch.device, ...],
    places: list[int] | None,
    rooms: dict[torch.device, int],
) -> None:
    rooms |= dict(zip(GPUS, free, strict=True))
    sizes = [10] * 6 if places is not None else [20] * 6
    if places is None:
        with pytest.raises(ResourceError, match="the GPUs have room"):
            spread.block_places(sizes, devices)
        return
    assert spread.block_places(sizes, devices) == places


def test_eval_reads_block_by_block_what_would_not_be_spread(
    rooms: dict[torch.device, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "resolve_device", torch.device)
    monkeypatch.setattr(measurer, "loading_memory", lambda source, dtype: 0)
    asked = SimpleNamespace(stream=None, device="cuda:0,cuda:1")
    one = SimpleNamespace(request=asked, measures=SimpleNamespace(dtype=torch.float32), progress=Silent())
    candidate: Any = SimpleNamespace(source=None, name="it")
    for share, streams in ((0.54, True), (0.56, False)):
        rooms |= dict.fromkeys(GPUS, round(share * measurer._BESIDE))
        assert measurer.Measurer._streams(one, candidate) == streams  # type: ignore[arg-type]
    rooms[CPU] = measurer._BESIDE
    asked.device = "cpu"
    assert not measurer.Measurer._streams(one, candidate)  # type: ignore[arg-type]


def test_a_model_that_one_device_holds_stays_there(tmp_path: Path, rooms: dict[torch.device, int]) -> None:
    save_tiny("llama", tmp_path / "model")
    source, tokens = resolve(str(tmp_path / "model")), torch.arange(3, 19).view(1, 16)
    whole = load_model(source, dtype=torch.float32)(tokens).logits
    rooms[CPU] = 1 << 40
    assert torch.equal(spread.load_spread(source, [CPU, *GPUS], dtype=torch.float32)(tokens).logits, whole)
    # With no room at all everything is brought from one device to the next, which is the same one here.
    rooms[CPU] = 0
    found = spread.load_spread(source, [CPU, CPU], dtype=torch.float32)
    assert found.model.layers[-1]._forward_hooks
    assert torch.equal(found(tokens).logits, whole)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("cpu,cuda:0", ResourceError, "Device 'cuda:0' cannot be used"),
        ("cpu,cpu", UsageError, "each device once"),
        ("cpu,", ResourceError, "Device '' cannot be used"),
    ],
)
def test_devices_that_make_no_sense_are_refused(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        runtime.resolve_devices(name)


def test_all_gpus_are_looked_at_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "resolve_device", lambda name: torch.device(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert runtime.resolve_devices("cuda") == (torch.device("cuda"), torch.device("cuda:1"), torch.device("cuda:2"))
    assert runtime.resolve_devices("cuda:1") == (torch.device("cuda:1"),)
    assert runtime.resolve_devices("cuda:1, cuda:0") == (torch.device("cuda:1"), torch.device("cuda:0"))
    assert runtime.resolve_devices("cpu") == (CPU,)
    for twice in ("cuda,cuda:0", "cuda:1,cuda:1", "cpu:0,cuda", "cpu,cpu:0"):
        with pytest.raises(UsageError, match="each device once"):
            runtime.resolve_devices(twice)


def test_what_computes_on_one_device_says_so() -> None:
    with pytest.raises(UsageError, match="computes on one device") as error:
        runtime.resolve_device("cuda:0,cpu")
    assert error.value.hint == "Several are for `generate`, `serve` and `eval`."
