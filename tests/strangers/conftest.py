"""A model and an artifact as a stranger may hand them on, each test's own to spoil, and the command line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts.sample import digest
from tests.models.stored import write_quantized
from tests.models.tiny import save_tiny
from ulbq.config.adapter import AdapterConfig
from ulbq.config.quantize import QuantizeRequest
from ulbq.formats import AffineScheme
from ulbq.models.source import resolve
from ulbq.pipeline.quantize import quantize


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def _dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("strangers") / "dense", tied=False)


@pytest.fixture(scope="session")
def _packed(_dense: Path) -> Path:
    request = {"method": "rtn", "bits": 3, "group_size": 32, "device": "cpu", "offline": True}
    return quantize(QuantizeRequest(source=str(_dense), out=_dense.parent / "packed", **request))[0]


@pytest.fixture
def dense(_dense: Path, tmp_path: Path) -> Path:
    """A tiny Llama's folder."""
    return Path(shutil.copytree(_dense, tmp_path / "dense"))


@pytest.fixture
def packed(_packed: Path, tmp_path: Path) -> Path:
    """The same, quantized by rtn."""
    return Path(shutil.copytree(_packed, tmp_path / "packed"))


@pytest.fixture
def adapted(_dense: Path, tmp_path: Path) -> Path:
    """An artifact with an adapter."""
    adapter = AdapterConfig(rank=2, alpha=2)
    return write_quantized(resolve(_dense), tmp_path / "adapted", AffineScheme(bits=4, group_size=32), adapter)


def reseal(
    artifact: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None, *, listed: tuple[str, ...] = ()
) -> Path:
    """Make hashes and digest fit after files or the manifest were changed, as a stranger would; ``listed`` are new."""
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in (*manifest["files"], *listed):
        data = (artifact / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    manifest["digest"] = digest(manifest)
    path.write_text(json.dumps(manifest))
    return artifact


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
