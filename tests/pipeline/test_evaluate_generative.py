"""Generative tasks, from sources to an evaluation artifact: tiny models, a tiny mirror, no lm-eval."""

import json
from pathlib import Path

import pytest

from tests.evaluation.sample import write_mirror
from tests.models.tiny import save_tiny
from ulbq.artifacts import EvaluationManifest, verify
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation import generative, harness, measurer
from ulbq.evaluation.results import ModelScores, Results
from ulbq.pipeline.evaluate import SAMPLES, evaluate
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model ``base`` that holds Alpaca's prompt, its quantization ``q4``, and a data mirror."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny("llama", folder / "base", tied=False, max_position_embeddings=2048)
    quantize(QuantizeRequest(source=str(folder / "base"), method="rtn", bits=4, group_size=32, out=folder / "q4"))
    write_mirror(folder / "mirror")
    return folder


@pytest.fixture(autouse=True)
def own_working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ULBQ_DATA_DIR", raising=False)
    # Nothing here may need lm-eval.
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    harness._manager.cache_clear()


class Listening(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def request(made: Path, *names: str, **changes) -> EvaluateRequest:
    values = {"offline": True, "device": "cpu", "dtype": "fp32", "data_dir": made / "mirror", "max_new_tokens": 4}
    values["parent_scores"] = False
    return EvaluateRequest(sources=tuple(str(made / name) for name in names), **(values | changes))


def scores_of(manifest: EvaluationManifest) -> dict[str, ModelScores]:
    return {scores.subject.name: scores for scores in Results.model_validate(manifest.results).models}


def test_answers_are_scored_and_some_are_kept(made):
    path, manifest = evaluate(request(made, "q4", tasks=("svamp", "boolq-instruct"), limit=3))
    verify(path)
    assert SAMPLES in manifest.files
    scores = scores_of(manifest)["q4"].tasks
    assert list(scores) == ["svamp", "boolq-instruct"]
    assert scores["svamp"].samples == 3
    assert scores["svamp"].writing is not None
    assert (scores["svamp"].writing.template, scores["svamp"].writing.new_tokens) == ("alpaca", 4)
    samples = [json.loads(line) for line in (path / SAMPLES).read_text(encoding="utf-8").splitlines()]
    assert [(sample["model"], sample["task"]) for sample in samples] == [("q4", "svamp")] * 3 + [
        ("q4", "boolq-instruct")
    ] * 3
    assert samples[1].keys() == {"model", "task", "prompt", "text", "extracted", "expected", "right"}
    assert "What is 1 + 1?" in samples[1]["prompt"]
    assert samples[1]["expected"] == 2.0
    right = sum(sample["right"] for sample in samples[:3]) / 3
    assert scores["svamp"].metrics["exact_match"].value == right
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "svamp exact_match" in page
    assert "answers written greedily to the first 3 documents, laid out as alpaca" in page
    assert "lm-eval" not in page


def test_without_written_answers_there_are_no_samples(made):
    path, _ = evaluate(request(made, "q4", perplexity=("wikitext2",), context=64, limit=1, max_new_tokens=None))
    assert not (path / SAMPLES).exists()


def test_a_group_stands_before_its_members_and_says_what_it_lacks(made):
    told = Listening()
    path, manifest = evaluate(request(made, "q4", tasks=("commonsense",), limit=2), told)
    scores = scores_of(manifest)["q4"].tasks
    assert list(scores) == ["commonsense", "boolq-instruct", "piqa-instruct"]
    assert scores["boolq-instruct"].member_of == "commonsense"
    assert scores["commonsense"].version == "1, 2 of 8 sets"
    assert any("hellaswag-instruct" in note and "2 sets" in note for note in told.notes)
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "commonsense exact_match" in page
    # As published tables have them: every set, and their mean.
    assert "boolq-instruct exact_match" in page


def test_batches_give_the_score_of_single_prompts(made):
    found = [
        evaluate(request(made, "q4", tasks=("arithmetic-cot",), batch_size=size, max_new_tokens=6))[1]
        for size in (1, 8)
    ]
    assert scores_of(found[0])["q4"].tasks == scores_of(found[1])["q4"].tasks


def test_the_layout_can_be_chosen_and_is_recorded(made):
    path, manifest = evaluate(request(made, "q4", tasks=("gsm8k-cot",), template="gsm8k", limit=1))
    writing = scores_of(manifest)["q4"].tasks["gsm8k-cot"].writing
    assert writing is not None
    assert writing.template == "gsm8k"
    (line,) = (path / SAMPLES).read_text(encoding="utf-8").splitlines()
    assert "First think step by step" in json.loads(line)["prompt"]
    assert Results.model_validate(manifest.results).protocol.template == "gsm8k"


def test_the_parent_writes_too_and_evaluations_compare(made):
    first, manifest = evaluate(request(made, "q4", tasks=("svamp",), limit=2, parent_scores=True))
    assert [name for name, scores in scores_of(manifest).items() if "svamp" in scores.tasks] == ["base", "q4"]
    samples = (first / SAMPLES).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["model"] for line in samples] == ["base", "base", "q4", "q4"]
    compared, _ = evaluate(EvaluateRequest(sources=(str(first), str(first)), out=Path("again")))
    assert "svamp exact_match" in (compared / "report.html").read_text(encoding="utf-8")
    other, _ = evaluate(request(made, "base", tasks=("svamp",), limit=2, template="gsm8k"))
    with pytest.raises(InputError, match="measured with another template"):
        evaluate(EvaluateRequest(sources=(str(first), str(other))))


