"""The whole way from sources to an evaluation artifact, on tiny models and a tiny mirror."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.evaluation.sample import write_mirror
from tests.models.tiny import save_tiny
from ulbq.artifacts import EvaluationManifest, read_manifest, verify
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, NumericsError, ResourceError, UsageError
from ulbq.evaluation import fidelity, harness, kept, measurer
from ulbq.evaluation.metrics.fidelity import FIDELITY_WINDOWS
from ulbq.evaluation.results import ModelScores, Results
from ulbq.models.load import load_model
from ulbq.models.source import resolve
from ulbq.models.spread import load_spread
from ulbq.pipeline.evaluate import evaluate
from ulbq.pipeline.evaluation_plan import DEFAULT_PROMPT
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model ``base``, its quantizations ``q4`` and ``q2``, and a data mirror."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny("llama", folder / "base", tied=False)
    for bits in (4, 2):
        request = QuantizeRequest(
            source=str(folder / "base"), method="rtn", bits=bits, group_size=32, out=folder / f"q{bits}"
        )
        quantize(request)
    write_mirror(folder / "mirror")
    return folder


@pytest.fixture(autouse=True)
def own_working_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ULBQ_DATA_DIR", raising=False)
    return tmp_path


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Names of the models that were loaded, in order."""
    names: list[str] = []

    def load(source, devices, **options):
        names.append(source.name)
        return load_spread(source, devices, **options)

    monkeypatch.setattr(measurer, "load_spread", load)
    return names


