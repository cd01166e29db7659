import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.artifacts.sample import SCHEME, parent_of, quantized, write_artifact
from tests.evaluation.sample import model_scores, results
from tests.models.tiny import save_tiny
from ulbq.artifacts import (
    BitsReport,
    BlockRecord,
    ConvertedManifest,
    EvaluationManifest,
    LayerRecord,
    Manifest,
    Parent,
    read_manifest,
)
from ulbq.artifacts.records import ExpertsRecord, RotationRecord
from ulbq.commands.app import main
from ulbq.commands.inspection import scheme, show, size
from ulbq.evaluation.results import ModelScores
from ulbq.kernels import build
from ulbq.models.adapter_files import ADAPTER_FOLDER
from ulbq.pipeline.inspect import inspect
from ulbq.pipeline.kernels import writers
from ulbq.runtime import PhaseRecord

SEEN = ((700, 1200, 300, 900), (0, 0, 800, 100))
"""Tokens that the experts of two mixtures saw."""

COMMON: dict[str, Any] = {"name": "x", "request": {}, "seed": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def _no_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)


def written(manifest: Manifest, *, layers: bool = False) -> str:
    """What a person sees of an artifact with this manifest."""
    console = Console(file=io.StringIO(), width=120)
    show(console, inspect(write_artifact(Path("q"), manifest)), layers=layers)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def evaluation(*models: ModelScores, **changes: Any) -> EvaluationManifest:
    """An evaluation of these models."""
    return EvaluationManifest(**COMMON, results=results(*models).model_dump(mode="json"), **changes)


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of every line that begins with ``first``."""
    return [line.split() for line in text.splitlines() if line.startswith(first)]


class TestCommand:
    def test_the_report_is_the_output_and_quietly_it_is_the_path(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_artifact(Path("q"))
        assert main(["inspect", "q"]) == 0
        output = capsys.readouterr()
        assert "quantized weights" in output.out
        assert output.err == ""
        assert main(["inspect", "q", "--quiet"]) == 0
        assert capsys.readouterr().out == "q\n"

    def test_kernels_are_told_with_what_they_do_not_take(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ulbq.kernels.build.cpu_features", frozenset)
        for function in (build.library, build.unavailable_reason, build._load):
            function.cache_clear()
        write_artifact(Path("q"))
        assert main(["inspect", "q", "--kernels"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for function in (build.library, build.unavailable_reason, build._load):
            function.cache_clear()
        assert "tiles this processor has no avx512_vnni" in shown
        assert "dense yes slabs of dense weights" in shown
        assert "× w2g64 bfloat16" in shown
        # No model: an artifact made up for tests.
        assert "a text is written by here nothing" in shown

    def test_what_writes_a_text_is_told(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        save_tiny("llama", tmp_path / "base")
        made = ["quantize", str(tmp_path / "base"), "--method", "rtn", "--bits", "2", "--group-size", "32", "-o", "q"]
        assert main([*made, "--quiet", "--device", "cpu"]) == 0
        capsys.readouterr()
        assert main(["inspect", "q", "--kernels"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        here = build.unavailable_reason()
        assert f"compiled {here or 'yes'} cuda graph on cpu: CUDA GPUs transformers {'yes' if here else 'not'}" in shown
        # Of an adapter its folder is looked at.
        (Path("q") / ADAPTER_FOLDER).mkdir()
        assert writers("q", torch.device("cpu"))["compiled"] == (here or "an adapter: none, as of `adapter=false`")

    def test_json_is_the_manifest(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_artifact(Path("q"))
        assert main(["inspect", "q", "--json", "--quiet"]) == 0
        output = capsys.readouterr()
        assert json.loads(output.out) == json.loads(Path("q/manifest.json").read_text())
        assert output.err == ""

    def test_the_newest_artifact_of_any_kind_is_the_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_artifact(Path("artifacts/old"))
        write_artifact(Path("artifacts/new"), evaluation())
        assert main(["inspect", "--quiet"]) == 0
        assert capsys.readouterr().out == "artifacts/new\n"

    def test_a_damaged_artifact_ends_with_three_and_no_path(self, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_artifact(Path("q"))
        (path / "model.safetensors").write_bytes(b"WEIGHTS")
        assert main(["inspect", "q"]) == 0
        capsys.readouterr()
        assert main(["inspect", "q", "--verify"]) == 3
        output = capsys.readouterr()
        assert output.out == ""
        assert "error: 'q/model.safetensors' was changed after the artifact was written" in output.err
        assert "hint: " in output.err


class TestTables:
    def test_every_part_that_takes_bits_has_its_line(self) -> None:
        text = written(quantized())
        assert rows(text, "codes") == [["codes", "2.0000", "1.0", "kB"]]
        assert rows(text, "scales") == [["scales", "0.2500", "128", "B"]]
        assert rows(text, "zeros") == [["zeros", "0.0312", "16", "B"]]
        assert rows(text, "adapter") == []
        assert rows(text, "4,096") == [["4,096", "quantized", "weights", "2.2812", "1.2", "kB"]]
        assert rows(text, "embeddings") == [["embeddings", "2.4412", "1.2", "kB"]]
        assert rows(text, "all files") == [["all", "files", *size(inspect(Path("q")).total_size).split()]]

    def test_parts_that_later_formats_bring_are_counted(self) -> None:
        text = written(quantized(bits=BitsReport(parts={"codebooks": 4096, "codes": 8192}, weights=4096)))
        assert rows(text, "codebooks") == [["codebooks", "1.0000", "512", "B"]]
        assert rows(text, "4,096")[0][3] == "3.0000"

    def test_blocks_show_their_errors_and_what_went_wrong(self) -> None:
        blocks = (
            BlockRecord(index=0, start_error=2.0, end_error=0.5, steps=80, seconds=12.0),
            BlockRecord(index=1, start_error=0.0, end_error=0.0, steps=0, retries=2, fallback=True, seconds=75.0),
        )
        text = written(quantized(blocks=blocks))
        assert rows(text, "0 ") == [["0", "2", "0.5", "-75.0%", "80", "0", "12", "s"]]
        assert rows(text, "1 ") == [["1", "0", "0", "0", "2", "1:15", "kept", "the", "closed-form", "start"]]

    def test_layers_are_summed_up_unless_asked_for(self) -> None:
        layers = tuple(
            LayerRecord(name=f"experts[a].{i}", shape=(64, 64), scheme=SCHEME, bits={"codes": 8192}, error=0.1 * i)
            for i in range(3)
        )
        text = written(quantized(layers=layers))
        assert rows(text, "most") == [["most", "20.000%", "experts[a].2"]]
        assert rows(text, "experts") == []
        console = Console(file=io.StringIO(), width=120)
        show(console, inspect(Path("q")), layers=True)
        assert isinstance(console.file, io.StringIO)
        listed = rows(console.file.getvalue(), "experts")
        assert listed[1] == ["experts[a].1", "64", "×", "64", "2.0000", "10.000%"]

    def test_sparsity_is_shown_where_a_format_has_it(self) -> None:
        assert rows(written(quantized(), layers=True), "model.layers.0")[0][-2:] == ["50%,", "25%"]

    def test_columns_of_different_widths_are_listed_and_summed_up(self) -> None:
        schemes = (
            {"format": "codebook", "bits": 2, "widths": {"2": 60, "4": 4}, "outliers": 30},
            {"format": "codebook", "bits": 2, "widths": {2: 64}, "outliers": 2},
        )
        layers = tuple(
            LayerRecord(name=f"layer.{i}", shape=(64, 64), scheme=scheme, bits={"codes": 8192}, error=0.1)
            for i, scheme in enumerate(schemes)
        )
        parts = BitsReport(parts={"codes": 8704, "codebooks": 2048, "columns": 64, "outliers": 512}, weights=4096)
        overall = {"format": "codebook", "bits": 2, "widths": {}, "outliers": 0}
        text = written(quantized(layers=layers, bits=parts, scheme=overall))
        assert rows(text, "format") == [["format", "codebook,", "bits", "2"]]
        assert rows(text, "columns") == [
            ["columns", "0.0156", "8", "B"],
            ["columns", "96.88%", "at", "2", "bits,", "3.12%", "at", "4", "bits"],
        ]
        assert rows(text, "outliers")[1] == ["outliers", "32,", "0.391%", "of", "the", "weights"]
        assert rows(text, "zeros") == rows(text, "scales") == []
        console = Console(file=io.StringIO(), width=120)
        show(console, inspect(Path("q")), layers=True)
        assert isinstance(console.file, io.StringIO)
        listed = rows(console.file.getvalue(), "layer.")
        assert [cells[-3:] for cells in listed] == [["2×60", "4×4", "30"], ["10.000%", "2×64", "2"]]

    def test_a_rotation_is_told(self) -> None:
        turned = RotationRecord(seed=3, residual="Hadamard 576 = 12·12·4", values="Hadamard 64 a head")
        [row] = rows(written(quantized(rotation=turned)), "rotation")
        assert " ".join(row[1:]) == "residual stream (Hadamard 576 = 12·12·4), values (Hadamard 64 a head), seed 3"

    def test_experts_are_counted_and_those_that_saw_nothing_told(self) -> None:
        mixtures = [ExpertsRecord(name=f"model.layers.{i}.mlp.experts", tokens=tokens) for i, tokens in enumerate(SEEN)]
        text = " ".join(written(quantized(experts=tuple(mixtures))).split())
        assert "4 in each of 2 mixtures; 0 to 1,200 tokens of the calibration went to one, 500 on average" in text
        assert "In 'model.layers.1.mlp.experts' 2 of 4 experts saw no token of the calibration" in text

    def test_an_artifact_without_layers_or_blocks(self) -> None:
        text = written(quantized(layers=(), blocks=(), skipped=(), phases=()))
        assert "Blocks" not in text
        assert "In full precision" not in text

    def test_facts(self) -> None:
        calibration = {"name": "wikitext2", "samples": 32, "sequence_length": 512, "sha256": "0"}
        phases = (PhaseRecord(name="blocks", seconds=523, peak_memory=1_700_000_000),)
        text = written(quantized(calibration=calibration, phases=phases, created="2026-03-01T10:11:12.000000Z"))
        assert "wikitext2, 32 × 512 tokens, seed 0" in text
        assert "affine, bits 2, group size 64" in text
        assert "2026-03-01 10:11:12 UTC" in text
        assert "lm_head" in text
        assert rows(text, "blocks") == [["blocks", "8:43", "1.7", "GB"]]

    def test_other_kinds_show_what_they_have(self) -> None:
        found = rows(written(evaluation(model_scores("one", perplexity=71.0234567))), "  wikitext2")
        assert found == [["wikitext2", "↓", "71.02"]]
        Path("q").rename("e")
        assert "dense, bfloat16" in written(ConvertedManifest(**COMMON, target="dense", dtype="bfloat16"))

    def test_results_of_another_shape_are_shown_number_by_number(self) -> None:
        assert "models" in written(EvaluationManifest(**COMMON, results={"models": 3}))

    def test_ancestry_is_a_tree_with_the_state_of_each(self) -> None:
        gguf = Parent(kind="gguf", name="SmolLM2", path="/nowhere/smol.gguf", sha256="0")
        path = write_artifact(Path("parent"), quantized(name="parent", parents=(gguf,)))
        middle = parent_of(path, read_manifest(path))
        hub = Parent(kind="hub", name="tiny", path="nobody/tiny", sha256="0")
        text = written(evaluation(parents=(middle, hub)))
        tree = [line.rstrip() for line in text[text.index("Ancestry") :].splitlines()]
        assert tree[1] == "x"
        assert tree[2].startswith("├── parent (quantized, 20")
        assert tree[2].endswith("as recorded")
        assert tree[3] == "│   └── SmolLM2 (gguf) /nowhere/smol.gguf  missing"
        assert tree[4] == "└── tiny (hub) nobody/tiny  not checked"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (88_512_000, "88.5 MB"),
        (999_960_000, "1.0 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


def test_scheme() -> None:
    assert scheme({"format": "affine", "bits": 2, "group_size": 64, "symmetric": True}) == (
        "affine, bits 2, group size 64, symmetric"
    )
    assert scheme({**SCHEME, "symmetric": False}) == "affine, bits 2, group size 64"
    columns = {"format": "codebook", "bits": 2, "widths": {"2": 541, "4": 35}, "outliers": 9}
    assert scheme(columns) == "codebook, bits 2, widths 2×541 4×35, outliers 9"
