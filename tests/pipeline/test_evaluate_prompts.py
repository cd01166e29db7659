"""Prompts and sizes, from sources to an evaluation artifact: tiny models, a tiny mirror."""

import json
from pathlib import Path

import pytest
import torch

from tests.evaluation.sample import write_mirror
from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny, tiny_config, tiny_model
from tests.models.tiny_gguf import write_tiny_gguf
from ulbq.artifacts import EvaluationManifest
from ulbq.artifacts.shards import GUARD_NAME
from ulbq.config.adapter import AdapterConfig
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import UsageError
from ulbq.evaluation import continuations, measurer
from ulbq.evaluation.evaluated import EvaluatedModel
from ulbq.evaluation.results import ModelScores, Results
from ulbq.evaluation.sizes import weight_size
from ulbq.evaluation.table import footnotes, rows
from ulbq.formats import AffineScheme
from ulbq.models.load import load_model, model_memory
from ulbq.models.source import resolve
from ulbq.models.spread import load_spread
from ulbq.pipeline.evaluate import evaluate
from ulbq.pipeline.quantize import quantize

PROMPT = "once upon a time"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``base``, its quantization ``q``, one with an adapter ``tuned``, and a data mirror."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny("llama", folder / "base", tied=False)
    base = str(folder / "base")
    quantize(QuantizeRequest(source=base, method="rtn", bits=4, group_size=32, out=folder / "q"))
    write_quantized(resolve(base), folder / "tuned", AffineScheme(bits=4, group_size=32), AdapterConfig(rank=4))
    write_mirror(folder / "mirror")
    return folder


@pytest.fixture(autouse=True)
def own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ULBQ_DATA_DIR", raising=False)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded, in order."""
    names: list[str] = []

    def load(source, devices, **options):
        names.append(source.name)
        return load_spread(source, devices, **options)

    monkeypatch.setattr(measurer, "load_spread", load)
    return names


def request(made: Path, *names: str, **changes) -> EvaluateRequest:
    values = {"prompts": (PROMPT,), "max_new_tokens": 6, "context": 64, "limit": 1, "data_dir": made / "mirror"}
    values |= {"offline": True, "device": "cpu", "dtype": "fp32"}
    return EvaluateRequest(sources=tuple(str(made / name) for name in names), **(values | changes))


