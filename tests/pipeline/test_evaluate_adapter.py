"""An artifact with an adapter: scored with it, or its base alone."""

from pathlib import Path

import pytest
import torch

from tests.evaluation.sample import write_mirror
from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq.artifacts import BitsReport, EvaluationManifest
from ulbq.config.adapter import AdapterConfig
from ulbq.config.evaluate import EvaluateRequest
from ulbq.data.registry import texts
from ulbq.evaluation.perplexity import perplexity
from ulbq.evaluation.results import ModelScores, Results
from ulbq.evaluation.table import rows
from ulbq.evaluation.text import text_windows
from ulbq.formats import AffineScheme
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.pipeline.evaluate import evaluate

_BITS = BitsReport(parts={"codes": 300, "adapter": 200, "embeddings": 1000}, weights=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact ``q``, the same without an adapter ``plain``, and a data mirror."""
    made = tmp_path_factory.mktemp("made")
    parent = resolve(save_tiny("llama", made / "base", tied=False))
    scheme = AffineScheme(bits=3, group_size=32)
    write_quantized(parent, made / "q", scheme, AdapterConfig(rank=4, dora=True), bits=_BITS, name="q")
    write_quantized(parent, made / "plain", scheme, name="plain")
    write_mirror(made / "mirror")
    return made


@pytest.fixture(autouse=True)
def own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(folder: Path, *names: str, adapter: bool = True, out: str | None = None) -> tuple[Path, EvaluationManifest]:
    return evaluate(
        EvaluateRequest(
            sources=tuple(str(folder / name) for name in names),
            perplexity=("wikitext2",),
            adapter=adapter,
            context=64,
            limit=2,
            offline=True,
            device="cpu",
            dtype="fp32",
            data_dir=folder / "mirror",
            out=Path(out) if out else None,
        )
    )


def scores_of(manifest: EvaluationManifest) -> dict[str, ModelScores]:
    return {scores.subject.name: scores for scores in Results.model_validate(manifest.results).models}


def expected(folder: Path, *, adapter: bool) -> float:
    source = resolve(folder / "q")
    read = texts("wikitext2", "test", data_dir=folder / "mirror", offline=True)
    windows = text_windows(read, source.tokenizer(), context=64, limit=2, name="wikitext2")
    return perplexity(load_model(source, dtype=torch.float32, adapter=adapter), windows).value


def test_it_is_scored_with_its_adapter(folder: Path) -> None:
    scores = scores_of(run(folder, "q")[1])["q"]
    assert scores.subject.adapter == "DoRA rank 4"
    assert scores.subject.bits_per_weight == 5
    assert scores.perplexity["wikitext2"].value == pytest.approx(expected(folder, adapter=True), rel=1e-5)


def test_the_base_alone_says_so_and_costs_less(folder: Path) -> None:
    scores = scores_of(run(folder, "q", adapter=False)[1])["q without adapter"]
    assert scores.subject.adapter == "without adapter"
    assert scores.subject.bits_per_weight == 3
    alone = expected(folder, adapter=False)
    assert scores.perplexity["wikitext2"].value == pytest.approx(alone, rel=1e-5)
    assert abs(alone / expected(folder, adapter=True) - 1) > 1e-3


def test_one_evaluation_is_not_taken_for_the_other(folder: Path) -> None:
    (with_it, first), (without, second) = run(folder, "q"), run(folder, "q", adapter=False)
    assert with_it != without
    assert first.fingerprint != second.fingerprint
    assert {phase.name for phase in second.phases} == {"q without adapter: perplexity on wikitext2"}


def test_both_stand_side_by_side(folder: Path) -> None:
    for adapter, out in ((True, "with"), (False, "without")):
        run(folder, "q", adapter=adapter, out=out)
    path, manifest = evaluate(EvaluateRequest(sources=("with", "without"), offline=True, device="cpu"))
    results = Results.model_validate(manifest.results)
    assert [scores.subject.name for scores in results.models] == ["q", "q without adapter"]
    table = {row.label: row.cells for row in rows(results)}
    assert table["method"] == ("rtn w3g32, DoRA rank 4", "rtn w3g32, without adapter")
    assert table["bits per weight"] == ("5.000", "3.000")
    assert "q without adapter" in (path / "report.html").read_text()


def test_a_model_that_has_none_is_called_what_it_is(folder: Path) -> None:
    scores = scores_of(run(folder, "plain", "q", adapter=False)[1])
    assert list(scores) == ["plain", "q without adapter"]
    assert scores["plain"].subject.adapter is None
