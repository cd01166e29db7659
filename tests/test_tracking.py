"""Losses reach trackers of experiments: step by step, under the run's name, and nowhere unless asked for."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.pipeline.runs import db_llm, request
from ulbq.commands.app import main
from ulbq.errors import ResourceError, UsageError
from ulbq.pipeline.quantize import plan, quantize
from ulbq.tracking import check_tracker, tracked

Logged = list[tuple[str, Any]]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Line {i} of a text that goes on for {i * 7} words or so." for i in range(80)))
    return path


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Logged:
    """What a package of that name is told through accelerate's tracker of it."""
    told: Logged = []

    def init(**options: Any) -> Any:
        told.append(("init", options))
        log = lambda values, step: told.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: told.append(("finish", None)))

    module: Any = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init = init
    module.config = SimpleNamespace(update=lambda values, **_: told.append(("config", values)))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_blocks_and_the_whole_model_are_tracked_in_one_run(
    tiny_llama: Path, samples: Path, wandb: Logged, tmp_path: Path
) -> None:
    asked = {"method": "efficientqat", "end_to_end": "ce", "end_to_end_epochs": 1, "log_to": "wandb"}
    quantize(db_llm(tiny_llama, tmp_path / "q", samples, **asked))
    assert wandb[0] == ("init", {"project": "ulbq", "name": "q"})
    assert wandb[-1] == ("finish", None)
    (settings,) = (values for name, values in wandb if name == "config")
    assert (settings["method"], settings["epochs"]) == ("efficientqat", 2)
    logged = [(step, values) for step, values in wandb if isinstance(step, int)]
    steps = [step for step, _ in logged]
    assert steps == sorted(steps)
    names = [name for _, values in logged for name in values]
    # Three blocks of two epochs each; then the text, before and after.
    assert names.count("blocks/validation_error") == 6
    assert names.count("blocks/end_error") == 3
    assert names.count("validation_loss") == 2
    assert names.count("loss") >= 1
    assert names.index("loss") > names.index("blocks/end_error")


def test_nothing_is_tracked_that_nobody_asked_for(
    tiny_llama: Path, samples: Path, wandb: Logged, tmp_path: Path
) -> None:
    first, manifest = quantize(db_llm(tiny_llama, tmp_path / "q", samples))
    assert wandb == []
    # And tracking decides nothing of what is made.
    second, tracked_too = quantize(db_llm(tiny_llama, tmp_path / "t", samples, log_to="wandb"))
    assert tracked_too.fingerprint == manifest.fingerprint
    for shard in first.glob("*.safetensors"):
        assert shard.read_bytes() == (second / shard.name).read_bytes()


def test_fine_tuning_is_tracked(tiny_llama: Path, wandb: Logged, tmp_path: Path) -> None:
    quantize(request(tiny_llama, tmp_path / "q", method="rtn", bits=4, group_size=32))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {i}", "output": f"{i}"}) + "\n" for i in range(8)))
    words = ("--samples", "4", "--validation-samples", "2", "--epochs", "1", "--rank", "2", "--sequence-length", "256")
    run = ("finetune", tmp_path / "q", "--task", "instructions", "--data", rows, *words, "--log-to", "wandb")
    assert main([str(word) for word in (*run, "--device", "cpu", "--offline", "-q", "-o", tmp_path / "t")]) == 0
    assert wandb[0] == ("init", {"project": "ulbq", "name": "t"})
    assert next(values.keys() for step, values in wandb if step == 1) == {"loss", "lr"}


def test_tensorboards_files_lie_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    with tracked("tensorboard", "q", {"bits": 2, "stages": [1], "out": None}) as log:
        log(1, {"loss": 2.0})
        log(2, {"loss": 1.0})
    events = EventAccumulator(str(tmp_path / "runs/q"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ulbq.tracking.find_spec", lambda name: None)
    check_tracker(None)
    with pytest.raises(ResourceError, match="wants the package trackio") as caught:
        check_tracker("trackio")
    assert caught.value.hint == "pip install trackio"


def test_where_nothing_trains_there_is_nothing_to_track(tiny_llama: Path, wandb: Logged, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing trains"):
        plan(request(tiny_llama, tmp_path / "q", method="rtn", bits=4, group_size=32, log_to="wandb"))