@pytest.mark.parametrize("asked", [True, False])
def test_the_work_of_a_token_is_recorded_where_it_is_asked(
    made: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    given, write_on = [], continuations.write_on

    def spy(*args, cuda_graphs: bool, **options):
        given.append(cuda_graphs)
        return write_on(*args, cuda_graphs=cuda_graphs, **options)

    monkeypatch.setattr(continuations, "write_on", spy)
    evaluate(request(made, "base", cuda_graphs=asked))
    assert given == [asked] * 2


def scores_of(manifest: EvaluationManifest) -> dict[str, ModelScores]:
    return {scores.subject.name: scores for scores in Results.model_validate(manifest.results).models}


def test_model_and_parent_go_on_from_the_same_prompt_beside_the_scores(made):
    path, manifest = evaluate(request(made, "q"))
    scores = scores_of(manifest)
    assert list(scores) == ["base", "q"]
    assert scores["q"].fidelity is not None
    assert scores["q"].perplexity.keys() == {"wikitext2"}
    for name, found in scores.items():
        source = resolve(made / name)
        tokens = source.tokenizer()(PROMPT, return_tensors="pt").input_ids
        out = load_model(source, dtype=torch.float32).generate(tokens, max_new_tokens=6, do_sample=False)
        (one,) = found.continuations
        assert one.text == source.tokenizer().decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
        assert (one.prompt, one.template, one.timed_tokens) == (PROMPT, None, 6)
    kept = json.loads((path / "results.json").read_text(encoding="utf-8"))
    assert kept["models"][1]["continuations"][0]["prompt"] == PROMPT
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "In their own words" in page
    assert "tokens per second; parent " in page


@pytest.mark.parametrize("asked", [False, True])
def test_the_parent_writes_even_where_it_is_not_scored(made, asked):
    _, manifest = evaluate(request(made, "q", parent_scores=asked, perplexity=("wikitext2",)))
    scores = scores_of(manifest)
    assert {name: len(found.continuations) for name, found in scores.items()} == {"base": 1, "q": 1}
    assert bool(scores["base"].perplexity) is asked


def test_prompts_alone_where_nothing_else_can_be_measured(made):
    _, manifest = evaluate(request(made, "base", data_dir=None))
    (found,) = scores_of(manifest).values()
    assert (found.perplexity, found.fidelity, len(found.continuations)) == ({}, None, 1)


def test_several_prompts_in_a_layout_each_once(made):
    _, manifest = evaluate(request(made, "q", prompts=(PROMPT, "hello", PROMPT), template="chat", fidelity=False))
    for found in scores_of(manifest).values():
        assert [(one.prompt, one.template) for one in found.continuations] == [(PROMPT, "chat"), ("hello", "chat")]
    assert scores_of(manifest)["q"].fidelity is None


def test_a_resumed_run_neither_writes_nor_weighs_again(made, loads, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    asked = request(made, "q", fidelity=False, out=Path("e"))
    with monkeypatch.context() as patch:
        patch.setattr(measurer, "weight_size", _after(1, interrupted))
        with pytest.raises(KeyboardInterrupt):
            evaluate(asked)
    loads.clear()
    monkeypatch.setattr(continuations, "continue_prompts", interrupted)
    _, manifest = evaluate(asked)
    assert loads == ["q"]  # to be weighed, and for nothing else
    assert all(found.continuations and found.weights for found in scores_of(manifest).values())


def _after(times, otherwise):
    """``weight_size``, and from the second call on something else."""
    plain, calls = measurer.weight_size, []

    def call(*arguments):
        calls.append(arguments)
        return plain(*arguments) if len(calls) <= times else otherwise()

    return call


def test_finished_evaluations_keep_what_was_written(made, loads):
    evaluate(request(made, "q", out=Path("e")))
    evaluate(request(made, "tuned", prompts=("hello",), parent=str(made / "base"), out=Path("f")))
    loads.clear()
    path, manifest = evaluate(EvaluateRequest(sources=("e", "f")))
    assert loads == []
    found = {name: [one.prompt for one in scores.continuations] for name, scores in scores_of(manifest).items()}
    # The parent was measured twice; the first one counts.
    assert found == {"base": [PROMPT], "q": [PROMPT], "tiny-w3": ["hello"]}
    assert (path / "report.html").read_text(encoding="utf-8").count('<h3 class="prompt">') == 2
    with pytest.raises(UsageError, match="nothing is measured"):
        evaluate(EvaluateRequest(sources=("e", "f"), prompts=(PROMPT,)))


def test_results_of_before_there_were_sizes_and_words_still_load(made):
    _, manifest = evaluate(request(made, "q", prompts=(), max_new_tokens=None))
    old = json.loads(json.dumps(manifest.results))
    for model in old["models"]:
        del model["weights"], model["continuations"]
    labels = [row.label for row in rows(Results.model_validate(old))]
    assert labels[:3] == ["method", "bits per weight", "wikitext2 ↓"]
    assert not any("Size on disk" in note for note in footnotes(Results.model_validate(old)))


def test_sizes_are_those_of_the_files_and_of_what_is_held(made):
    _, manifest = evaluate(request(made, "q", prompts=(), max_new_tokens=None))
    for name, found in scores_of(manifest).items():
        assert found.weights is not None
        files = [file for file in (made / name).glob("model*.safetensors") if file.name != GUARD_NAME]
        assert found.weights.on_disk == sum(file.stat().st_size for file in files)
        assert found.weights.gguf_types == ()
    whole = sum(p.nbytes for p in load_model(resolve(made / "base"), dtype=torch.float32).parameters())
    sizes = scores_of(manifest)
    assert sizes["base"].weights.in_memory == pytest.approx(whole, rel=0.01)
    assert sizes["q"].weights.in_memory < sizes["base"].weights.in_memory


def test_an_adapter_counts_where_it_is_measured(made):
    sizes = []
    for adapter in (True, False):
        asked = request(made, "tuned", parent=str(made / "base"), adapter=adapter)
        _, manifest = evaluate(asked)
        sizes.append(next(s.weights for s in scores_of(manifest).values() if s.subject.kind == "quantized"))
    kept = (made / "tuned/adapter/adapter_model.safetensors").stat().st_size
    assert sizes[0].on_disk - sizes[1].on_disk == kept
    assert 0 < sizes[0].in_memory - sizes[1].in_memory < 4 * kept


def test_a_gguf_file_says_what_it_is_made_of(tmp_path):
    file = write_tiny_gguf(tiny_model(tiny_config("llama", tied=False)), tmp_path / "tiny-Q8_0.gguf")
    source = resolve(file)
    model = load_model(source, dtype=torch.float32)
    found = weight_size(EvaluatedModel(source, "tiny"), model)
    assert found.on_disk == file.stat().st_size
    # Float32 for embeddings and head, 2 · 256 · 64 weights in four bytes each; Q8_0 for three blocks of 36,864.
    assert found.gguf_types == ("F32", "Q8_0")
    assert found.in_memory == model_memory(model).weights


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": (" ",)}, "prompt is empty"),
        ({"prompts": ("\udcff",)}, "not UTF-8"),
        ({"max_new_tokens": 300}, "more than the 256 that"),
        ({"prompts": ("ab " * 300,)}, "more than the 256 that"),
        ({"prompts": (), "max_new_tokens": 3}, "means nothing without `tasks` or `prompts`"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_said_before_anything_is_loaded(made, loads, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        evaluate(request(made, "q", **changes))
    assert loads == []
    assert not Path("artifacts").exists()