def test_an_interrupted_run_goes_on_with_the_next_task(made, monkeypatch):
    asked = request(made, "q4", tasks=("svamp", "mawps"), limit=2, out=Path("e"))
    plain, done = generative.run_generative, []

    def stop_at_mawps(model, tokenizer, loaded, **options):
        if loaded.task.name == "mawps" and len(done) == 1:
            raise KeyboardInterrupt
        done.append(loaded.task.name)
        return plain(model, tokenizer, loaded, **options)

    monkeypatch.setattr(generative, "run_generative", stop_at_mawps)
    with pytest.raises(KeyboardInterrupt):
        evaluate(asked)
    done.append("interrupted")
    path, manifest = evaluate(asked)
    assert done == ["svamp", "interrupted", "mawps"]
    assert list(scores_of(manifest)["q4"].tasks) == ["svamp", "mawps"]
    told = [json.loads(line)["task"] for line in (path / SAMPLES).read_text(encoding="utf-8").splitlines()]
    assert told == ["svamp", "svamp", "mawps", "mawps"]


def test_names_of_lm_eval_stay_lm_evals(made):
    with pytest.raises(ResourceError, match="lm-eval, which is not installed"):
        evaluate(request(made, "q4", tasks=("svamp", "piqa"), limit=1))


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"tasks": ("piqa",), "template": "gsm8k", "max_new_tokens": None}, UsageError, "`template` means nothing to"),
        ({"tasks": ("piqa",)}, UsageError, "`max_new_tokens` means nothing to tasks of lm-eval"),
        ({}, UsageError, "`max_new_tokens` means nothing without `tasks`"),
        ({"tasks": ("siqa-instruct",)}, ResourceError, r"no llm-adapters/siqa/test\.jsonl"),
        ({"tasks": ("commonsense", "piqa-instruct")}, UsageError, "both contain the task 'piqa-instruct'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(made, monkeypatch, changes, error, sentence):
    monkeypatch.setattr(measurer, "load_spread", None)
    with pytest.raises(error, match=sentence) as caught:
        evaluate(request(made, "q4", **changes))
    assert caught.value.hint
    assert not Path("artifacts").exists()


def test_a_chat_template_has_to_be_there(made, monkeypatch, tmp_path):
    folder = tmp_path / "plain"
    save_tiny("llama", folder, tied=False, max_position_embeddings=2048)
    for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        if file.suffix == ".json":
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings.pop("chat_template", None)
            file.write_text(json.dumps(settings), encoding="utf-8")
        else:
            file.unlink(missing_ok=True)
    monkeypatch.setattr(measurer, "load_spread", None)
    with pytest.raises(UsageError, match="no chat template"):
        evaluate(request(made, str(folder), tasks=("svamp",), template="chat"))
