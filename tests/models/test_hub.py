"""Plans of a model on the Hub fetch headers; whatever reads a tensor fetches it first."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

from tests.models.tiny import save_tiny
from tests.processes import run
from tests.stand_in import Answers, StandIn
from tests.told import Told
from ulbq.artifacts.shards import LazyTensors
from ulbq.commands.app import main
from ulbq.errors import InputError
from ulbq.models.hub import _OUTLINES, _write_outline

PROGRAM = "import sys; from ulbq.commands.app import main; sys.exit(main())"
COMMIT = "1" * 40


class Hub(StandIn):
    """A stand-in for the Hub with one repository, which counts the bytes that it gives of each file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_Answers)
        self.folder = folder
        self.given: dict[str, int] = {}


class _Answers(Answers):
    server: Hub

    def do_HEAD(self) -> None:
        self._file(head=True)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            files = sorted(self.server.folder.iterdir())
            told: Any = {"id": "me/model", "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            if "/tree/" in self.path:
                told = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _sum(file)}
                    for file in files
                ]
            return self.say(json.dumps(told).encode(), {"Content-Type": "application/json"})
        return self._file(head=False)

    def _file(self, *, head: bool) -> None:
        file = self.server.folder / self.path.rpartition("/")[2]
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{_sum(file)}"', "X-Repo-Commit": COMMIT}
        asked = (self.headers.get("Range") or "").removeprefix("bytes=")
        if asked:
            first, _, last = asked.partition("-")
            data = data[int(first) : int(last or len(data)) + 1]
        self.say(data, headers, code=206 if asked else 200, head=head)
        if not head:
            self.server.given[file.name] = self.server.given.get(file.name, 0) + len(data)


def _sum(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Shards of half a megabyte: the client reads the first 100 kB of each."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    folder = save_tiny("llama", tmp_path_factory.mktemp("hub") / "model", shard_size="1MB", **sizes)
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def command(hub: Hub, home: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    (home / "temporary").mkdir(exist_ok=True)
    environment |= {"TMPDIR": str(home / "temporary")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        **{"env": environment, "cwd": home, "capture_output": True, "text": True, "timeout": 120},
        stdin=subprocess.DEVNULL,
    )


def as_if_typed(hub: Hub, home: Path, *words: Any) -> Told:
    """The same by a child of this process, which has all libraries imported: the client reads its settings anew."""
    (home / "temporary").mkdir(exist_ok=True)

    def work() -> int:
        del os.environ["HF_HUB_OFFLINE"]
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        tempfile.tempdir = str(home / "temporary")
        importlib.reload(constants)
        hf_api.api.endpoint = constants.ENDPOINT
        code = main([str(word) for word in words])
        _OUTLINES.clear()  # as a process does at its end
        return code

    return run([work], home)


def weights(hub: Hub) -> tuple[int, int]:
    """Bytes of weights that were asked for, and that there are."""
    given = sum(count for name, count in hub.given.items() if name.endswith(".safetensors"))
    return given, sum(path.stat().st_size for path in hub.folder.glob("*.safetensors"))


def test_a_plan_fetches_headers_and_a_run_the_weights(hub: Hub, tmp_path: Path) -> None:
    asked = ("quantize", "me/model", "--method", "rtn", "--bits", "2")
    planned = as_if_typed(hub, tmp_path, *asked, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    some, all_ = weights(hub)
    assert 0 < some < all_ / 4
    told = as_if_typed(hub, tmp_path, "recommend", "me/model", "--fit", "8GB", "-q")
    assert told.code == 0, told.err
    assert told.out.startswith("ulbq quantize me/model ")
    assert weights(hub)[0] < all_ / 2
    assert list(tmp_path.glob("temporary/*")) == []
    made = as_if_typed(hub, tmp_path, *asked, "-q", "-o", tmp_path / "q")
    assert made.code == 0, made.err
    assert weights(hub)[0] >= all_
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    plan = json.loads(planned.out)
    assert manifest["coverage"] == plan["coverage"]
    hub.given.clear()
    again = as_if_typed(hub, tmp_path, *asked, "--dry-run", "--json")
    assert json.loads(again.out)["coverage"] == plan["coverage"]
    assert weights(hub)[0] == 0


def test_a_model_that_has_to_be_looked_into_is_fetched(tmp_path: Path) -> None:
    """Its head is tied by its configuration and stored all the same: values say whether that is so."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny("llama", tmp_path / "model", tied=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"another tool's")
    home = tmp_path / "home"
    home.mkdir()
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = command(server, home, "quantize", "me/model", "--method", "rtn", "--dry-run", "--json")
        server.shutdown()
    assert told.returncode == 0, told.stderr
    assert list(home.glob("temporary/*")) == []


def test_no_tensor_of_an_outline_is_given(tmp_path: Path) -> None:
    from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo

    one = TensorInfo(dtype="BF16", shape=[1 << 20, 1 << 20], data_offsets=(0, 2 << 40))
    _write_outline(tmp_path / "model.safetensors", SafetensorsFileMetadata({}, {"a": one}))
    tensors = LazyTensors.folder(tmp_path)
    assert (tensors.shape("a"), tensors.nbytes("a"), tensors.here) == ((1 << 20, 1 << 20), 2 << 40, False)
    assert (tmp_path / "model.safetensors").stat().st_blocks < 64
    with pytest.raises(InputError, match=r"Only the header of 'model\.safetensors'"):
        tensors.read("a")
