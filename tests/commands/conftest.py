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


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """By its bits a folder with ``base`` and the artifact ``artifacts/q`` made from it; made once, to be copied."""
    made: dict[int, Path] = {}

    def find(bits: int) -> Path:
        if bits not in made:
            folder = tmp_path_factory.mktemp("quantized") / "there"
            source, out = save_tiny("llama", folder / "base", tied=False), folder / "artifacts" / "q"
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                given = {"source": source.name, "method": "rtn", "bits": bits, "group_size": 32}
                quantize(QuantizeRequest(**given, out=out.relative_to(folder)))
            # Moved away, so that a copy finds no other base than its own.
            made[bits] = folder.rename(folder.with_name("made"))
        return made[bits]

    return find


@pytest.fixture
def working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: Callable[[int], Path]
) -> Callable[[int], Path]:
    """Goes into a folder with ``base`` and ``artifacts/q`` of so many bits; there is no standard input."""

    def enter(bits: int) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", None)
        return shutil.copytree(quantized(bits), tmp_path, dirs_exist_ok=True)

    return enter
