import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.artifacts.sample import digest, edit, parent_of, quantized, write_artifact
from ulbq.artifacts import (
    BitsReport,
    BlockRecord,
    ConvertedManifest,
    EvaluationManifest,
    Manifest,
    QuantizedManifest,
    is_artifact,
    manifest,
    newest,
    read_manifest,
    verify,
)
from ulbq.errors import InputError
from ulbq.progress import Phase, Silent

COMMON: dict[str, Any] = {"name": "x", "request": {}, "seed": 1, "device": "cpu"}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "q")


@pytest.mark.parametrize(
    "written",
    [
        quantized(),
        EvaluationManifest(**COMMON, results={"wikitext2": {"perplexity": 24.19}}),
        ConvertedManifest(**COMMON, target="dense", dtype="bfloat16"),
    ],
    ids=lambda written: written.kind,
)
def test_what_was_written_is_read_back(tmp_path: Path, written: Manifest) -> None:
    read = read_manifest(write_artifact(tmp_path / "a", written))
    assert type(read) is type(written)
    filled = {"files", "fingerprint", "digest"}
    assert read.model_dump(exclude=filled) == written.model_dump(exclude=filled)
    assert sorted(read.files) == ["adapter/adapter.safetensors", "config.json", "model.safetensors"]
    assert read.files["model.safetensors"].size == 7


def test_digest_is_what_the_documentation_says(artifact: Path) -> None:
    data = json.loads((artifact / "manifest.json").read_text())
    assert read_manifest(artifact).digest == data["digest"] == digest(data)


def test_a_manifest_is_frozen_and_takes_no_unknown_field() -> None:
    written = quantized()
    with pytest.raises(ValidationError):
        written.seed = 3
    with pytest.raises(ValidationError):
        quantized(colour="red")


