"""Sweeps of tiny models: which runs there are, what comes of them, and what a killed one keeps."""

import csv
import dataclasses
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.artifacts.sample import check_hashes
from tests.evaluation.sample import model_scores, results, write_mirror
from tests.evaluation.test_report import Page
from tests.models.tiny import save_tiny
from tests.pipeline.runs import shards
from ulbq.artifacts import ArtifactWriter, LayerRecord, SweepManifest, SweepRun, read_manifest, verify
from ulbq.config.evaluate import EvaluateRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.sweep import SweepRequest
from ulbq.errors import InputError, NumericsError, ResourceError, UsageError
from ulbq.evaluation import measurer
from ulbq.evaluation.results import Results
from ulbq.models.source import ModelSource, resolve
from ulbq.models.spread import load_spread
from ulbq.pipeline import samples, sweep_runs
from ulbq.pipeline.evaluate import evaluate
from ulbq.pipeline.listing import artifacts
from ulbq.pipeline.quantize import quantize
from ulbq.pipeline.sweep import sweep
from ulbq.pipeline.sweep_page import _blocks
from ulbq.pipeline.sweep_plan import expand, plan, prepare
from ulbq.pipeline.sweep_points import by_setting, front
from ulbq.progress import Silent
from ulbq.runtime import LIBRARY_MEMORY


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``base``, text for calibration and a data mirror."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny("llama", folder / "base", tied=False)
    (folder / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)))
    write_mirror(folder / "mirror")
    return folder


@pytest.fixture(autouse=True)
def _own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def request(made: Path, **changes: Any) -> SweepRequest:
    values: dict[str, Any] = {
        "method": ("rtn", "gptq"),
        "bits": (2, 3),
        "seeds": (0, 1),
        "samples": 2,
        "sequence_length": 16,
        "calibration": str(made / "text.txt"),
        "options": {"group_size": 32},
        "context": 32,
        "limit": 2,
        "dtype": "fp32",
        "device": "cpu",
        "offline": True,
        "data_dir": made / "mirror",
    }
    return SweepRequest(source=str(made / "base"), **{**values, **changes})


NAMES = ["rtn-w2", "rtn-w3", "gptq-w2-s0", "gptq-w2-s1", "gptq-w3-s0", "gptq-w3-s1"]


def names(asked: SweepRequest) -> list[str]:
    return [run.name for run in expand(asked)[0]]


class StopAt(Silent):
    """Interrupts a sweep as a phase begins."""

    def __init__(self, phase: str) -> None:
        self._phase = phase

    def phase(self, name: str, total: int | None = None, *, rounds: int | None = None) -> Any:
        if name.startswith(self._phase):
            raise KeyboardInterrupt
        return super().phase(name, total, rounds=rounds)


