"""What ``import ulbq`` does: nothing heavy, until transformers is there to be told."""

import subprocess
import sys

import pytest

from ulbq.import_hook import after_import

_REGISTERED = "'ulbq' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING"


def _run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", f"import sys; {program}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_ulbq_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'safetensors', 'peft'}"
    assert _run(f"import ulbq; print(sorted(sys.modules.keys() & {heavy}))") == "[]"


# As where nothing is installed but the command line's own needs.
_HELP = """
import sys

sys.modules |= dict.fromkeys(
    ("torch", "transformers", "datasets", "peft", "safetensors", "numpy", "yaml", "markupsafe", "jinja2")
)
from typer.main import get_command

from ulbq.commands.app import app, main

for name in get_command(app).commands:
    sys.argv = ["ulbq", name, "--help"]
    assert not main(), name
"""


def test_the_help_of_no_command_imports_a_library():
    shown = _run(_HELP)
    assert shown.count("Usage: ulbq ") > 10


@pytest.mark.parametrize(
    "program",
    [
        "import ulbq; from transformers import AutoModelForCausalLM",
        "from transformers import LlamaForCausalLM; import ulbq",
        "import ulbq, transformers.modeling_utils",
    ],
    ids=["ulbq first", "transformers first", "inside transformers"],
)
def test_transformers_learns_of_the_format_in_any_order(program: str) -> None:
    assert _run(f"{program}; import transformers; print({_REGISTERED})") == "True"


def test_the_action_runs_once_and_after_the_module(tmp_path, monkeypatch) -> None:
    (tmp_path / "late_module.py").write_text("import inspect\nvalue = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_module", raising=False)
    seen: list[int] = []
    finders = list(sys.meta_path)
    after_import("late_module", lambda: seen.append(sys.modules["late_module"].value))
    import json  # what is imported meanwhile is none of its business

    assert json
    assert seen == []
    import late_module

    assert seen == [1]
    assert sys.meta_path == finders
    assert late_module.__spec__.loader.get_source("late_module").startswith("import inspect")
    after_import("late_module", lambda: seen.append(2))
    assert seen == [1, 2]
    monkeypatch.delitem(sys.modules, "late_module")


def test_what_the_action_raises_the_import_raises(tmp_path, monkeypatch) -> None:
    (tmp_path / "bad_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    after_import("bad_module", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        __import__("bad_module")
    assert "bad_module" not in sys.modules
