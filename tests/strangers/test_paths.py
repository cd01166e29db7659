"""Strings of a file that become paths: they name, and never say where."""

from pathlib import Path

import pytest

from tests.strangers.conftest import reseal
from tests.told import Ulbq
from ulbq.artifacts.names import is_component, is_inside, local_path
from ulbq.artifacts.store import free_output
from ulbq.errors import InputError

ELSEWHERE = ["/{tmp}/elsewhere/x", "../../x", "..", ".", "a/b", "a\0b", "x" * 300, "\ud800"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_manifest_does_not_choose_where_its_reader_writes(
    name: str, packed: Path, ulbq: Ulbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reseal(packed, lambda manifest: manifest.update(name=name.format(tmp=tmp_path)))
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    assert "name" in ulbq("convert", packed, "--to", "dense").refused()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["packed", "a b", "w2g64, mixed", "ü", ".hidden", "a\\b", ""])
def test_what_a_folder_can_be_called_is_a_name(name: str, packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    reseal(packed, lambda manifest: manifest.update(name=name))
    assert ulbq("inspect", packed, "-q").code == 0


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", "./a", "a//b", "a\0b", "", "x" * 300])
def test_files_of_a_manifest_lie_in_the_artifact(name: str, packed: Path, ulbq: Ulbq) -> None:
    reseal(packed, lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    assert "outside the artifact" in ulbq("inspect", packed).refused()


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-that-name/x", "x" * 5000, "a/" + "x" * 300, "\ud800"])
def test_a_parent_that_is_no_path_is_missing(path: str, packed: Path, ulbq: Ulbq) -> None:
    reseal(packed, lambda manifest: manifest["parents"][0].update(path=path))
    told = ulbq("inspect", packed)
    assert told.code == 0, told.err
    reseal(packed, lambda manifest: manifest["parents"][0].update(path=path, kind="quantized"))
    assert ulbq("inspect", packed, "--verify").code == 0


@pytest.mark.parametrize("given", ["a\0b", "~nobody-of-that-name/x", "x" * 5000, "x" * 300])
def test_what_can_be_no_path_has_a_sentence(given: str, ulbq: Ulbq) -> None:
    with pytest.raises(InputError):
        local_path(given)
    for words in (["quantize", given, "--method", "rtn"], ["eval", given], ["finetune", given, "--task", "gsm8k"]):
        ulbq(*words).refused()


def test_default_outputs_lie_directly_below_their_root(tmp_path: Path) -> None:
    assert free_output(tmp_path, "fine", "f" * 64) == tmp_path / "fine"
    for stem in ("../x", "/x", "a/b", "..", ""):
        with pytest.raises(InputError, match="name of a folder"):
            free_output(tmp_path, stem, "f" * 64)


@pytest.mark.parametrize("out", [".", "none/../made"])
def test_an_artifact_is_called_what_its_folder_is(
    out: str, dense: Path, ulbq: Ulbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made" if out == "." else tmp_path)
    told = ulbq("quantize", dense, "--method", "rtn", "--bits", "4", "-o", out, "-q")
    assert told.code == 0, told.err
    assert '"name": "made"' in (tmp_path / "made" / "manifest.json").read_text()
    # What is printed leads the next command of a pipe to it.
    assert Path(told.out.strip()) == tmp_path / "made"


def test_components() -> None:
    assert all(map(is_component, ("a", "a.b", "...", " ", "ü" * 127)))
    assert not any(map(is_component, ("", ".", "..", "a/b", "/", "a\0", "ü" * 128)))
    assert all(map(is_inside, ("a", "a/b", "a/b.c/d")))
    assert not any(map(is_inside, ("a/", "/a", "a/./b", "a//b", "..", "a/..")))