class Noting(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_grid_has_every_method_with_every_width_and_seed(made: Path) -> None:
    # Rounding draws nothing at random: its seeds would give the same.
    assert names(request(made)) == NAMES
    runs = {run.name: run.request for run in expand(request(made))[0]}
    assert (runs["gptq-w3-s1"].bits, runs["gptq-w3-s1"].seed, runs["gptq-w3-s1"].samples) == (3, 1, 2)
    assert (runs["rtn-w2"].samples, runs["rtn-w2"].group_size) == (None, 32)


def test_a_fraction_is_spent_on_average_and_what_a_method_does_not_take_is_named(made: Path) -> None:
    runs, left_out = expand(
        request(made, method="db-llm,trellis,rtn,binary-mos", bits="1,2,2.3,3", seeds=0, options={})
    )
    assert [run.name for run in runs] == [
        "db-llm-w2",
        "trellis-w1",
        "trellis-w2",
        "trellis-w2.3",
        "trellis-w3",
        "rtn-w1",
        "rtn-w2",
        "rtn-w3",
        "binary-mos-w1",
    ]
    assert {run.name: run.request.target_bits for run in runs}["trellis-w2.3"] == 2.3
    assert list(left_out) == [
        "db-llm-w1",
        "db-llm-w2.3",
        "db-llm-w3",
        "rtn-w2.3",
        *(f"binary-mos-w{n}" for n in ("2", "2.3", "3")),
    ]
    assert "`bits=3`" in left_out["db-llm-w3"]
    (run,) = expand(request(made, method="gptq", bits="2.3", seeds=0))[0]
    assert (run.request.bits, run.request.target_bits) == (2, 2.3)  # gptq's own bits are more than that


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": ()}, "wants a grid or a file"),
        ({"settings": Path("x.yaml")}, "wants a grid or a file"),
        ({"method": ("gtpq",)}, "no method 'gtpq'"),
        ({"method": ("db-llm",), "bits": (3, 4), "options": {}}, "Nothing is left to try"),
        ({"method": ("rtn",)}, "`samples` means nothing to any method"),
        ({"options": {"rank": 4}}, "`rank` means nothing to any method of this sweep (rtn, gptq)"),
        ({"options": {"no_such": 4}}, "no option `no_such`"),
        ({"options": {"damping": -1}}, "Run 'gptq-w2-s0': `damping=-1`"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_model_is_opened(made: Path, changes: dict[str, Any], said: str) -> None:
    if changes.get("method") == ("rtn",):
        changes = {**changes, "calibration": None, "sequence_length": None}
    with pytest.raises(UsageError) as refused:
        expand(request(made, **changes))
    assert said in refused.value.message


def test_a_refusal_by_the_model_names_the_run_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Run 'rtn-w2': "):
        sweep(request(made, options={"group_size": 24}, out=tmp_path / "s"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_settings(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("- {method: gptq, bits: 3, damping: 0.05}\n- {recipe: claq-w4}\n- {name: mine, method: rtn}\n")
    runs = expand(request(made, method=(), bits=(), settings=file, seeds=(0,)))[0]
    assert [run.name for run in runs] == ["gptq-w3", "claq-w4", "mine"]
    assert (runs[0].request.damping, runs[0].request.samples) == (0.05, 2)
    assert runs[1].request.recipe is not None
    assert runs[1].request.recipe.name == "claq-w4"
    assert runs[2].request.group_size == 32


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("a: b", InputError, "no list of settings"),
        ("[]", InputError, "no list of settings"),
        ("- {bits: 2}", UsageError, "neither a method nor a recipe"),
        ("- {method: gptq, bit: 2}", UsageError, "unknown option 'bit'"),
        ("- {method: gptq, seed: 2}", UsageError, "unknown option 'seed'"),
        ("- {method: gptq}\n- {method: gptq}", UsageError, "Two settings are called 'gptq'"),
        ("- {method: gptq, name: a/b}", UsageError, "cannot be called"),
        ("- {method: gptq, bits: 7}", UsageError, "Run 'gptq-w7': `bits=7`"),
        ("- {", InputError, "no YAML"),
    ],
)
def test_a_wrong_file_of_settings(made: Path, tmp_path: Path, text: str, kind: type[Exception], said: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(kind) as refused:
        expand(request(made, method=(), bits=(), settings=file, seeds=(0,)))
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def swept(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep."""
    return sweep(request(made, out=tmp_path_factory.mktemp("swept") / "s"))[0]


def test_a_sweep_is_whole(swept: Path, made: Path) -> None:
    manifest = read_manifest(swept)
    assert isinstance(manifest, SweepManifest)
    assert [run.name for run in manifest.runs] == NAMES
    assert manifest.left_out == {}
    verify(swept)
    check_hashes(swept)
    models = Results.model_validate(manifest.results).models
    assert [one.subject.name for one in models] == ["base", *NAMES]
    assert models[2].subject.path == "runs/rtn-w3"
    assert all(one.fidelity is not None for one in models[1:])
    run = manifest.runs[2]
    artifact = read_manifest(swept / "runs" / run.name)
    assert (run.bits, run.size) == (artifact.bits.bits_per_weight, sum(artifact.bits.parts.values()) / 8)
    assert len(run.errors) == 3
    assert artifact.request["out"] is None
    with (swept / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == NAMES
    assert float(rows[2]["perplexity, wikitext2"]) == models[3].perplexity["wikitext2"].value
    (listed,) = artifacts(swept.parent)
    assert (listed.kind, listed.what) == ("sweep", "6 runs of rtn, gptq")


def test_a_run_is_what_quantize_makes(swept: Path, made: Path, tmp_path: Path) -> None:
    alone = QuantizeRequest(
        source=str(made / "base"), method="gptq", bits=3, seed=1, samples=2, sequence_length=16, group_size=32,
        calibration=str(made / "text.txt"), device="cpu", offline=True, out=tmp_path / "q",
    )  # fmt: skip
    assert shards(quantize(alone)[0]) == shards(swept / "runs" / "gptq-w3-s1")


def test_a_run_is_a_model_that_finds_its_parent(swept: Path, tmp_path: Path) -> None:
    moved = swept.rename(swept.with_name("moved"))
    try:
        assert resolve(moved / "runs" / "gptq-w2-s0").parent is not None
        with pytest.raises(InputError, match="holds the runs of a sweep"):
            resolve(moved)
    finally:
        moved.rename(swept)


@pytest.mark.parametrize("where", ["Quantizing", "Perplexity of gptq-w2-s0", "Loading gptq-w3-s0"])
def test_a_stopped_sweep_goes_on(
    swept: Path, made: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(made, out=tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, StopAt(where))
    done: list[str] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        done.append(named["name"])
        return quantize(*arguments, **named)

    monkeypatch.setattr(sweep_runs, "quantize", counted)
    path, manifest = sweep(asked)
    assert done == NAMES[{"Quantizing": 0, "Perplexity of gptq-w2-s0": 3, "Loading gptq-w3-s0": 5}[where] :]
    whole = read_manifest(swept)
    assert isinstance(whole, SweepManifest)
    assert manifest.results == whole.results
    for run in manifest.runs:
        assert shards(path / "runs" / run.name) == shards(swept / "runs" / run.name)
    verify(path)


def test_runs_at_a_time_give_what_they_give_in_turn(
    swept: Path, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, manifest = sweep(request(made, parallel=2, out=tmp_path / "s"))
    before = read_manifest(swept)
    assert isinstance(before, SweepManifest)
    measured = {"seconds", "peak_memory"}
    for run, other in zip(manifest.runs, before.runs, strict=True):
        assert run.model_dump(exclude=measured) == other.model_dump(exclude=measured)
        assert shards(out / "runs" / run.name) == shards(swept / "runs" / run.name)
    assert set(before.warnings) <= set(manifest.warnings)
    assert multiprocessing.active_children() == []
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of runs are copies of this one, instead of new ones that import everything."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(sweep_runs.multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("forking")
def test_a_process_that_is_ended_is_told_and_its_run_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(made, method=("gptq",), bits=(2,), parallel=2, out=tmp_path / "s")
    monkeypatch.setattr(sweep_runs, "_quantize", _ended)
    with pytest.raises(ResourceError, match="where memory is short") as caught:
        sweep(asked)
    assert "smaller `parallel`" in caught.value.hint
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    _, manifest = sweep(asked.model_copy(update={"parallel": 1}))
    assert [run.name for run in manifest.runs] == ["gptq-w2-s0", "gptq-w2-s1"]


def _ended(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("forking")
def test_a_stopped_sweep_goes_on_with_several_runs_at_a_time(made: Path, tmp_path: Path) -> None:
    """The second run is done, and nobody has seen it, when the first one's scores are broken off."""
    asked = request(made, method=("gptq",), bits=(2,), seeds=(0, 1, 2), parallel=2, out=tmp_path / "s")
    names = ["gptq-w2-s0", "gptq-w2-s1", "gptq-w2-s2"]
    with pytest.raises(KeyboardInterrupt):
        sweep(asked, StopAt(f"Loading {names[0]}"))
    folder = tmp_path / "s.partial" / "runs"
    if not (folder / names[1] / "manifest.json").exists():  # the other process was ended a moment too early
        quantize(next(run.request for run in expand(asked)[0] if run.name == names[1]), name=names[1], root=folder)
    out, manifest = sweep(asked)
    assert [run.name for run in manifest.runs] == names
    assert sorted(path.name for path in (out / "runs").iterdir()) == names


def test_as_many_runs_go_at_a_time_as_memory_holds(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(made, parallel=3, out=tmp_path / "s")
    peak = max(run.cost.peak_memory for run in plan(asked).runs)
    monkeypatch.setattr(sweep_runs.runtime, "available_memory", lambda: peak * 5 // 2 + LIBRARY_MEMORY)
    job = prepare(asked, Silent())
    told = Noting()
    assert sweep_runs._at_a_time(job, job.runs, told) == 2
    assert told.notes[-1].endswith("are free: 2 go.")


def test_as_many_runs_go_at_a_time_as_gpus_hold(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(request(made, parallel=4, out=tmp_path / "s"), Silent())
    cost = {"device_memory": 3 << 30}
    runs = [run.model_copy(update={"cost": run.cost.model_copy(update=cost)}) for run in job.plan.runs]
    planned = job.plan.model_copy(update={"runs": tuple(runs)})
    moved = dataclasses.replace(job, plan=planned, device=torch.device("cuda"))
    monkeypatch.setattr(sweep_runs.runtime, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(sweep_runs.runtime, "free_memory", lambda device: 4 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    told = Noting()
    assert sweep_runs._at_a_time(moved, moved.runs, told) == 3
    assert "of a GPU" in told.notes[-1]
    named = dataclasses.replace(moved, device=torch.device("cuda", 1))
    assert sweep_runs._at_a_time(named, named.runs, told) == 1


def test_a_run_that_was_stopped_goes_on_where_it_was(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(made, method=("gptq",), bits=(2,), seeds=(0,), out=tmp_path / "s")
    partial = tmp_path / "s.partial" / "runs" / "gptq-w2.partial"

    def stopping(*arguments: Any, **named: Any) -> Any:
        record = ArtifactWriter.record

        def recorded(self: Any, *words: Any, **more: Any) -> None:
            record(self, *words, **more)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ArtifactWriter, "record", recorded)
            return quantize(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_runs, "quantize", stopping)
        with pytest.raises(KeyboardInterrupt):
            sweep(asked)
    assert partial.is_dir()
    heard: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    manifest = sweep(asked, Listening())[1]
    assert any("1 of 3 blocks are done" in text for text in heard)
    assert [run.resumed for run in manifest.runs] == [True]


def test_a_run_whose_numbers_go_wrong_is_left_out_and_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(asked: QuantizeRequest, *arguments: Any, **named: Any) -> Any:
        if asked.bits == 2:
            raise NumericsError("The numbers went wrong.")
        return quantize(asked, *arguments, **named)

    monkeypatch.setattr(sweep_runs, "quantize", failing)
    path, manifest = sweep(
        request(made, method=("rtn",), samples=None, sequence_length=None, calibration=None, out=tmp_path / "s")
    )
    assert [run.name for run in manifest.runs] == ["rtn-w3"]
    assert manifest.left_out == {"rtn-w2": "The numbers went wrong."}
    assert "rtn-w2: The numbers went wrong." in (path / "report.html").read_text()


def test_runs_whose_scores_go_wrong_are_left_out_and_none_is_no_sweep(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measurer.Measurer.measure
    wrong = {"rtn-w2"}

    def failing(self: Any, candidate: Any, *arguments: Any, **named: Any) -> Any:
        if candidate.name in wrong:
            raise NumericsError("The logits went wrong.")
        return measure(self, candidate, *arguments, **named)

    monkeypatch.setattr(measurer.Measurer, "measure", failing)
    how: dict[str, Any] = {"method": ("rtn",), "samples": None, "sequence_length": None, "calibration": None}
    _, manifest = sweep(request(made, out=tmp_path / "s", **how))
    assert [run.name for run in manifest.runs] == ["rtn-w3"]
    assert manifest.left_out == {"rtn-w2": "The logits went wrong."}
    wrong.add("rtn-w3")
    with pytest.raises(NumericsError, match=r"No run of this sweep came to scores\. The logits went wrong\."):
        sweep(request(made, out=tmp_path / "none", **how))
    assert not (tmp_path / "none").exists()


def test_two_models_of_one_name_are_refused(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    given: dict[str, Any] = {"method": (), "bits": (), "settings": file}
    for listed in ("- {name: x, method: gptq}\n- {name: x-s0, method: rtn}", "- {name: base, method: rtn}"):
        file.write_text(listed)
        with pytest.raises(UsageError, match="Two models of this sweep would be called"):
            plan(request(made, samples=None, sequence_length=None, calibration=None, **given))


def test_samples_that_the_model_writes_are_written_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = samples.self_samples

    def counted(*arguments: Any, **named: Any) -> Any:
        written.append(named["seed"])
        return write(*arguments, **named)

    monkeypatch.setattr(samples, "self_samples", counted)
    asked = request(made, method=("gptq", "claq"), bits=(2,), calibration="self", options={}, out=tmp_path / "s")
    path, _ = sweep(asked)
    assert written == [0, 1]
    files = [load_file(path / "runs" / name / "calibration.safetensors") for name in ("gptq-w2-s1", "claq-w2-s1")]
    assert files[0]["tokens"].equal(files[1]["tokens"])


def test_the_page_shows_every_setting(swept: Path) -> None:
    page = (swept / "report.html").read_text()
    read = Page(page)
    for text in (
        "rtn-w2",
        "gptq-w3",
        "Perplexity, wikitext2 over bits",
        "Mean KL, nats over bits",
        "Which layers lose most",
    ):
        assert text in read.text
    assert "(seeds 0, 1); method gptq, bits 2" in page
    assert page.count('<td data-key="') == 4 * 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    # A baseline any higher would cut letters off.
    assert min(float(y) for y in re.findall(r'<text x="[^"]*" y="([^"]*)"', page)) >= 12


def run(setting: str, bits: float, seed: int = 0) -> SweepRun:
    return SweepRun(
        name=f"{setting}-s{seed}", setting=setting, seed=seed, options={}, method="gptq", scheme="w2", bits=bits,
        weights=1, size=1, seconds=1, peak_memory=1,
    )  # fmt: skip


def test_a_block_that_is_left_out_leaves_its_place() -> None:
    layers = [LayerRecord.model_construct(name=f"model.layers.{block}.x", error=0.5) for block in (0, 2, 2)]
    assert sweep_runs._errors(layers) == (0.5, 0.0, 0.5)
    one = run("a", 2.0).model_copy(update={"errors": sweep_runs._errors(layers)})
    shown = str(_blocks(by_setting([one], results(model_scores("a-s0", parent="full", perplexity=30.0)))))
    assert [f"block {number}:" in shown for number in range(3)] == [True, False, True]


def test_the_front_has_what_nothing_beats_with_as_few_bits() -> None:
    runs = [run("a", 2.0), run("a", 2.0, 1), run("b", 2.5), run("c", 3.0), run("d", 2.0)]
    values = {"a-s0": 30.0, "a-s1": 40.0, "b-s0": 36.0, "c-s0": 20.0, "d-s0": 34.0}
    models = [model_scores(name, parent="full", perplexity=value) for name, value in values.items()]
    points = by_setting(runs, results(*models))
    assert [point.value("perplexity, wikitext2") for point in points] == [35, 36, 20, 34]
    assert points[0].spread("perplexity, wikitext2") == (30, 40)
    assert [point.setting for point in front(points, "perplexity, wikitext2", -1)] == ["d", "c"]


def test_a_plan_tells_every_run(made: Path) -> None:
    told = plan(request(made))
    assert [one.name for one in told.runs] == NAMES
    assert told.runs[0].bits_per_weight == pytest.approx(2 + 16 / 32 + 2 / 32)
    assert all(one.cost.peak_memory > 0 for one in told.runs)


def test_the_command(made: Path, tmp_path: Path, ulbq: Any) -> None:
    words = (
        "sweep",
        made / "base",
        "-m",
        "rtn",
        "--bits",
        "2,3",
        "--set",
        "group_size=32",
        "--limit",
        "2",
        "--context",
        32,
    )
    words = (*words, "--data-dir", made / "mirror", "--device", "cpu", "--offline")
    told = ulbq(*words, "--dry-run", "--json")
    assert [one["name"] for one in json.loads(told.out)["runs"]] == ["rtn-w2", "rtn-w3"]
    told = ulbq(*words, "-o", tmp_path / "s")
    assert (told.code, told.out.strip()) == (0, str(tmp_path / "s"))
    assert "rtn-w3" in told.err
    assert "Report: " in told.err
    shown = ulbq("inspect", tmp_path / "s")
    assert (shown.code, "rtn-w3" in shown.out) == (0, True)


def test_the_parent_is_asked_once_and_says_what_it_says_to_eval(
    swept: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def load(source: ModelSource, devices: Any, **options: Any) -> Any:
        loads.append(source.name)
        return load_spread(source, devices, **options)

    monkeypatch.setattr(measurer, "load_spread", load)
    asked = request(made, method=("rtn",), samples=None, sequence_length=None, calibration=None, out=tmp_path / "s")
    path, manifest = sweep(asked)
    # For its perplexity, and for what it says of the text.
    assert loads.count("base") == 2
    alone = EvaluateRequest(
        sources=(str(path / "runs" / "rtn-w3"),), perplexity=("wikitext2",), fidelity=True, context=32, limit=2,
        dtype="fp32", device="cpu", offline=True, data_dir=made / "mirror", out=tmp_path / "e",
    )  # fmt: skip
    found = Results.model_validate(evaluate(alone)[1].results).models
    ours = Results.model_validate(manifest.results).models
    assert (found[1].fidelity, found[1].perplexity) == (ours[2].fidelity, ours[2].perplexity)
    assert found[0].perplexity == ours[0].perplexity
