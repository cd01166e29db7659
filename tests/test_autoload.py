"""An installed ulbq is known to every transformers; where it is not known, its artifacts fail to load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny
from tests.pipeline.runs import request
from tests.wheel import unpack_wheel
from ulbq.artifacts.shards import GUARD_NAME, LazyTensors
from ulbq.pipeline.quantize import quantize

# Without the tree that the tests run in: what finds it is an editable install, or the folder that they run in.
_STRANGER = """
import json, site, sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
for folder in sys.argv[1].split(";"):
    site.addsitedir(folder)
"""
_LIGHT = f"{_STRANGER}\nprint(json.dumps(sorted(sys.modules)))"
_LOADS = f"""{_STRANGER}
from transformers import AutoModelForCausalLM
found = []
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        found.append(type(layer).__name__)
        if "llama" in folder:
            model.save_pretrained(folder + "-again")
    except Exception as error:
        found.append(type(error).__name__)
print(json.dumps(found))
"""


def _run(program: str, *arguments: Path | str, cwd: Path, **environment: str) -> list[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with what pip would install."""
    return unpack_wheel(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    return [
        quantize(request(save_tiny(family, folder / "dense" / family), folder / family, method="rtn", group_size=32))[0]
        for family in ("llama", "mixtral")
    ]


def test_every_python_imports_next_to_nothing(installed: Path, tmp_path: Path) -> None:
    loaded = _run(_LIGHT, installed, cwd=tmp_path)
    assert {name for name in loaded if name.startswith("ulbq")} == {"ulbq", "ulbq.import_hook"}
    assert not {"torch", "transformers", "pydantic", "typing"}.intersection(loaded)
    assert not [name for name in _run(_LIGHT, installed, cwd=tmp_path, ULBQ_AUTOLOAD="0") if name.startswith("ulbq")]


def test_transformers_loads_packed_or_not_at_all(installed: Path, artifacts: list[Path], tmp_path: Path) -> None:
    assert _run(_LOADS, installed, *artifacts, cwd=tmp_path) == ["QuantLinear"] * 2
    # What transformers saved is guarded like what we wrote.
    folders = [*artifacts, Path(f"{artifacts[0]}-again")]
    assert _run(_LOADS, installed, *folders, cwd=tmp_path, ULBQ_AUTOLOAD="0") == ["RuntimeError"] * 3


def test_a_transformers_that_is_not_ours_stays_usable(installed: Path, tmp_path: Path) -> None:
    program = f"""{_STRANGER}
import sys, warnings
sys.modules["ulbq.models.hf"] = None  # what an import finds that fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto as auto
print(json.dumps(["ulbq" in auto.AUTO_QUANTIZER_MAPPING, *(str(one.message)[:31] for one in caught)]))
"""
    assert _run(program, installed, cwd=tmp_path) == [False, "ulbq cannot tell transformers of"[:31]]


def test_the_guard_is_no_tensor_of_the_model(artifacts: list[Path]) -> None:
    for folder in artifacts:
        (guard,) = LazyTensors([folder / GUARD_NAME]).names
        stored = LazyTensors.folder(folder)
        assert guard in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert guard in stored.guards
        assert guard not in stored.names
        assert ".experts." not in guard
