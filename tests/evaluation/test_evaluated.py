import shutil
from pathlib import Path

import pytest

from tests.artifacts.sample import edit
from tests.models.tiny import save_tiny
from ulbq.artifacts import QuantizedManifest
from ulbq.artifacts.records import FinetuneRecord
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import InputError
from ulbq.evaluation.evaluated import open_candidates
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize
from ulbq.progress import Silent


class Listening(Silent):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def make() -> None:
    save_tiny("llama", Path("base"), tied=False)
    quantize(QuantizeRequest(source="base", method="rtn", bits=4, group_size=32, out=Path("q")))
    convert(ConvertRequest(source="q", out=Path("dense")))


@pytest.fixture
def folder(tmp_path, monkeypatch, made_once) -> Path:
    """Working folder with a model ``base``, a quantized ``q`` made from it, and its dense conversion ``dense``."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made_once(make), tmp_path, dirs_exist_ok=True)


def test_finds_the_full_precision_parent_behind_every_generation(folder):
    q, dense = open_candidates(["q", "dense"])
    assert q.parent is not None
    assert q.parent.name == "base"
    assert q.parent is dense.parent
    assert (q.subject.kind, q.subject.method, q.subject.scheme) == ("quantized", "rtn", "w4g32")
    assert isinstance(q.source.manifest, QuantizedManifest)
    assert q.subject.bits_per_weight == q.source.manifest.bits.bits_per_weight
    assert (dense.subject.kind, dense.subject.parent) == ("converted", "base")


def test_a_full_precision_model_has_no_parent(folder):
    (base,) = open_candidates(["base"])
    assert base.parent is None
    assert (base.subject.kind, base.subject.bits_per_weight) == ("model", None)


def test_a_parent_among_the_sources_is_the_same_candidate(folder):
    q, base = open_candidates(["q", "base"])
    assert q.parent is base


def test_a_source_named_twice_is_measured_once(folder):
    assert [one.name for one in open_candidates(["q", "./q", "q"])] == ["q"]


def test_equal_names_become_paths(folder):
    save_tiny("llama", folder / "other/base", tied=False, seed=1)
    assert [one.name for one in open_candidates(["base", "other/base"])] == ["base", "other/base"]
    assert [one.parent.name for one in open_candidates(["q", "other/base"]) if one.parent] == ["base"]


def test_a_parent_that_is_gone_is_told_and_done_without(folder):
    (folder / "base").rename(folder / "elsewhere")
    told = Listening()
    (q,) = open_candidates(["q"], progress=told)
    assert q.parent is None
    assert "'q' was made from 'base'" in told.notes[0]
    assert "not there any more" in told.notes[0]


def test_a_parent_that_changed_is_warned_about(folder):
    save_tiny("llama", folder / "base", tied=False, seed=7)
    told = Listening()
    (q,) = open_candidates(["q"], progress=told)
    assert q.parent is not None
    assert "'base' has changed since 'q'" in told.warnings[0]


def test_a_named_parent_is_everybodys(folder):
    (folder / "base").rename(folder / "elsewhere")
    told = Listening()
    q, dense = open_candidates(["q", "dense"], parent="elsewhere", progress=told)
    assert q.parent is dense.parent
    assert q.parent is not None
    assert q.parent.name == "elsewhere"
    assert told.notes == []


def test_a_named_parent_must_exist(folder):
    with pytest.raises(InputError, match=r"no file or folder '\./nowhere'"):
        open_candidates(["q"], parent="./nowhere")


@pytest.mark.parametrize(("taught", "asked"), [("gsm8k", "gsm8k"), ("chat", "chat"), (None, "alpaca")])
def test_a_fine_tuned_model_is_asked_as_it_was_taught(folder, taught, asked):
    assert [one.template for one in open_candidates(["q", "dense"])] == ["alpaca", "alpaca"]
    record = FinetuneRecord(
        task="gsm8k",
        template=taught,
        data={},
        train="adapter",
        start="fresh",
        parameters=1,
        epochs=1,
        steps=1,
        start_loss=2.0,
        end_loss=1.0,
        losses=(),
        evaluations=(),
        seconds=1.0,
    )
    edit(Path("q"), lambda data: data.update(finetune=record.model_dump(mode="json")), reseal=True)
    convert(ConvertRequest(source="q", out=Path("tuned")))
    assert [one.template for one in open_candidates(["q", "tuned"])] == [asked, asked]


def test_a_converted_model_whose_artifact_is_gone_is_asked_as_any_other(folder):
    (dense,) = open_candidates(["dense"])
    shutil.rmtree("q")
    assert dense.template == "alpaca"
