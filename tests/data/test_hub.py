"""Real caches, written here the way the Hub client and ``datasets`` write them, and read without a socket."""

import gzip
import json
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from datasets.packaged_modules.json.json import Json
from pyarrow import parquet

from tests.data.conftest import text_rows, write_jsonl
from ulbq.data import hub, registry
from ulbq.data.hub import HubSplit

pytestmark = pytest.mark.usefixtures("online", "no_sockets")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached_folder(caches: Path, dataset_id: str, revision: str = "main") -> Path:
    """An empty snapshot of a repository in the Hub client's cache."""
    repository = caches / "hub" / f"datasets--{dataset_id.replace('/', '--')}"
    reference = repository / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def write_parquet(path: Path, column: str, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: texts}), path)


def prepare(caches: Path, tmp_path: Path, config: str, text: str) -> None:
    """What ``load_dataset("Salesforce/wikitext", config)`` leaves behind."""
    source = write_jsonl(tmp_path / f"{config}.jsonl", text_rows(text))
    builder = Json(
        cache_dir=str(caches / "datasets"),
        dataset_name="wikitext",
        config_name=config,
        config_id=config,  # as where the card names the files: the folder then bears no hash of them
        hash=COMMIT,
        data_files={"train": [str(source)]},
    )
    builder.repo_id = "Salesforce/wikitext"
    builder._cache_dir = builder._build_cache_dir()
    builder._output_dir = builder._cache_dir
    builder.download_and_prepare()


def test_a_prepared_table_is_found(caches: Path, tmp_path: Path) -> None:
    prepare(caches, tmp_path, "wikitext-2-raw-v1", "prepared")
    assert list(registry.texts("wikitext2", "train", offline=True)) == ["prepared"]
    assert registry.available("wikitext2", offline=True)


def test_another_configuration_or_split_is_not_taken_for_it(caches: Path, tmp_path: Path) -> None:
    prepare(caches, tmp_path, "wikitext-103-raw-v1", "the large one")
    assert hub.cached_rows(HubSplit("Salesforce/wikitext", "wikitext-2-raw-v1", "train")) is None
    assert hub.cached_rows(HubSplit("Salesforce/wikitext", "wikitext-103-raw-v1", "test")) is None
    assert not registry.available("wikitext2", offline=True)


def test_a_downloaded_repository_is_read_by_its_card(caches: Path) -> None:
    snapshot = cached_folder(caches, "Salesforce/wikitext")
    write_parquet(snapshot / "wikitext-2-raw-v1/train-00000-of-00001.parquet", "text", ["small"])
    write_parquet(snapshot / "wikitext-103-raw-v1/train-00000-of-00001.parquet", "text", ["large"])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    )
    (snapshot / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert list(registry.texts("wikitext2", "train", offline=True)) == ["small"]


def test_a_downloaded_repository_without_a_card(caches: Path) -> None:
    snapshot = cached_folder(caches, "NeelNanda/pile-10k")
    write_parquet(snapshot / "data/train-00000-of-00001-4746b8785c874cc7.parquet", "text", ["a", "b"])
    assert list(registry.texts("pile", "train", offline=True)) == ["a", "b"]


def test_one_shard_is_enough_for_a_huge_set(caches: Path) -> None:
    shard = cached_folder(caches, "allenai/c4") / "en/c4-train.00000-of-01024.json.gz"
    shard.parent.mkdir()
    shard.write_bytes(gzip.compress(json.dumps({"text": "web", "url": "x"}).encode()))
    assert list(registry.texts("c4", "train", offline=True)) == ["web"]
    assert not registry.available("c4", "test", offline=True)


def test_the_parquet_branch_of_a_scripted_set(caches: Path) -> None:
    snapshot = cached_folder(caches, "ptb-text-only/ptb_text_only", "refs/convert/parquet")
    write_parquet(snapshot / "penn_treebank/test/0000.parquet", "sentence", ["no it was n't black monday"])
    assert list(registry.texts("ptb", "test", offline=True)) == ["no it was n't black monday"]


def test_an_empty_cache_has_nothing(caches: Path) -> None:
    for name in registry.TEXT_SETS:
        assert not registry.available(name, offline=True), name


def test_a_shard_known_to_be_missing_is_not_a_file(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: huggingface_hub._CACHED_NO_EXIST)
    assert not registry.available("c4", offline=True)
