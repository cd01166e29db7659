"""What travels with a model: known files of its own folder, and nothing that a link leads to elsewhere."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.strangers.conftest import reseal
from tests.told import Ulbq
from ulbq.artifacts.names import leads_out
from ulbq.errors import InputError
from ulbq.models.side_files import copy_side_files, is_side_file, side_files

RTN = ("--method", "rtn", "--bits", "4", "-q")
SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "id_rsa"
    path.write_text(SECRET)
    return path


def holds_secret(folder: Path) -> bool:
    return any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name", ["LICENSE", "NOTICE.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"]
)
def test_a_link_out_of_the_folder_is_refused_before_the_work(
    name: str, dense: Path, key: Path, ulbq: Ulbq, tmp_path: Path
) -> None:
    (dense / name).unlink(missing_ok=True)
    (dense / name).symlink_to(key)
    for words in (("quantize", dense, *RTN), ("convert", dense, "--to", "dense"), ("eval", dense)):
        assert "leads out of its folder" in ulbq(*words, "-o", tmp_path / "out").refused()
        assert not (tmp_path / "out").exists()


def test_an_artifacts_links_are_not_followed_either(packed: Path, key: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (packed / "LICENSE").symlink_to(key)
    reseal(packed, listed=("LICENSE",))
    for words in (
        ("convert", packed, "--to", "dense"),
        ("convert", packed, "--to", "half"),
        ("generate", packed, "-p", "a"),
    ):
        assert (
            "leads out of its folder" in ulbq(*words, *(["-o", tmp_path / "out"] * (words[0] == "convert"))).refused()
        )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_nor_are_those_of_its_adapter(name: str, adapted: Path, key: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    elsewhere = tmp_path / name
    shutil.move(adapted / "adapter" / name, elsewhere)
    (adapted / "adapter" / name).symlink_to(elsewhere)
    (adapted / "adapter" / "notes.txt").symlink_to(key)
    assert "leads out" in ulbq("convert", adapted, "--to", "dense", "-o", tmp_path / "out").refused()
    (adapted / "adapter" / name).unlink()
    shutil.move(elsewhere, adapted / "adapter" / name)
    assert ulbq("convert", adapted, "--to", "dense", "-o", tmp_path / "out").code == 0
    assert sorted(os.listdir(tmp_path / "out" / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_links_inside_the_folder_and_a_hub_cache_are_followed(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "0a1b", tmp_path / "cache" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.copytree(dense, snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    (snapshot / "LICENSE").symlink_to("config.json")
    told = ulbq("quantize", snapshot, *RTN, "-o", tmp_path / "q")
    assert told.code == 0, told.err
    assert json.loads((tmp_path / "q" / "LICENSE").read_text())["model_type"] == "llama"
    assert not any(path.is_symlink() for path in (tmp_path / "q").rglob("*"))


def test_a_folder_that_plays_a_hub_cache_leads_nowhere_else(dense: Path, key: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(dense, snapshot)
    (tmp_path / "cache" / "blobs").symlink_to(key.parent)
    (snapshot / "LICENSE").symlink_to(Path("../../blobs") / key.name)
    assert leads_out(snapshot / "LICENSE", snapshot)
    with pytest.raises(InputError, match="leads out"):
        side_files(snapshot)


def test_code_and_unknown_files_stay_behind(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (dense / "modeling_evil.py").write_text("raise SystemExit")
    (dense / "data.csv").write_text("1,2")
    (dense / "LICENSE.py").write_text("raise SystemExit")
    (dense / "Qwen_LICENSE_AGREEMENT.md").write_text("do as you like")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (dense / "additional_chat_templates" / "evil.py").write_text("raise SystemExit")
    ulbq("quantize", dense, *RTN, "-o", tmp_path / "q")
    ulbq("convert", tmp_path / "q", "--to", "dense", "-o", tmp_path / "c")
    for made in (tmp_path / "q", tmp_path / "c"):
        found = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
        assert not [name for name in found if name.endswith((".py", ".csv"))]
        assert {"Qwen_LICENSE_AGREEMENT.md", "additional_chat_templates/tool_use.jinja", "tokenizer.json"} <= found


@pytest.mark.parametrize("command", ["half", "finetune"])
def test_code_in_an_artifact_stays_behind(command: str, packed: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (packed / "evil.py").write_text("raise SystemExit")
    reseal(packed, listed=("evil.py",))
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say", "output": "it"}\n' * 4)
    data = ("--task", "instructions", "--data", tmp_path / "rows.jsonl")
    more = (*data, "--samples", 2, "--epochs", 1, "--sequence-length", 64)
    words = ("convert", packed, "--to", "half") if command == "half" else ("finetune", packed, *more)
    told = ulbq(*words, "-q", "-o", tmp_path / "out")
    assert told.code == 0, told.err
    assert not list((tmp_path / "out").rglob("*.py"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_known_kinds() -> None:
    known = ["LICENSE", "license.md", "LICENCE-MIT.txt", "NOTICE", "USE_POLICY.md", "Gemma_LICENSE", "merges.txt"]
    known += ["spiece.model", "qwen.tiktoken", "preprocessor_config.json", "additional_chat_templates/rag.jinja"]
    assert [name for name in known if not is_side_file(name)] == []
    unknown = ["config.json", "README.md", "model.safetensors", "x.py", "LICENSE.exe", ".env", "notes.txt", "a.jinja"]
    unknown += [
        "adapter/tokenizer.json",
        "secrets.json",
        "additional_chat_templates/x.py",
        "model.safetensors.index.json",
    ]
    assert [name for name in unknown if is_side_file(name)] == []


def test_no_side_files_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    copy_side_files(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "b") == []


@pytest.mark.parametrize("name", ["model-2.safetensors", "README.md", "tokenizer.json", "config.json"])
def test_a_pipe_is_not_waited_on(name: str, dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    (dense / name).unlink(missing_ok=True)
    os.mkfifo(dense / name)
    assert "neither a file nor a folder" in ulbq("quantize", dense, *RTN, "-o", tmp_path / "q").refused()