def overwrite(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(data)


def change(reseal: bool = True, **fields: Any) -> Callable[[Path], object]:
    return lambda path: edit(path, lambda data: data.update(fields), reseal=reseal)


def rename_file(name: str) -> Callable[[Path], object]:
    def rename(data: dict[str, Any]) -> None:
        data["files"][name] = data["files"].pop("config.json")

    return lambda path: edit(path, rename, reseal=True)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (overwrite("manifest.json", b""), r"manifest\.json' is corrupt: Expecting value"),
    "cut": (lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:99]), "corrupt"),
    "binary": (overwrite("manifest.json", b"\xff\xfe{}"), "corrupt: .* can't decode"),
    "not a number": (overwrite("manifest.json", b'{"seed": NaN}'), "corrupt: NaN is not JSON"),
    "bottomless": (overwrite("manifest.json", b"[" * 100_000), "corrupt: it is nested too deeply"),
    "a list": (overwrite("manifest.json", b"[]"), r"ulbq did not write its manifest\.json"),
    "a web app's": (overwrite("manifest.json", b'{"name": "app", "icons": []}'), "ulbq did not write"),
    "a boolean version": (change(schema_version=True), "ulbq did not write"),
    "newer": (change(schema_version=7, ulbq_version="9.1.0"), r"newer ulbq \(9\.1\.0, schema 7\).*schemas up to 2"),
    "never written": (change(schema_version=0), "schema 0, which no ulbq ever wrote"),
    "edited": (change(reseal=False, seed=77), "edited after it was written"),
    "digest lost": (lambda path: edit(path, lambda data: data.pop("digest"), reseal=False), "edited after"),
    "unknown kind": (change(kind="saliencies"), "unknown kind, 'saliencies'"),
    "extra key": (change(colour="red"), "does not fit its schema: colour: Extra inputs"),
    "key lost": (
        lambda path: edit(path, lambda data: data.pop("method"), reseal=True),
        "schema: method: Field required",
    ),
    "wrong type": (change(seed="seven"), "schema: seed: Input should be a valid integer"),
    "file lost": (lambda path: (path / "config.json").unlink(), r"config\.json' is missing"),
    "file cut": (overwrite("model.safetensors", b"weigh"), "holds 5 bytes where 7 were written: truncated"),
    "file grown": (overwrite("model.safetensors", b"weights!"), "holds 8 bytes where 7 were written: changed"),
    "file above": (rename_file("../config.json"), r"a file outside the artifact: '\.\./config\.json'"),
    "file elsewhere": (rename_file("/etc/passwd"), "a file outside the artifact: '/etc/passwd'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_has_its_sentence(artifact: Path, name: str) -> None:
    damage, sentence = DAMAGES[name]
    damage(artifact)
    with pytest.raises(InputError, match=sentence) as caught:
        read_manifest(artifact)
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith(("'", "The manifest of '"))
    assert caught.value.message.endswith(".")


def test_a_newer_artifact_says_how_to_upgrade(artifact: Path) -> None:
    change(schema_version=3)(artifact)
    with pytest.raises(InputError) as caught:
        read_manifest(artifact)
    assert "pip install --upgrade ulbq" in caught.value.hint


def test_what_is_no_artifact_at_all(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "run.partial").mkdir()
    for name, sentence in {
        "folder": r"is not an artifact: it has no manifest\.json",
        "model.gguf": "is a file, not an artifact folder",
        "nowhere": "There is no artifact",
        "run": "is not finished yet",
        "run.partial": "is an unfinished run",
    }.items():
        with pytest.raises(InputError, match=sentence):
            read_manifest(tmp_path / name)
        assert not is_artifact(tmp_path / name)


def test_a_damaged_artifact_still_claims_to_be_one(artifact: Path) -> None:
    assert is_artifact(artifact)
    (artifact / "manifest.json").write_bytes(b"{")
    assert is_artifact(artifact)
    (artifact / "manifest.json").write_bytes(b'{"name": "app"}')
    assert not is_artifact(artifact)


class Log(Silent):
    """Remembers what was reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        self.lines.append(f"{name} {total}")
        yield self

    def advance(self, steps: int = 1, detail: str = "") -> None:
        self.lines.append(f"+{steps} {detail}")


def test_verify_hashes_every_file(artifact: Path) -> None:
    log = Log()
    verify(artifact, log)
    assert log.lines == ["Verifying 3", "+1 adapter/adapter.safetensors", "+1 config.json", "+1 model.safetensors"]


def test_verify_finds_a_file_of_the_right_size_with_other_bytes(artifact: Path) -> None:
    (artifact / "adapter/adapter.safetensors").write_bytes(b"low_rank")
    read_manifest(artifact)
    with pytest.raises(InputError, match=r"q/adapter/adapter\.safetensors' was changed after"):
        verify(artifact)


def test_older_manifests_are_upgraded_step_by_step(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = read_manifest(artifact)

    def rename_seed(data: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in data.items() if key != "start"}, "seed": data["start"]}

    edit(artifact, lambda data: data.update(schema_version=1, start=data.pop("seed") + 5), reseal=True)
    monkeypatch.setattr(manifest, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(manifest, "_UPGRADERS", {1: rename_seed, 2: lambda data: {**data, "name": "third"}})
    read = read_manifest(artifact)
    assert (read.schema_version, read.seed, read.name) == (3, 5, "third")
    assert read.digest != old.digest
    assert read.digest == json.loads((artifact / "manifest.json").read_text())["digest"]


def test_a_manifest_of_the_first_schema_has_blocks_without_spurious_sinks(tmp_path: Path) -> None:
    block = BlockRecord(index=0, start_error=0.2, end_error=0.1, steps=4, seconds=1.0)
    path = write_artifact(tmp_path / "q", quantized(blocks=(block,)))

    def go_back(data: dict[str, Any]) -> None:
        data["schema_version"] = 1
        del data["blocks"][0]["spurious_sinks"]

    edit(path, go_back, reseal=True)
    read = read_manifest(path)
    assert isinstance(read, QuantizedManifest)
    assert (read.schema_version, read.blocks) == (2, (block,))


def test_numbers_that_are_not_finite_survive_as_json(tmp_path: Path) -> None:
    block = BlockRecord(index=0, start_error=math.inf, end_error=math.nan, steps=0, seconds=0.0)
    path = write_artifact(tmp_path / "q", quantized(blocks=(block,), request={"limit": math.inf}))
    text = (path / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    read = read_manifest(path)
    assert isinstance(read, QuantizedManifest)
    assert read.blocks[0].start_error == math.inf
    assert math.isnan(read.blocks[0].end_error)
    assert read.request == {"limit": "Infinity"}


def test_true_bits_count_everything_that_decodes_the_weights() -> None:
    parts = {"codes": 8192, "scales": 1024, "zeros": 128, "adapter": 4096, "embeddings": 10**6, "other": 10**6}
    report = BitsReport(parts=parts, weights=4096)
    assert report.bits_per_weight == (8192 + 1024 + 128 + 4096) / 4096
    with pytest.raises(ValidationError):
        BitsReport(parts={}, weights=0)


def test_newest_goes_by_creation_time_and_kind(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    assert newest(root, {"quantized"}) is None
    write_artifact(root / "z-old", quantized(created="2026-01-01T00:00:00.000000Z"))
    write_artifact(root / "a-new", quantized(created="2026-03-01T00:00:00.000000Z"))
    write_artifact(root / "scores", EvaluationManifest(**COMMON, results={}, created="2026-04-01T00:00:00.000000Z"))
    assert newest(root, {"quantized"}) == root / "a-new"
    assert newest(root, {"quantized", "evaluation"}) == root / "scores"
    assert newest(root, ["converted"]) is None
    # Further down, and behind a link, too; but neither the folder itself nor the depths below.
    assert newest(tmp_path, {"quantized"}) == root / "a-new"
    (tmp_path / "work/deep").mkdir(parents=True)
    (tmp_path / "work/deep/linked").symlink_to(root)
    assert newest(tmp_path / "work/deep", {"quantized"}) == tmp_path / "work/deep/linked/a-new"
    assert newest(tmp_path / "work", {"quantized"}) == tmp_path / "work/deep/linked/a-new"
    assert newest(tmp_path, {"converted"}) is None
    assert newest(root / "a-new", {"quantized"}) is None


def test_newest_passes_over_what_is_not_a_finished_artifact(tmp_path: Path) -> None:
    later = quantized(created="2099-01-01T00:00:00.000000Z")
    write_artifact(tmp_path / "q")
    for name in ("run.partial", ".q.replaced"):
        write_artifact(tmp_path / "moved", later).rename(tmp_path / name)
    for name, text in {"foreign": "{}", "broken": "{", "bare": None}.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "manifest.json").write_text(text)
    (tmp_path / "file").touch()
    assert newest(tmp_path, {"quantized"}) == tmp_path / "q"


def test_a_parent_is_named_by_its_digest(artifact: Path, tmp_path: Path) -> None:
    parent = read_manifest(artifact)
    child = EvaluationManifest(**COMMON, results={}, parents=(parent_of(artifact, parent),))
    assert read_manifest(write_artifact(tmp_path / "e", child)).parents[0].sha256 == parent.digest


def test_reading_artifacts_imports_no_torch() -> None:
    code = "import sys, ulbq.artifacts; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
