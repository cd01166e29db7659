"""An artifact goes to the Hub: what is sent, and what is refused before anything is."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ulbq
from tests.pipeline.runs import request
from tests.stand_in import Answers, StandIn
from ulbq.artifacts.manifest import read_manifest
from ulbq.artifacts.whole import verify
from ulbq.config.push import PushRequest
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.pipeline import push as pushing
from ulbq.pipeline.push import plan, published, push
from ulbq.pipeline.quantize import quantize

PROGRAM = "import sys; from ulbq.commands.app import main; sys.exit(main())"


class Hub(StandIn):
    """A stand-in for the Hub: repositories in memory, by the calls that its client makes."""

    def __init__(self) -> None:
        super().__init__(_Answers)
        self.files: dict[str, bytes] = {"old.safetensors": b"an earlier artifact's", "notes.txt": b"a person's"}
        self.large: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {}
        self.created: dict[str, Any] = {}
        self.refuses = False


class _Answers(Answers):
    server: Hub

    def do_GET(self) -> None:
        self._note()
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in self.server.files.items()
            ]
            return self._say(entries)
        return self._say(
            {"id": "me/model", "sha": "0" * 40, "siblings": [{"rfilename": name} for name in self.server.files]}
        )

    def do_PUT(self) -> None:  # to a store of its own, whose address is the permission
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._say({})

    def do_POST(self) -> None:
        self._note()
        body, hub = self._body(), self.server
        if hub.refuses:
            return self._say({"error": "You may not write here"}, 403)
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            return self._say({"url": f"{hub.address}/me/model"})
        if "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            return self._say(
                {
                    "files": [
                        {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                        for name in names
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            actions = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._say({"transfer": "basic", "objects": actions})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            return self._say(
                {
                    "commitUrl": f"{hub.address}/me/model/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "pullRequestUrl": None,
                }
            )
        return self._say({})

    def _commit(self, kind: str, value: dict[str, Any]) -> None:
        if kind == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            self.server.files[value["path"]] = self.server.large[value["oid"]]
        elif kind == "deletedFile":
            del self.server.files[value["path"]]

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _note(self) -> None:
        self.server.tokens[self.path] = self.headers.get("Authorization") or ""

    def _say(self, answer: Any, code: int = 200) -> None:
        self.say(json.dumps(answer).encode(), {"Content-Type": "application/json"}, code)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "q"
    quantize(request(tiny_llama, out, method="rtn", bits=4, group_size=32))
    return out


def ulbq_push(hub: Hub, home: Path, *words: Any, token: str = "hf_secret") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the Hub's client reads its address when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": token}
    run = [sys.executable, "-c", PROGRAM, "push", *map(str, words)]
    return subprocess.run(run, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def test_the_repository_holds_the_artifact_and_no_other_weights(artifact: Path, hub: Hub, tmp_path: Path) -> None:
    done = ulbq_push(hub, tmp_path, artifact, "me/model", "--private", "-q")
    assert (done.returncode, done.stdout) == (0, f"{hub.address}/me/model\n"), done.stderr
    assert (hub.created["name"], hub.created["organization"], hub.created["visibility"]) == ("model", "me", "private")
    writing = {path for path in hub.tokens if path.endswith(("/create", "/commit/main", "/preupload/main", "/batch"))}
    assert len(writing) == 4
    assert {hub.tokens[path] for path in writing} == {"Bearer hf_secret"}, hub.tokens
    own = {str(path.relative_to(artifact)): path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    changed = {name: hub.files[name] for name in ("manifest.json", "README.md", "report.html") if name in own}
    assert hub.files == own | {"notes.txt": b"a person's"} | changed
    assert {"README.md", "manifest.json", "model-outer.safetensors"} < own.keys()
    assert {hashlib.sha256(data).hexdigest() for data in hub.large.values()} == hub.large.keys()


def test_a_repository_does_not_hold_the_folders_of_this_machine(artifact: Path, tiny_llama: Path, hub: Hub) -> None:
    home = artifact.parent
    assert ulbq_push(hub, home / "home", artifact, "me/model", "-q").returncode == 0
    assert not [name for name, data in hub.files.items() if str(tiny_llama.parent).encode() in data]
    assert str(tiny_llama.parent) in (artifact / "manifest.json").read_text()
    pulled = home / "pulled"
    for name, data in hub.files.items():
        (pulled / name).parent.mkdir(parents=True, exist_ok=True)
        (pulled / name).write_bytes(data)
    manifest = read_manifest(pulled)
    assert [(one.name, one.path, one.absolute) for one in manifest.parents] == [(tiny_llama.name, tiny_llama.name, "")]
    assert manifest.request["source"] == tiny_llama.name
    verify(pulled)


def test_what_a_task_was_learnt_from_and_the_base_of_an_adapter_have_names_alone() -> None:
    made = Path(__file__).parents[1] / "golden" / "artifacts" / "finetuned"
    found = published(made, read_manifest(made), "me/model")
    assert found.keys() == {"manifest.json", "README.md", "finetune.html", "adapter/adapter_config.json"}
    whole = {str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert [name for name, data in whole.items() if b"/golden" in data] != []
    assert [name for name, data in (whole | found).items() if b"/golden" in data] == []
    assert json.loads(found["adapter/adapter_config.json"])["base_model_name_or_path"] == "me/model"
    entry = json.loads(found["manifest.json"])["files"]["README.md"]
    assert entry == {"size": len(found["README.md"]), "sha256": hashlib.sha256(found["README.md"]).hexdigest()}


def test_what_only_looks_like_a_place_stays() -> None:
    places = {"/a": "a", "/": "", "/home/me/x.jsonl": "x.jsonl", "run/q": "q"}
    text = "https://b/a/c </a> /a, '/home/me/x.jsonl' of run/q, not of run/q2 or my/run/q"
    assert pushing._named_in(text, places) == "https://b/a/c </a> a, 'x.jsonl' of q, not of run/q2 or my/run/q"


def test_names_of_the_hub_stay(artifact: Path) -> None:
    made = read_manifest(artifact)
    parent = made.parents[0].model_copy(update={"kind": "hub", "path": "meta/llama", "absolute": ""})
    request = {
        **made.request,
        "source": "meta/llama",
        "calibration": "my/texts.jsonl:2,c4:1,tatsu-lab/alpaca:0.5",
        "out": "./a/b/",
    }
    warned = ("There is no 'here/or/there.txt' with a/b.",)
    changed = made.model_copy(update={"parents": (parent,), "request": request, "warnings": warned})
    data = json.loads(published(artifact, changed, "me/model")["manifest.json"])
    assert (data["request"]["source"], data["request"]["out"]) == ("meta/llama", "b")
    assert data["request"]["calibration"] == "texts.jsonl:2,c4:1,tatsu-lab/alpaca:0.5"
    assert data["warnings"] == ["There is no 'there.txt' with a/b."]
    assert data["parents"][0]["path"] == "meta/llama"


def test_a_refusal_is_one_sentence(artifact: Path, hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    done = ulbq_push(hub, tmp_path, artifact, "me/model", "-q")
    assert done.returncode == 4
    assert done.stderr.startswith("error: The Hub refuses 'me/model': You may not write here.")
    assert "hf_secret" not in done.stderr


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(artifact: Path, ulbq: Any) -> None:
    told = ulbq("push", artifact, "me/model", "--dry-run")
    lines = told.out.splitlines()
    assert told.code == 0
    assert any(line.endswith("  README.md") for line in lines)
    planned = plan(PushRequest(source=str(artifact), repo="me/model"))
    sizes = {path.name: path.stat().st_size for path in artifact.rglob("*") if path.is_file()}
    changed = published(artifact, read_manifest(artifact), "me/model")
    assert planned.files == sizes | {name: len(data) for name, data in changed.items()}
    assert lines[-1].endswith(f"in {len(planned.files)} files, to me/model, revision main")


def test_without_a_token_one_sentence_says_so(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "offline_by_environment", lambda: False)
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    with pytest.raises(ResourceError, match="no token") as caught:
        ulbq.push(artifact, "me/model")
    assert "hf auth login" in caught.value.hint
    monkeypatch.setattr(pushing, "offline_by_environment", lambda: True)
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        ulbq.push(artifact, "me/model")


@pytest.mark.parametrize(("repo", "sentence"), [("a b/c", "no name of a repository"), ("model", "names no owner")])
def test_names_that_are_none(artifact: Path, repo: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        plan(PushRequest(source=str(artifact), repo=repo))


def test_what_is_no_whole_model_is_refused(artifact: Path, tiny_llama: Path, tmp_path: Path, ulbq: Any) -> None:
    import shutil

    partial = shutil.copytree(artifact, tmp_path / "q.partial")
    with pytest.raises(InputError, match="unfinished"):
        plan(PushRequest(source=str(partial), repo="me/model"))
    with pytest.raises(InputError):
        plan(PushRequest(source=str(tiny_llama), repo="me/model"))
    damaged = shutil.copytree(artifact, tmp_path / "damaged")
    with (damaged / "README.md").open("r+") as card:
        card.write("X")
    asked = PushRequest(source=str(damaged), repo="me/model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pushing, "offline_by_environment", lambda: False)
        patch.setattr(pushing, "get_token", lambda: "hf_x")
        with pytest.raises(InputError, match=r"README\.md"):
            push(asked)
    assert ulbq("saliency", tiny_llama, "--kind", "magnitude", "--device", "cpu", "-q", "-o", tmp_path / "s").code == 0
    with pytest.raises(InputError, match="holds scores"):
        plan(PushRequest(source=str(tmp_path / "s"), repo="me/model"))
