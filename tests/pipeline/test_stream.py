"""Whole runs whose models are read block by block: the same results, chosen by memory, and told."""

from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.sample import write_mirror
from tests.models.tiny import save_tiny
from tests.pipeline.runs import request as asked
from tests.pipeline.runs import shards
from ulbq import runtime
from ulbq.artifacts import EvaluationManifest
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.saliency import SaliencyRequest
from ulbq.errors import UsageError
from ulbq.evaluation import measurer
from ulbq.finetuning.student import Student
from ulbq.pipeline import end_to_end
from ulbq.pipeline import samples as samples_module
from ulbq.pipeline.evaluate import evaluate
from ulbq.pipeline.quantization_plan import Job
from ulbq.pipeline.quantize import plan, quantize
from ulbq.pipeline.saliency import saliency
from ulbq.progress import Silent


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``base``, its quantization ``q`` and a data mirror."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny("llama", folder / "base", tied=False)
    quantize(QuantizeRequest(source=str(folder / "base"), method="rtn", bits=4, group_size=32, out=folder / "q"))
    write_mirror(folder / "mirror")
    return folder


@pytest.fixture(autouse=True)
def own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ULBQ_DATA_DIR", raising=False)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: Any, **options: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(measurer, "load_spread", load)
    monkeypatch.setattr(samples_module, "load_model", load)


def evaluated(made: Path, told: Silent | None = None, **changes: Any) -> EvaluationManifest:
    values: dict[str, Any] = {"context": 64, "limit": 3, "offline": True, "device": "cpu", "dtype": "fp32"}
    values |= {"data_dir": made / "mirror", "sources": (str(made / "q"),), **changes}
    return evaluate(EvaluateRequest(**values), told)[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bf16", "batch_size": 2},
        {"prompts": ("aba",), "max_new_tokens": 3},
        {"fidelity": True, "data_dir": None},  # on text that the parent writes
    ],
    ids=["fp32", "bf16", "prompts", "own text"],
)
def test_an_evaluation_comes_to_the_same_numbers(
    changes: dict[str, Any], made: Path, request: pytest.FixtureRequest
) -> None:
    loaded = evaluated(made, out=Path("loaded"), stream=False, **changes).results
    request.getfixturevalue("nothing_is_loaded")
    streamed = evaluated(made, out=Path("streamed"), stream=True, **changes).results
    for results in (loaded, streamed):
        for model in results["models"]:
            for one in model["continuations"]:
                assert ("read from disk" in one.pop("device")) == (results is streamed)
                del one["tokens_per_second"]
                if changes.get("dtype") == "bf16":
                    # A model that is loaded writes by compiled code, which rounds otherwise.
                    del one["text"], one["new_tokens"]
    assert streamed == loaded