class Listening(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def request(made: Path, *names: str, **changes) -> EvaluateRequest:
    values = {"context": 64, "offline": True, "device": "cpu", "dtype": "fp32", "data_dir": made / "mirror"} | changes
    return EvaluateRequest(sources=tuple(str(made / name) for name in names), **values)


def scores_of(manifest: EvaluationManifest) -> dict[str, ModelScores]:
    return {scores.subject.name: scores for scores in Results.model_validate(manifest.results).models}


def test_nothing_asked_measures_fidelity_and_perplexity_beside_the_parents(made):
    told = Listening()
    path, manifest = evaluate(request(made, "q4"), told)
    scores = scores_of(manifest)
    assert list(scores) == ["base", "q4"]
    assert scores["q4"].fidelity is not None
    assert scores["q4"].fidelity.tokens == FIDELITY_WINDOWS * 64
    assert scores["q4"].perplexity["wikitext2"].windows == scores["base"].perplexity["wikitext2"].windows
    assert scores["base"].fidelity is None
    assert path == Path("artifacts/q4-eval")
    assert any("first 32 windows" in note for note in told.notes)


def test_the_artifact_is_whole(made):
    path, manifest = evaluate(request(made, "q4", limit=2, out=Path("e")))
    verify(path)
    assert read_manifest(path) == manifest
    assert set(manifest.files) == {"results.json", "report.html"}
    assert json.loads((path / "results.json").read_text()) == manifest.results
    assert [parent.name for parent in manifest.parents] == ["q4"]
    assert manifest.parents[0].sha256 == resolve(made / "q4").content_hash
    assert {phase.name for phase in manifest.phases} == {
        "base: prompts",
        "base: perplexity on wikitext2",
        "q4: prompts",
        "q4: perplexity on wikitext2",
        "q4: fidelity on wikitext2",
    }
    page = (path / "report.html").read_text()
    # Of both models, though nobody gave a prompt.
    assert page.count("<dt>") == 2
    assert DEFAULT_PROMPT in page
    assert "Error by layer" in page
    assert "Bits by part" in page


def test_scores_are_those_of_the_packed_model(made):
    from ulbq.data.registry import texts
    from ulbq.evaluation.perplexity import perplexity
    from ulbq.evaluation.text import text_windows

    _, manifest = evaluate(request(made, "q2", perplexity=("wikitext2",), limit=3))
    source = resolve(made / "q2")
    read = texts("wikitext2", "test", data_dir=made / "mirror", offline=True)
    windows = text_windows(read, source.tokenizer(), context=64, limit=3)
    wanted = perplexity(load_model(source, dtype=torch.float32), windows)
    assert scores_of(manifest)["q2"].perplexity["wikitext2"] == wanted


def test_a_prefill_cache_changes_no_score_and_is_told(made):
    # Windows of enough rows that a packed product makes its weights dense.
    options = {"perplexity": ("wikitext2",), "limit": 2, "context": 128, "batch_size": 1}
    values, notes = [], []
    for cached in (False, True):
        told = Listening()
        _, manifest = evaluate(request(made, "q4", prefill_cache=cached, **options), told)
        values.append(scores_of(manifest)["q4"].perplexity["wikitext2"].value)
        notes.append([note for note in told.notes if "prefill cache" in note])
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert notes == [[], ["The prefill cache of q4 takes 0 MB."]]


def test_without_text_the_parent_writes_its_own(made):
    told = Listening()
    _, manifest = evaluate(request(made, "q4", data_dir=None, limit=2), told)
    scores = scores_of(manifest)
    assert list(scores) == ["base", "q4"]
    assert scores["q4"].perplexity == {}
    assert scores["q4"].fidelity is not None
    assert scores["q4"].fidelity.text == "self"
    assert any("WikiText-2 cannot be had here: the parent writes" in note for note in told.notes)
    again = evaluate(request(made, "q4", data_dir=None, limit=2))[1]
    assert scores_of(again)["q4"].fidelity == scores["q4"].fidelity


def test_only_what_was_asked_for_is_measured(made, loads):
    _, manifest = evaluate(request(made, "q4", perplexity=("wikitext2",), parent_scores=False, limit=2))
    assert list(scores_of(manifest)) == ["q4"]
    assert scores_of(manifest)["q4"].fidelity is None
    assert loads == ["q4"]


def test_fidelity_alone_gives_the_parent_no_row(made):
    _, manifest = evaluate(request(made, "q4", fidelity=True, limit=2))
    assert list(scores_of(manifest)) == ["q4"]
    assert scores_of(manifest)["q4"].subject.parent == "base"


def test_a_full_precision_model_has_its_perplexity_only(made):
    _, manifest = evaluate(request(made, "base", limit=2))
    assert scores_of(manifest)["base"].fidelity is None
    assert scores_of(manifest)["base"].perplexity


def test_tasks_are_scored_of_the_parent_too(made, monkeypatch):
    pytest.importorskip("lm_eval")
    _know_few_tasks(monkeypatch)
    _, manifest = evaluate(request(made, "q4", tasks=("piqa", "arc_easy"), limit=2, parent_scores=False))
    scores = scores_of(manifest)
    assert list(scores) == ["q4"]
    assert scores["q4"].tasks.keys() == {"piqa", "arc_easy"}
    path, manifest = evaluate(request(made, "q4", tasks=("piqa",), limit=2))
    assert list(scores_of(manifest)) == ["base", "q4"]
    assert scores_of(manifest)["base"].tasks["piqa"].samples == 2
    assert "piqa acc ↑, chance 0.500" in (path / "report.html").read_text(encoding="utf-8")


def test_a_parent_is_scored_once_for_all_its_artifacts(made, loads, monkeypatch):
    pytest.importorskip("lm_eval")
    _know_few_tasks(monkeypatch)
    asked = {"perplexity": ("wikitext2",), "tasks": ("piqa", "svamp"), "limit": 2, "max_new_tokens": 4}
    _, first = evaluate(request(made, "q4", **asked))
    told = Listening()
    _, second = evaluate(request(made, "q2", **asked), told)
    assert loads == ["base", "q4", "q2"]
    assert scores_of(second)["base"] == scores_of(first)["base"]
    assert sum("base: scores of an earlier run" in note for note in told.notes) == 1
    # Another protocol, or none of the cache, measures again.
    for change in ({"limit": 3}, {"dtype": "bf16"}, {"score_cache": False}):
        loads.clear()
        evaluate(request(made, "q2", **asked | change))
        assert loads == ["base", "q2"]


def test_a_cache_that_cannot_be_read_or_written_costs_time_alone(made, loads, monkeypatch, tmp_path):
    asked = request(made, "q4", perplexity=("wikitext2",), limit=2)
    _, first = evaluate(asked)
    for file in kept.folder().iterdir():
        file.write_text("{")
    (tmp_path / "file").touch()
    for folder in (kept.folder(), tmp_path / "file"):
        loads.clear()
        monkeypatch.setattr(kept, "folder", lambda folder=folder: folder)
        told = Listening()
        _, again = evaluate(asked, told)
        assert loads == ["base", "q4"]
        assert again.results == first.results
        assert any("not kept for later runs" in note for note in told.notes) is folder.is_file()


def test_models_are_compared_in_one_table_parents_first(made):
    path, manifest = evaluate(request(made, "q4", "q2", "base", limit=2))
    scores = scores_of(manifest)
    assert list(scores) == ["base", "q4", "q2"]
    assert path == Path("artifacts/comparison")
    assert scores["q4"].fidelity is not None
    assert scores["q2"].fidelity is not None
    assert scores["q4"].fidelity.mean_kl < scores["q2"].fidelity.mean_kl


def test_finished_evaluations_are_compared_without_loading_anything(made, loads):
    four, first = evaluate(request(made, "q4", limit=2, out=Path("e4")))
    two, second = evaluate(request(made, "q2", limit=2, out=Path("e2")))
    loads.clear()
    both = EvaluateRequest(sources=(str(four), str(two)))
    path, manifest = evaluate(both)
    assert loads == []
    assert list(scores_of(manifest)) == ["base", "q4", "q2"]
    assert scores_of(manifest)["q2"] == scores_of(second)["q2"]
    assert [parent.sha256 for parent in manifest.parents] == [first.digest, second.digest]
    assert "Error by layer" in (path / "report.html").read_text()


def test_a_finished_evaluation_joins_models_under_the_same_protocol(made, loads):
    four, _ = evaluate(request(made, "q4", limit=2, out=Path("e4")))
    loads.clear()
    mixed = request(made, "q2", limit=2).model_copy(update={"sources": (str(four), str(made / "q2"))})
    _, manifest = evaluate(mixed)
    assert set(scores_of(manifest)) == {"base", "q4", "q2"}
    assert "q4" not in loads


def test_scores_of_another_protocol_are_refused(made):
    four, _ = evaluate(request(made, "q4", limit=2, out=Path("e4")))
    mixed = request(made, "q2", limit=3).model_copy(update={"sources": (str(four), str(made / "q2"))})
    with pytest.raises(InputError, match=r"another limit \(2, not 3\)"):
        evaluate(mixed)


def test_finished_evaluations_are_not_measured_again(made):
    four, _ = evaluate(request(made, "q4", limit=2, out=Path("e4")))
    two, _ = evaluate(request(made, "q2", limit=2, out=Path("e2")))
    with pytest.raises(UsageError, match="nothing is measured"):
        evaluate(EvaluateRequest(sources=(str(four), str(two)), perplexity=("wikitext2",)))


def test_an_interrupted_run_goes_on_with_the_next_measurement(made, loads, monkeypatch):
    asked = {"perplexity": ("wikitext2",), "fidelity": True, "limit": 2}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "fidelity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(request(made, "q4", **asked))
    assert Path("artifacts/q4-eval.partial").is_dir()
    loads.clear()
    told = Listening()
    path, manifest = evaluate(request(made, "q4", **asked), told)
    assert loads == ["q4", "base"]  # for the fidelity that was missing, and for nothing else
    assert any(note == "Resuming artifacts/q4-eval: 3 measurements are done." for note in told.notes)
    fresh = evaluate(request(made, "q4", **asked, out=Path("fresh")))[1]
    assert manifest.results == fresh.results
    assert path == Path("artifacts/q4-eval")


def test_other_settings_do_not_continue_an_interrupted_run(made, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "fidelity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(request(made, "q4", limit=2, out=Path("e")))
    with pytest.raises(InputError, match="another run"):
        evaluate(request(made, "q4", limit=3, out=Path("e")))


def test_logits_that_are_not_finite_leave_no_artifact(made, tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("llama", tmp_path / "broken", tied=False)
    file = tmp_path / "broken/model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError):
        evaluate(EvaluateRequest(sources=("broken",), context=64, limit=2, data_dir=made / "mirror", offline=True))
    assert not Path("artifacts").exists()


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"perplexity": ("wikitext",)}, UsageError, "no text set 'wikitext'"),
        ({"context": 512}, UsageError, "takes 256 tokens, fewer than `context=512`"),
        ({"fidelity": True}, InputError, "no full-precision model to compare with"),
        ({"data_dir": None}, ResourceError, "Nothing can be measured"),
        ({"data_dir": Path("nowhere")}, InputError, "no data folder"),
        ({"device": "cuda:99"}, ResourceError, "cuda:99"),
        ({"device": "meta"}, ResourceError, "meta"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(made, loads, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        evaluate(request(made, "base", **changes))
    assert loads == []
    assert not Path("artifacts").exists()


def test_the_usual_context_gives_way_to_a_shorter_model(made):
    _, manifest = evaluate(request(made, "q4", context=None, perplexity=("wikitext2",), limit=1))
    assert Results.model_validate(manifest.results).protocol.context == 256


def test_a_lone_evaluation_is_no_model(made):
    path, _ = evaluate(request(made, "q4", limit=1))
    with pytest.raises(InputError, match="holds the scores of a model"):
        evaluate(EvaluateRequest(sources=(str(path),)))


def _know_few_tasks(monkeypatch) -> None:
    """Let lm-eval read two folders of its tasks, not thousands."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[tasks / "piqa", tasks / "arc"])
    monkeypatch.setattr(harness, "_manager", lambda: manager)
