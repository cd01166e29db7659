"""``ulbq list``."""

import json
from pathlib import Path

import pytest

from tests.artifacts.sample import parent_of, quantized, write_artifact
from ulbq.artifacts import EvaluationManifest, read_manifest
from ulbq.commands.app import main
from ulbq.evaluation.results import ModelScores, Perplexity, Protocol, Results, Subject

OLD, NEW = "2026-01-01T00:00:00.000000Z", "2026-02-02T00:00:00.000000Z"


def rows(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, dict]:
    assert main(["list", str(folder), "--json"]) == 0
    return {Path(one["path"]).name: one for one in json.loads(capsys.readouterr().out)}


def evaluation(path: Path, value: float, created: str) -> EvaluationManifest:
    scores = ModelScores(
        subject=Subject(name="q", path=str(path), kind="quantized"),
        perplexity={"wikitext2": Perplexity(value=value, windows=1, context=8, tokens=7)},
    )
    results = Results(protocol=Protocol(context=8, limit=1, fewshot=None, dtype="bf16", seed=0), models=(scores,))
    fields = {"name": "e", "request": {}, "seed": 0, "device": "cpu", "results": results.model_dump(mode="json")}
    return EvaluationManifest(**fields, created=created, parents=(parent_of(path, read_manifest(path)),))


def test_artifacts_with_the_newest_scores_the_oldest_first(capsys, tmp_path):
    path = write_artifact(tmp_path / "deep" / "er" / "q", quantized(created=OLD))
    for name, value, created in (("b", 20.0, NEW), ("a", 30.0, OLD)):
        write_artifact(tmp_path / name, evaluation(path, value, created), {"results.json": b"{}"})
    found = rows(capsys, tmp_path)
    assert list(found) == ["a", "q", "b"]
    assert found["q"]["scores"] == {"perplexity, wikitext2": 20.0}
    assert (found["q"]["kind"], found["q"]["what"], found["q"]["bits"]) == ("quantized", "rtn, affine", 2.28125)
    assert found["a"]["parents"] == ["tiny-w2g64"]
    assert main(["list", str(tmp_path)]) == 0
    assert "perplexity, wikitext2 20" in capsys.readouterr().out


def test_damaged_and_unfinished_ones_are_shown_too(capsys, tmp_path):
    (write_artifact(tmp_path / "q") / "model.safetensors").unlink()
    (tmp_path / "r.partial" / "s").mkdir(parents=True)
    found = rows(capsys, tmp_path)
    assert {name: one["kind"] for name, one in found.items()} == {"q": "damaged", "r.partial": "unfinished"}
    assert "model.safetensors" in found["q"]["what"]


def test_an_empty_folder_is_told_and_a_missing_one_refused(capsys, tmp_path):
    assert main(["list", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert (told.out, "There is no artifact under" in told.err) == ("", True)
    assert main(["list", str(tmp_path / "x")]) == 3