def test_memory_chooses_and_says_so(
    made: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    told = Heard()
    evaluated(made, told)
    assert not any("block by block" in note for note in told.notes)
    monkeypatch.setattr(runtime, "free_memory", lambda device: 1 << 20)
    evaluated(made, stream=False, out=Path("loaded"))
    request.getfixturevalue("nothing_is_loaded")
    evaluated(made, told, out=Path("streamed"))
    assert any(note.startswith("base takes 1.0 GiB, and 0.0 are free: it is read block") for note in told.notes)


@pytest.mark.parametrize(
    "changes",
    [{"teacher": "cached"}, {"teacher": "streamed"}, {"end_to_end": "kl-hidden"}, {"precision": "bf16"}],
)
def test_a_teacher_that_is_read_block_by_block_teaches_the_same(
    changes: dict[str, Any], tiny_llama: Path, samples: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    values: dict[str, Any] = {"method": "db-llm", "group_size": 32, "epochs": 0, "calibration": str(samples)}
    values |= {"samples": 4, "sequence_length": 32, "precision": "fp32", "end_to_end": "kl", **changes}
    loaded, _ = quantize(asked(tiny_llama, tmp_path / "loaded", stream=False, **values))
    request.getfixturevalue("nothing_is_loaded")
    streamed, manifest = quantize(asked(tiny_llama, tmp_path / "streamed", stream=True, **values))
    assert shards(streamed) == shards(loaded)
    assert manifest.end_to_end is not None
    assert manifest.end_to_end.end_error < manifest.end_to_end.start_error


def test_a_model_that_is_read_block_by_block_writes_the_same_samples(
    tiny_llama: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    values: dict[str, Any] = {"method": "gptq", "bits": 4, "group_size": 32, "calibration": "self", "precision": "fp32"}
    values |= {"samples": 4, "sequence_length": 32}
    scored = {"source": str(tiny_llama), "calibration": "self", "samples": 2, "sequence_length": 16, "offline": True}
    loaded, _ = quantize(asked(tiny_llama, tmp_path / "loaded", **values))
    wanted, _ = saliency(SaliencyRequest(out=tmp_path / "s", **scored))
    request.getfixturevalue("nothing_is_loaded")
    streamed, _ = quantize(asked(tiny_llama, tmp_path / "streamed", stream=True, **values))
    found, _ = saliency(SaliencyRequest(out=tmp_path / "t", stream=True, **scored))
    assert shards(streamed) == shards(loaded)
    assert shards(found) == shards(wanted)


def test_a_student_beside_a_streamed_teacher_leaves_its_embedding_on_disk(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save_tiny("llama", tmp_path / "wide", tied=False, vocab=900)
    held: dict[bool, int] = {}
    build = end_to_end.build_student

    def watched(job: Job, *arguments: Any, **named: Any) -> Student:
        student = build(job, *arguments, **named)
        held[job.streamed] = sum(p.nbytes for p in student.model.parameters())
        return student

    monkeypatch.setattr(end_to_end, "build_student", watched)
    values: dict[str, Any] = {"method": "db-llm", "group_size": 32, "epochs": 0, "calibration": str(samples)}
    values |= {"samples": 4, "sequence_length": 32, "precision": "bf16", "end_to_end": "kl", "teacher": "cached"}
    for on in (False, True):
        quantize(asked(wide, tmp_path / f"{on}", stream=on, **values))
    assert held[False] - held[True] == 2 * 900 * 64


def test_a_plan_knows_what_is_streamed(
    tiny_llama: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = save_tiny("llama", tmp_path / "wide", num_hidden_layers=64, intermediate_size=512)
    values: dict[str, Any] = {"method": "gptq", "bits": 4, "group_size": 32, "calibration": "self"}
    values |= {"samples": 2, "sequence_length": 16, "precision": "fp32"}
    both = [plan(asked(wide, tmp_path / "q", stream=on, **values)) for on in (False, True)]
    assert [one.reads for one in both] == [0, 15]
    assert both[0].cost.peak_memory - both[1].cost.peak_memory > 15e6  # 63 blocks of 0.1 M weights
    monkeypatch.setattr(runtime, "free_memory", lambda device: 1 << 20)
    told = Heard()
    assert plan(asked(wide, tmp_path / "q", **values), told).reads == 15
    assert sum("block by block" in note for note in told.notes) == 1
    taught: dict[str, Any] = {"method": "db-llm", "calibration": str(samples), "end_to_end": "kl", "epochs": 0}
    taught |= {"teacher": "cached", "group_size": 32, "samples": 4, "sequence_length": 32}
    assert plan(asked(tiny_llama, tmp_path / "q", **taught)).reads == 1
    # Two steps of two samples, and two held out before and after, that run at once.
    assert plan(asked(tiny_llama, tmp_path / "q", **(taught | {"teacher": "streamed"}))).reads == 4
    with pytest.raises(UsageError, match="`stream` means nothing here"):
        plan(asked(tiny_llama, tmp_path / "q", stream=True, **(taught | {"end_to_end": "ce", "teacher": None})))
