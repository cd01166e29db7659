"""What a new user trips over: words, choices and reports."""

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from tests.models.tiny import tiny_config, tiny_model
from tests.models.tiny_gguf import write_tiny_gguf
from tests.strangers.conftest import reseal
from tests.told import Ulbq
from ulbq.export.card import scores
from ulbq.models.gguf import GgufTensors
from ulbq.models.gguf_header import StoredTensor
from ulbq.models.source import resolve
from ulbq.pipeline.warned import gathered


def test_a_method_misspelt(dense: Path, ulbq: Ulbq) -> None:
    told = ulbq("quantize", dense, "--method", "gtpq")
    told.refused(2)
    assert "Did you mean gptq?" in told.err


def test_a_method_misspelt_in_a_recipe(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("options: {method: gtpq}")
    assert "gtpq" in ulbq("quantize", dense, "--recipe", tmp_path / "r.yaml").refused(2)


def test_fractional_bits_name_the_option_for_them(dense: Path, ulbq: Ulbq) -> None:
    told = ulbq("quantize", dense, "--bits", "2.5")
    assert "whole number" in told.refused(2)
    assert "--target-bits 2.5" in told.err
    assert "'two'" in ulbq("quantize", dense, "--bits", "two").refused(2)


@pytest.mark.parametrize(("name", "reason"), [("gpu", "no device of that name"), ("cuda:99", "CUDA")])
def test_a_device_has_its_reason(name: str, reason: str, packed: Path, ulbq: Ulbq) -> None:
    told = ulbq("generate", packed, "-p", "hi", "--device", name)
    assert reason in told.refused(4)
    assert "cuda:N" in told.err


def test_a_help_page_has_no_python_types(ulbq: Ulbq) -> None:
    for command in ("eval", "quantize", "inspect", "generate", "convert", "finetune", "saliency"):
        page = ulbq(command, "--help").out
        assert "<list" not in page
        assert "<str>" not in page


def test_reports_are_the_output(packed: Path, ulbq: Ulbq) -> None:
    told = ulbq("inspect", packed, "--layers")
    assert told.err == ""
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.2.mlp.{name}" in told.out
    assert ulbq("inspect", packed, "-q").out == f"{packed}\n"
    assert json.loads(ulbq("inspect", packed, "--json").out)["kind"] == "quantized"


def test_layers_are_told_apart_in_a_narrow_terminal(packed: Path, ulbq: Ulbq) -> None:
    import io

    from ulbq.commands.inspection import show
    from ulbq.commands.printing import PrintableConsole
    from ulbq.pipeline.inspect import inspect

    console = PrintableConsole(file=io.StringIO(), width=60)
    show(console, inspect(packed), layers=True)
    shown = "".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "…" not in shown
    assert all(name in shown for name in ("gate_proj", "up_proj", "down_proj"))


def evaluated(packed: Path, ulbq: Ulbq, out: Path, mirror: Path, *more: object) -> Path:
    told = ulbq("eval", packed, "--data-dir", mirror, "--device", "cpu", "-o", out, "-q", *more)
    assert told.code == 0, told.err
    return out


def test_an_evaluation_is_shown_as_a_table_and_cards_say_on_how_much(packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    from tests.evaluation.sample import write_mirror

    mirror = write_mirror(tmp_path / "mirror")
    first = evaluated(packed, ulbq, tmp_path / "e1", mirror, "--perplexity", "wikitext2", "--context", 64,
                      "--limit", 2, "--no-parent-scores", "--no-fidelity")  # fmt: skip
    evaluated(packed, ulbq, tmp_path / "e2", mirror, "--tasks", "gsm8k-cot", "--limit", 2, "--max-new-tokens", 4)
    told = ulbq("inspect", first)
    assert "wikitext2 ↓" in told.out
    assert "models[0]" not in told.out
    found = scores(resolve(packed), [tmp_path])
    assert "(2 windows of 64 tokens)" in found["perplexity, wikitext2"].shown
    assert any("(2 documents)" in score.shown for score in found.values())


def test_an_adapter_says_what_it_is_for_where_no_hub_is_asked(adapted: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    told = ulbq("convert", adapted, "--to", "dense", "-o", tmp_path / "c", "-q")
    assert told.code == 0, told.err
    described = json.loads((tmp_path / "c" / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tmp_path / "c")


def test_a_gguf_file_says_what_it_is(tmp_path: Path) -> None:
    from ulbq.evaluation.evaluated import open_candidates
    from ulbq.evaluation.table import describe

    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(tiny_model(tiny_config("llama")), path)
    subject = open_candidates([str(path)])[0].subject
    assert describe(subject) == "GGUF Q8_0"
    assert subject.bits_per_weight is not None
    assert 8.5 < subject.bits_per_weight < 16  # its embeddings are in full precision
    tensors = resolve(path).tensors
    assert isinstance(tensors, GgufTensors)
    # 32 weights in 20 bytes, one matrix of three in float16 of its size.
    packed = StoredTensor(GGMLQuantizationType.Q4_1, (8, 32), 0)
    tensors._header.tensors = {"a": packed, "b": packed, "c": StoredTensor(GGMLQuantizationType.F16, (8, 32), 0)}
    assert tensors.stored_as == ("GGUF Q4_1", pytest.approx((5 + 5 + 16) / 3))


def test_a_plan_says_that_a_gguf_file_was_quantized_before(tmp_path: Path, ulbq: Ulbq) -> None:
    path = write_tiny_gguf(tiny_model(tiny_config("llama")), tmp_path / "tiny.gguf")
    for rotate in ((), ("--rotate",)):
        told = ulbq("quantize", path, "--method", "rtn", "--group-size", "32", "--dry-run", *rotate)
        assert told.code == 0, told.err
        assert "stored as GGUF Q8_0 (" in told.err


def test_warnings_come_once_with_their_list() -> None:
    few = ("q_proj, k_proj", "too few tokens.")
    assert gathered({0: [few], 1: [few, ("", "diverged.")], 2: [few], 5: [few]}) == [
        "Blocks 0 to 2 and 5, q_proj, k_proj: too few tokens.",
        "Block 1: diverged.",
    ]
    assert gathered({}) == []


def test_warnings_stand_in_manifest_report_and_card(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)))
    told = ulbq("quantize", dense, "--method", "gptq", "--samples", 1, "--sequence-length", 8, "--calibration",
                tmp_path / "text.txt", "-o", tmp_path / "q", "-q")  # fmt: skip
    assert told.code == 0, told.err
    warned = json.loads((tmp_path / "q" / "manifest.json").read_text())["warnings"]
    assert warned
    assert len(warned) == told.err.count("warning: ") == len(set(warned))
    assert any("Blocks 0 to 2" in text for text in warned)
    assert "Warning: Blocks 0 to 2" in (tmp_path / "q" / "README.md").read_text()
    assert "Blocks 0 to 2" in " ".join(ulbq("inspect", tmp_path / "q").out.split())


def test_manifests_without_warnings_are_read(packed: Path, ulbq: Ulbq) -> None:
    reseal(packed, lambda manifest: manifest.pop("warnings", None))
    assert ulbq("inspect", packed, "-q").code == 0
