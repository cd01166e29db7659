"""What ``serve`` sees to before it serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import save_tiny
from ulbq.config.generate import ServeRequest
from ulbq.errors import UsageError
from ulbq.pipeline.serve import _names, serve
from ulbq.progress import Silent

pytest.importorskip("uvicorn")

_COMMON: dict[str, Any] = {"device": "cpu", "port": 0}


class _Warnings(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Applications that were to be run; each is ready at once and then ends."""
    apps: list[Any] = []

    def run(app: Any, bound: Any, worker: Any, on_ready: Callable[[], object]) -> None:
        apps.append((app, bound.getsockname()[1], worker))
        on_ready()

    monkeypatch.setattr("ulbq.serving.server.run", run)
    return apps


def test_the_address_is_told_once_the_model_is_loaded(tiny_llama: Path, served: list[Any]) -> None:
    told: list[str] = []
    progress = _Warnings()
    serve(ServeRequest(source=str(tiny_llama), **_COMMON), told.append, progress)
    _, port, worker = served[0]
    assert told == [f"http://127.0.0.1:{port}/v1"]
    assert worker.generator.model is not None
    assert progress.warnings == []


def test_a_model_without_a_template_serves_texts_and_says_so(tmp_path: Path, served: list[Any]) -> None:
    folder = save_tiny("llama", tmp_path / "base", tied=False)
    (folder / "chat_template.jinja").unlink()
    progress = _Warnings()
    serve(ServeRequest(source=str(folder), **_COMMON), progress=progress)
    assert len(served) == 1
    assert progress.warnings == [f"'{folder}' has no chat template. Texts are taken, chats are not."]


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.0.0.5", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_a_server_for_this_machine_alone_answers_to_its_own_names(host: str, own: bool) -> None:
    assert _names(host) == ((host, "localhost", "127.0.0.1", "::1") if own else ("*",))


def test_a_host_that_is_none_is_refused_before_the_weights_are_read(tiny_llama: Path) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match="is no host"):
        serve(ServeRequest(source=str(tiny_llama), host="no such host", **_COMMON), told.append)
    assert told == []
