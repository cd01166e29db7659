"""Fixtures of whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ulbq.pipeline import proof

_LOOK, _OPENED = proof._look, set[tuple[bytes, ...]]()


@pytest.fixture(autouse=True)
def _artifacts_that_differ_in_values_are_opened_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open what was written is half of a run of a tiny model. Its configuration and layout say how it opens.

    Tests whose name says that something is not finite look at values.
    """

    def look(progress: Any, target: Any, candidate: Any, job: Any, folder: Path) -> None:
        form = (*_form(folder), str(job is None).encode())
        if target is not None or form not in _OPENED:
            _LOOK(progress, target, candidate, job, folder)
            _OPENED.add(form)

    if request.module.__name__ != "tests.pipeline.test_proof" and "finite" not in request.node.name:
        monkeypatch.setattr(proof, "_look", look)


def _form(folder: Path) -> list[bytes]:
    """Configurations, and names, dtypes and shapes of the tensors of each file of weights."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.name.endswith("config.json"):
            found.append(path.read_bytes())
        elif path.name == "manifest.json":
            told = json.loads(path.read_text())
            kinds = [parent["kind"] for parent in told["parents"]]
            how = [told.get(name) is not None for name in ("rotation", "temperature", "end_to_end")]
            found.append(json.dumps([kinds, told.get("method"), how]).encode())
        elif path.suffix == ".safetensors" and path.name != "calibration.safetensors":
            with path.open("rb") as file:
                found.append(file.read(int.from_bytes(file.read(8), "little")))
    return found


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Token samples in a file, so that no data set is needed."""
    path = tmp_path / "tokens.safetensors"
    tokens = torch.randint(3, 250, (12, 32), generator=torch.Generator().manual_seed(7))
    save_file({"tokens": tokens.int()}, path)
    return path
