"""Caches, mirrors and networks that are not there."""

import json
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest


@pytest.fixture(autouse=True)
def _no_mirror_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ULBQ_DATA_DIR", raising=False)


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that opens a connection. ``AssertionError`` is none of the errors that code under test expects."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the environment's HF_HUB_OFFLINE: what keeps the code from the network must be its own doing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches: ``hub`` for the Hub client's files, ``datasets`` for prepared tables."""
    folder = tmp_path / "caches"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(*texts: str) -> list[dict[str, str]]:
    """Rows with the one column ``text``."""
    return [{"text": text} for text in texts]
