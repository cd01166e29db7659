"""What the shell that starts pytest says about terminals must not reach these tests."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny
from ulbq.config.quantize import QuantizeRequest
from ulbq.pipeline.quantize import quantize


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)


def _quantize(bits: int) -> None:
    save_tiny("llama", Path("base"), tied=False)
    given = {"source": "base", "method": "rtn", "bits": bits, "group_size": 32}
    quantize(QuantizeRequest(**given, out=Path("artifacts/q")))


@pytest.fixture
def working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_once: Callable[..., Path]
) -> Callable[[int], Path]:
    """Goes into a folder with ``base`` and ``artifacts/q`` of so many bits; there is no standard input."""

    def enter(bits: int) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", None)
        return shutil.copytree(made_once(_quantize, bits), tmp_path, dirs_exist_ok=True)

    return enter
