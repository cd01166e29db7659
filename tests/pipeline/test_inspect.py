import shutil
from pathlib import Path

import pytest

from tests.artifacts.sample import edit, parent_of, quantized, tree, write_artifact
from ulbq.artifacts import ConvertedManifest, EvaluationManifest, Parent, read_manifest
from ulbq.errors import InputError
from ulbq.models.source import resolve
from ulbq.pipeline.inspect import Inspection, inspect


def model_parent(path: Path | str, kind: str = "folder", sha256: str = "0" * 64) -> Parent:
    return Parent(kind=kind, name="tiny", path=str(path), sha256=sha256)


def evaluation_of(path: Path, out: Path) -> Path:
    """An evaluation of the artifact at ``path``, recorded under that very path."""
    parents = (parent_of(path, read_manifest(path)),)
    manifest = EvaluationManifest(name="e", request={}, seed=0, device="cpu", results={}, parents=parents)
    return write_artifact(out, manifest)


def states(inspection: Inspection) -> list[tuple[int, str, str]]:
    return [(one.depth, one.parent.kind, one.state) for one in inspection.ancestry]


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def artifact(tmp_path: Path, model: Path) -> Path:
    parent = model_parent(model, sha256=resolve(model).content_hash)
    return write_artifact(tmp_path / "artifacts" / "q", quantized(parents=(parent,)))


def test_the_whole_size_is_that_of_all_files(artifact: Path) -> None:
    inspection = inspect(artifact)
    assert inspection.total_size == sum(map(len, tree(artifact).values()))
    assert inspection.manifest == read_manifest(artifact)
    assert not inspection.verified


def test_it_is_told_as_json_and_read_back(artifact: Path) -> None:
    inspection = inspect(artifact)
    assert Inspection.model_validate_json(inspection.model_dump_json()) == inspection


def test_verify_hashes_the_files_and_the_model(artifact: Path, model: Path) -> None:
    assert states(inspect(artifact)) == [(1, "folder", "unchecked")]
    inspection = inspect(artifact, verify=True)
    assert inspection.verified
    assert states(inspection) == [(1, "folder", "same")]
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert states(inspect(artifact, verify=True)) == [(1, "folder", "changed")]
    (model / "config.json").unlink()
    assert states(inspect(artifact, verify=True)) == [(1, "folder", "damaged")]
    shutil.rmtree(model)
    assert states(inspect(artifact, verify=True)) == [(1, "folder", "missing")]


def test_a_changed_file_is_found_only_by_verify(artifact: Path) -> None:
    (artifact / "model.safetensors").write_bytes(b"WEIGHTS")
    inspect(artifact)
    with pytest.raises(InputError, match=r"model\.safetensors' was changed"):
        inspect(artifact, verify=True)


@pytest.mark.parametrize("verify", [False, True])
def test_a_hub_model_that_is_not_in_the_cache_is_not_called_missing(tmp_path: Path, verify: bool) -> None:
    parent = model_parent("nobody/tiny", kind="hub")
    path = write_artifact(tmp_path / "q", quantized(parents=(parent,)))
    assert states(inspect(path, verify=verify)) == [(1, "hub", "unchecked")]


def test_ancestors_are_followed_to_the_model(artifact: Path, tmp_path: Path) -> None:
    grandparent = parent_of(artifact, read_manifest(artifact))
    manifest = ConvertedManifest(
        name="d", request={}, seed=0, device="cpu", target="dense", dtype="bfloat16", parents=(grandparent,)
    )
    converted = write_artifact(tmp_path / "elsewhere" / "dense", manifest)
    scores = evaluation_of(converted, tmp_path / "scores")
    inspection = inspect(scores)
    assert states(inspection) == [(1, "converted", "same"), (2, "quantized", "same"), (3, "folder", "unchecked")]
    assert inspection.ancestry[1].created == read_manifest(artifact).created
    shutil.rmtree(artifact)
    assert states(inspect(scores)) == [(1, "converted", "same"), (2, "quantized", "missing")]


def test_a_replaced_parent_is_changed_and_its_own_parents_are_not_ours(artifact: Path, tmp_path: Path) -> None:
    scores = evaluation_of(artifact, tmp_path / "scores")
    write_artifact(artifact, quantized(seed=7, parents=(model_parent("other"),)), force=True)
    assert states(inspect(scores)) == [(1, "quantized", "changed")]


@pytest.mark.parametrize("reseal", [True, False])
def test_an_edited_parent_is_no_longer_the_same(artifact: Path, tmp_path: Path, reseal: bool) -> None:
    scores = evaluation_of(artifact, tmp_path / "scores")
    edit(artifact, lambda data: data.update(seed=7), reseal=reseal)
    assert states(inspect(scores)) == [(1, "quantized", "changed" if reseal else "damaged")]


def test_artifacts_that_moved_together_still_find_each_other(artifact: Path, tmp_path: Path) -> None:
    evaluation_of(artifact, artifact.parent / "scores")
    artifact.parent.rename(tmp_path / "moved")
    assert states(inspect(tmp_path / "moved" / "scores"))[0] == (1, "quantized", "same")
    # A stranger now stands where the parent was: the true one is still beside its child.
    write_artifact(artifact, quantized(seed=7))
    assert states(inspect(tmp_path / "moved" / "scores"))[0] == (1, "quantized", "same")


def test_what_is_no_artifact_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match="is not an artifact"):
        inspect(model)
