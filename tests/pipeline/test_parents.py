"""An artifact finds what it was made from again, from any folder and after both were moved."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.artifacts.sample import edit
from tests.models.tiny import save_tiny
from ulbq.artifacts import read_manifest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError
from ulbq.models import hub
from ulbq.pipeline.inspect import inspect
from ulbq.pipeline.origins import open_origins
from ulbq.pipeline.quantize import quantize


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and beside it an artifact that was made by a relative path; one stands in another."""
    folder = tmp_path / "here"
    folder.mkdir()
    save_tiny("llama", folder / "model", tied=False, dtype=torch.bfloat16)
    monkeypatch.chdir(folder)
    quantize(QuantizeRequest(source="model", method="rtn", bits=4, group_size=32, out=Path("q")))
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "download", ask)
    return folder


def test_where_it_was_is_recorded_in_three_ways(here: Path) -> None:
    parent = read_manifest(here / "q").parents[0]
    assert (parent.path, parent.absolute, parent.relative) == ("model", str(here / "model"), "../model")


def test_from_another_folder(here: Path) -> None:
    origins = open_origins("../here/q", offline=False)
    assert origins.model.path == here / "model"
    assert [ancestor.state for ancestor in inspect(here / "q", verify=True).ancestry] == ["same"]


def test_after_both_were_moved(here: Path) -> None:
    moved = here.rename(here.with_name("elsewhere"))
    assert open_origins(str(moved / "q"), offline=False).model.path == moved / "model"


def test_another_model_in_its_place_is_passed_over(here: Path) -> None:
    copied = Path(shutil.copytree(here, here.with_name("copy")))
    save_tiny("llama", here / "model", tied=False, dtype=torch.bfloat16, seed=1)
    assert open_origins(str(copied / "q"), offline=False).model.path == copied / "model"
    with pytest.raises(InputError, match=r"here/model' has changed since '.*here/q' was made from it"):
        open_origins(str(here / "q"), offline=False)


def test_an_older_artifact_looks_where_it_always_did(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_before(manifest: dict[str, object]) -> None:
        manifest["schema_version"] = 1
        for parent in manifest["parents"]:  # type: ignore[attr-defined]
            del parent["absolute"], parent["relative"]

    edit(here / "q", as_before, reseal=True)
    assert json.loads((here / "q/manifest.json").read_text())["parents"][0].keys() == {"kind", "name", "path", "sha256"}
    assert open_origins(str(here / "q"), offline=False).model.path == here / "model"  # beside it
    monkeypatch.chdir(here)
    assert open_origins("q", offline=False).model.given == "model"


def test_a_parent_that_is_gone_is_not_asked_for_on_the_hub(here: Path) -> None:
    shutil.rmtree(here / "model")
    with pytest.raises(InputError, match=r"here/q' was made from 'model' \(it was '/.*here/model'\)") as caught:
        open_origins(str(here / "q"), offline=False)
    assert "put it back" in caught.value.hint
