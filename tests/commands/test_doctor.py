"""``ulbq doctor``."""

import json
from importlib import metadata

import pytest

from ulbq.commands.app import main
from ulbq.kernels import build


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)}


def test_what_is_here_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ULBQ_DATA_DIR", str(tmp_path))
    found = rows(capsys)
    assert "torch 2" in found["versions"]["found"]
    assert (found["ULBQ_DATA_DIR"]["state"], found["ULBQ_DATA_DIR"]["found"]) == ("ok", str(tmp_path))
    assert found["eval"] == {
        "section": "extras",
        "name": "eval",
        "state": "ok",
        "found": f"lm-eval {metadata.version('lm-eval')}",
        "advice": "",
    }
    assert not {"dev", "docs"} & found.keys()


def test_what_is_not_here_comes_with_what_to_do(capsys, tmp_path, monkeypatch):
    def lacking(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lacking)
    monkeypatch.setattr(build, "solvers_unavailable_reason", lambda: "no compiler was found")
    monkeypatch.setenv("ULBQ_DATA_DIR", str(tmp_path / "gone"))
    found = rows(capsys)
    assert found["solvers"]["state"] == "slow"
    assert found["solvers"]["found"].startswith("no compiler was found: ")
    assert "compiler" in found["solvers"]["advice"]
    assert (found["ULBQ_DATA_DIR"]["state"], found["ULBQ_DATA_DIR"]["advice"]) == ("missing", "Check ULBQ_DATA_DIR.")
    assert found["eval"]["found"] == "lm-eval not installed"
    assert found["eval"]["advice"].endswith("-m pip install 'ulbq[eval]'")


def test_the_table_has_every_section(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(section in shown for section in ("machine", "kernels", "data", "extras"))
