"""The peak memory that a plan tells is what the run then takes, for every command that predicts one."""

from pathlib import Path

import pytest

from benchmarks.predictions import CASES, measure, models

pytestmark = pytest.mark.real  # its tokenizer, and itself

QUICK = ["rtn", "fisher"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and artifacts; some cases start from what others made."""
    return tmp_path_factory.mktemp("predictions")


@pytest.mark.parametrize(
    ("model", "case"),
    [("tiny", case) for case in QUICK]
    + [pytest.param("tiny", case, marks=pytest.mark.slow) for case in CASES if case not in QUICK]
    + [pytest.param("default", case, marks=pytest.mark.slow) for case in CASES],
)
def test_peak_memory(model: str, case: str, data_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULBQ_DATA_DIR", str(data_dir))
    row = measure(case, models(folder / "models", [model])[model], folder / model)
    assert row["memory"] == pytest.approx(1, abs=0.2), row
