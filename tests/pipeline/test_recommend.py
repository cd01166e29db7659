"""Recommendations for tiny models: sizes are exact, limits are kept, a sweep of the model itself counts first."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.evaluation.sample import write_mirror
from tests.models.tiny import save_tiny
from ulbq.artifacts import QuantizedManifest, read_manifest
from ulbq.config.quantize import QuantizeRequest
from ulbq.config.recommend import RecommendRequest
from ulbq.config.sweep import SweepRequest
from ulbq.errors import InputError, UsageError
from ulbq.pipeline import recommend as module
from ulbq.pipeline.evidence import Evidence, shipped, swept
from ulbq.pipeline.quantize import plan, quantize
from ulbq.pipeline.recommend import PROGRAM, Recommendation, recommend
from ulbq.pipeline.sweep import sweep

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def evidence(name: str, ratio: float, seconds: float | None = 60.0, **options: Any) -> Evidence:
    device = "cpu, 1 threads"
    return Evidence(
        name=name, options=options, model="big", weights=10**6, ratios=(ratio,), seconds=seconds, device=device
    )


TEXT = {"samples": 2, "sequence_length": 16}
SETTINGS = {
    "rtn-w2": {"method": "rtn", "bits": 2, "group_size": 32},
    "rtn-w4": {"method": "rtn", "bits": 4},
    "gptq-w3": {"method": "gptq", "bits": 3, "group_size": 16, **TEXT},
    "gptq-w4-symmetric": {"method": "gptq", "bits": 4, "group_size": 32, "symmetric": True, **TEXT},
    "db-llm": {"method": "db-llm", "group_size": 32, "epochs": 1, **TEXT},
    "apiq-r2": {"method": "apiq", "bits": 2, "rank": 2, "group_size": 32, "epochs": 1, **TEXT},
    "binary-mos": {"method": "binary-mos", "experts": 2, "epochs": 1, **TEXT},
    "claq": {"method": "claq", "bits": 2, **TEXT},
    "trellis": {"method": "trellis", "bits": 2, **TEXT},
    "tables": {"method": "rtn", "bits": 4, "group_size": 32, "embedding_bits": 8},
    "plan": {"method": "rtn", "bits": 2, "group_size": 32, "plan": "plan.yaml"},
}
TABLE = [
    evidence("rtn-w2", 9.0, 10, **SETTINGS["rtn-w2"]),
    evidence("rtn-w4", 1.4, 20, **SETTINGS["rtn-w4"]),
    evidence("gptq-w4-symmetric", 1.1, 3000, **SETTINGS["gptq-w4-symmetric"]),
    evidence("trellis", 1.05, None, **SETTINGS["trellis"]),
]


@pytest.fixture(autouse=True)
def _own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "shipped", lambda: TABLE)


def ask(source: Path, **limits: Any) -> Recommendation:
    return recommend(RecommendRequest(source=str(source), device="cpu", offline=True, **limits))[0]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_size_is_that_of_the_artifact(
    name: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "shipped", lambda: [evidence(name, 1.5, **SETTINGS[name])])
    save_tiny("llama", tmp_path / "base", tied=tied)
    (tmp_path / "plan.yaml").write_text("mlp.down_proj: {bits: 4, group_size: 64}\nlayers.1.self_attn: {skip: true}\n")
    (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i % 97}.\n\n" for i in range(800)))
    told = ask(tmp_path / "base", fit=1 << 33).best
    text = {"calibration": str(tmp_path / "text.txt")} if "samples" in told.options else {}
    request = QuantizeRequest(
        **{**told.options, **text}, source=str(tmp_path / "base"), device="cpu", offline=True, out=tmp_path / "q"
    )
    path, manifest = quantize(request)
    assert told.bits == pytest.approx(manifest.bits.bits_per_weight, abs=1e-9)
    stored = sum(manifest.bits.parts.values()) / 8
    assert told.weights == stored
    files = sum((path / file).stat().st_size for file in manifest.files if file.endswith(".safetensors"))
    assert files >= stored


def test_the_least_loss_within_the_limits_is_chosen(tiny_llama: Path) -> None:
    assert ask(tiny_llama, fit=1 << 33).best.name == "trellis"
    told = ask(tiny_llama, bits=4.4)
    assert [told.best.name, *(one.name for one in told.others)] == ["trellis", "rtn-w4", "rtn-w2"]
    assert told.limits == ("bits 4.40",)
    # Of the time of a setting that nobody timed nothing is known.
    assert ask(tiny_llama, max_time="1h").best.name == "gptq-w4-symmetric"
    assert ask(tiny_llama, max_time=9).best.name == "rtn-w4"


def test_an_engine_has_the_weights_packed(tiny_llama: Path) -> None:
    told = ask(tiny_llama, engine="vllm")
    assert (told.best.name, told.engine) == ("gptq-w4-symmetric", "vllm")
    assert told.best.served == pytest.approx(4.5, abs=0.1)
    assert ask(tiny_llama, engine="llama.cpp").best.options["method"] in ("gptq", "rtn")


def test_an_engine_that_takes_nothing_packed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shipped", lambda: [evidence("db-llm", 2.0, **SETTINGS["db-llm"])])
    with pytest.raises(InputError, match="Nothing that was measured runs packed in vLLM"):
        ask(tiny_llama, engine="vllm")


def test_what_would_be_the_least_is_told(tiny_llama: Path) -> None:
    with pytest.raises(UsageError) as refused:
        ask(tiny_llama, bits=1.5, fit=MIB)
    assert refused.value.message == "Nothing that was measured keeps `fit` 1.0 MiB, `bits` 1.50."
    assert "; `bits` takes at least 2." in refused.value.hint
    with pytest.raises(UsageError, match="keeps `max_time` 0 min"):
        ask(tiny_llama, max_time="1s")


@pytest.mark.parametrize(("limit", "tight"), [("fit", MIB), ("bits", 1.1), ("max_time", "1s")])
def test_the_least_that_the_hint_names_is_enough(
    limit: str, tight: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = evidence("rtn-w3", 2.0, method="rtn", bits=3, group_size=32)
    monkeypatch.setattr(module, "shipped", lambda: [slow])
    with pytest.raises(UsageError) as refused:
        ask(tiny_llama, **{limit: tight})
    least = refused.value.hint.split("takes at least ")[1].split(" (")[0]
    assert ask(tiny_llama, **{limit: least}).best.name == "rtn-w3"


def test_where_it_runs_counts_cache_and_program(tiny_llama: Path) -> None:
    short, long = (ask(tiny_llama, bits=8, context=context).best for context in (100, 200))
    # 3 blocks, keys and values, 2 heads of 16 values each, 2 bytes.
    assert long.running - short.running == 100 * 3 * 2 * 2 * 16 * 2
    assert short.running == short.weights + 100 * 3 * 2 * 2 * 16 * 2 + PROGRAM


def test_without_a_limit_the_memory_of_the_machine_is_one(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.runtime, "available_memory", lambda: 1 << 33)
    assert ask(tiny_llama).limits == ("fit 8.00 GiB",)


def test_a_setting_that_the_model_has_no_place_for_is_passed_over(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = evidence("odd", 1.0, method="rtn", bits=4, group_size=48)
    long = evidence("long", 1.01, method="gptq", bits=4, samples=2, sequence_length=900_000)
    monkeypatch.setattr(module, "shipped", lambda: [odd, long, *TABLE])
    assert ask(tiny_llama, bits=8).best.name == "trellis"


def test_a_sweep_of_the_model_counts_before_the_table(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "base", tied=False)
    write_mirror(tmp_path / "mirror")
    sweep(
        SweepRequest(
            source=str(tmp_path / "base"), method=("rtn",), bits=(2, 4), options={"group_size": 32}, context=32,
            limit=2, dtype="fp32", device="cpu", offline=True, data_dir=tmp_path / "mirror",
            out=tmp_path / "artifacts" / "s",
        )
    )  # fmt: skip
    (two, four) = swept(tmp_path / "artifacts")
    assert (two.name, two.options, two.model) == ("rtn-w2", {"group_size": 32, "method": "rtn", "bits": 2}, "base")
    told = ask(tmp_path / "base", bits=2.6)
    assert {one.name: one.sure for one in (told.best, *told.others)} == {
        "trellis": "another model",
        "rtn-w2": "this model",
    }
    assert next(one for one in told.others if one.name == "rtn-w2").ratio == pytest.approx(two.ratio)
    assert four.weights == two.weights > 0


def test_the_table_is_sure_of_the_model_that_it_was_measured_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = plan(QuantizeRequest(source=str(tiny_llama), method="rtn", device="cpu", offline=True)).weights
    own = TABLE[0].model_copy(update={"model": tiny_llama.name, "weights": weights})
    other = TABLE[1].model_copy(update={"model": tiny_llama.name})
    monkeypatch.setattr(module, "shipped", lambda: [own, other])
    told = ask(tiny_llama, bits=8)
    assert (told.best.sure, told.others[0].sure) == ("another model", "this model")


def test_the_command_says_what_the_request_does(tiny_llama: Path) -> None:
    limits = {"bits": 8.0, "device": "cpu", "offline": True}
    told, asked = recommend(RecommendRequest(source=str(tiny_llama), engine="vllm", **limits))
    words = shlex.split(told.best.command)
    assert words[:3] == ["ulbq", "quantize", str(tiny_llama)]
    assert {"--symmetric", "--method", "gptq", "--samples"} <= set(words)
    assert (asked.method, asked.symmetric, asked.samples) == ("gptq", True, 2)


def test_the_command_line(tiny_llama: Path, tmp_path: Path, ulbq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = (tiny_llama, "--bits", "4.6", "--device", "cpu", "--offline")
    monkeypatch.setattr(module, "shipped", lambda: TABLE[:2])
    told = ulbq("recommend", *place)
    assert (told.code, told.out.strip()) == (
        0,
        f"ulbq quantize {tiny_llama} --method rtn --device cpu --offline --bits 4",
    )
    told = ulbq("recommend", tiny_llama, "--bits", "4.6", "-o", tmp_path / "there")
    assert told.out.strip().endswith(f"--output {tmp_path / 'there'} --bits 4")
    assert "perplexity 1.40 times the full-precision model's (1.26 to 1.54)" in told.err
    assert json.loads(ulbq("recommend", *place, "--json").out)["best"]["name"] == "rtn-w4"
    told = ulbq("recommend", *place, "--run", "-o", tmp_path / "q")
    assert (told.code, told.out.strip()) == (0, str(tmp_path / "q"))
    told = ulbq("recommend", *place, "--run", "--json", "-o", tmp_path / "q2")
    assert json.loads(told.out)["kind"] == "quantized"
    assert isinstance(read_manifest(tmp_path / "q"), QuantizedManifest)
    told = ulbq("recommend", tiny_llama, "--fit", "1MB", "--device", "cpu")
    assert (told.code, "--fit takes at least" in told.err) == (2, True)


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("1.5h", 5400), ("45 min", 2700), ("30", 30)])
def test_times(text: str, seconds: float) -> None:
    assert RecommendRequest(max_time=text).max_time == seconds  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["soon", "-1h", "0", "1y"])
def test_no_times(text: str) -> None:
    with pytest.raises((UsageError, ValidationError)):
        RecommendRequest(max_time=text)  # type: ignore[arg-type]


def test_the_shipped_table_is_up_to_date_and_every_setting_of_it_is_one() -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "measured.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    table = shipped()
    assert len(table) > 30
    for one in table:
        QuantizeRequest.model_validate(one.options)
        assert all(math.isfinite(ratio) and ratio >= 1 for ratio in one.ratios)
