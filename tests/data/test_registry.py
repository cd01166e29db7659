"""Which place is asked, in which order, and what is said when none has it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import httpx

from tests.data.conftest import text_rows, write_jsonl
from ulbq.data import hub
from ulbq.data.mirror import data_root, local_dataset_path
from ulbq.data.registry import TEXT_SETS, available, resolve_dataset, texts
from ulbq.errors import InputError, ResourceError, UsageError

WIKITEXT = "Salesforce/wikitext/wikitext-2-raw-v1"

pytestmark = pytest.mark.usefixtures("online", "no_sockets", "caches")


class FakeHub:
    """Stands for everything behind ``datasets`` and the Hub client, and notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.rows: list[dict[str, str]] = text_rows("from the Hub")
        self.error: BaseException | None = None
        self.lost: BaseException | None = None

    def load_dataset(self, path: str, **options: Any) -> Any:
        if Path(path).is_absolute():
            raise FileNotFoundError(path)
        self.calls.append({"path": path, **{key: value for key, value in options.items() if value is not None}})
        if self.error:
            raise self.error
        return self.iterate()

    def iterate(self) -> Iterator[dict[str, str]]:
        yield from self.rows
        if self.lost:
            raise self.lost


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    return fake


def mirror(root: Path, *found: str) -> Path:
    """A mirror with some texts as WikiText-2's training split."""
    write_jsonl(root / WIKITEXT / "train.jsonl", text_rows(*found))
    return root


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("wikitext2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "streaming": False}),
        (
            "c4",
            {
                "path": "allenai/c4",
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "streaming": True,
            },
        ),
        ("pile", {"path": "NeelNanda/pile-10k", "streaming": False}),
        (
            "redpajama",
            {
                "path": "DKYoon/SlimPajama-6B",
                "data_files": {"train": "data/train-00000-of-00048-ab2b35705f029d94.parquet"},
                "streaming": True,
            },
        ),
    ],
)
def test_what_the_hub_is_asked_for(fake_hub: FakeHub, name: str, call: dict[str, Any]) -> None:
    assert list(texts(name, "train")) == ["from the Hub"]
    assert fake_hub.calls == [{**call, "split": "train"}]


def test_ptb_is_fetched_as_a_file(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*names: str, **options: str) -> str:
        asked.append((names, options))
        return str(write_jsonl(tmp_path / "0000.jsonl", [{"sentence": "one"}]))

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert list(texts("ptb", "validation")) == ["one"]
    names = ("ptb-text-only/ptb_text_only", "penn_treebank/validation/0000.parquet")
    assert asked == [(names, {"repo_type": "dataset", "revision": "refs/convert/parquet"})]
    assert fake_hub.calls == []


def test_alpaca_joins_what_is_not_empty(fake_hub: FakeHub) -> None:
    fake_hub.rows = [
        {"instruction": "add", "input": "1 2", "output": "3", "text": "Below is an instruction"},
        {"instruction": "sing", "input": "", "output": "la", "text": "Below is an instruction"},
    ]
    assert list(texts("alpaca", "train")) == ["add\n\n1 2\n\n3", "sing\n\nla"]


def test_the_mirror_comes_first(tmp_path: Path, fake_hub: FakeHub) -> None:
    mirror(tmp_path, "", " = One = \n", "")
    assert list(texts("wikitext2", "train", data_dir=tmp_path)) == ["", " = One = \n", ""]
    assert available("wikitext2", data_dir=tmp_path, offline=True)
    assert fake_hub.calls == []


def test_the_cache_comes_second(tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_rows", lambda wanted: text_rows(f"cached {wanted.split}"))
    assert list(texts("wikitext2", "test", data_dir=mirror(tmp_path, "only train"))) == ["cached test"]
    assert fake_hub.calls == []


def test_the_hub_comes_last(tmp_path: Path, fake_hub: FakeHub) -> None:
    (tmp_path / "Salesforce").mkdir()
    assert list(texts("wikitext2", "train", data_dir=tmp_path)) == ["from the Hub"]


def test_any_data_set_resolves_alike(tmp_path: Path, fake_hub: FakeHub) -> None:
    write_jsonl(tmp_path / "baber/piqa/validation.jsonl", [{"goal": "sit"}])
    write_jsonl(tmp_path / "openai/gsm8k/main/test.jsonl", [{"question": "1+1"}])
    assert list(resolve_dataset("baber/piqa", None, "validation", data_dir=tmp_path)) == [{"goal": "sit"}]
    assert list(resolve_dataset("openai/gsm8k", "main", "test", data_dir=tmp_path)) == [{"question": "1+1"}]
    assert list(resolve_dataset("openai/gsm8k", "main", "train", data_dir=tmp_path)) == text_rows("from the Hub")
    assert fake_hub.calls == [{"path": "openai/gsm8k", "name": "main", "split": "train", "streaming": False}]


@pytest.mark.parametrize("environment", [False, True])
def test_offline_asks_nobody_and_names_the_three_places(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, environment: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", environment)
    for name in TEXT_SETS:
        with pytest.raises(ResourceError) as caught:
            texts(name, "train", data_dir=tmp_path, offline=not environment)
        for place in (str(tmp_path), *hub.cache_folders(), "the Hub (the network is off)"):
            assert place in caught.value.message
        assert "`data_dir`" in caught.value.hint
        assert not available(name, data_dir=tmp_path, offline=not environment)
    assert fake_hub.calls == []


LOST = httpx.ConnectError("connection reset")  # not an OSError


@pytest.mark.parametrize(
    ("error", "expected", "exit_code"),
    [
        (ConnectionError("no route"), ResourceError, 4),
        (LOST, ResourceError, 4),
        (DatasetNotFoundError("gated"), InputError, 3),
        (ValueError("Unknown split"), InputError, 3),
        (RuntimeError("Dataset scripts are no longer supported"), InputError, 3),
    ],
)
def test_what_the_hub_refuses(fake_hub: FakeHub, error: Exception, expected: type, exit_code: int) -> None:
    fake_hub.error = error
    with pytest.raises(expected) as caught:
        texts("wikitext2", "train")
    assert caught.value.exit_code == exit_code
    assert "Salesforce/wikitext (wikitext-2-raw-v1), split 'train'" in caught.value.message
    assert caught.value.hint


def test_a_lost_network_is_found_out_before_any_retries(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, timeout: float, **__: object) -> None:
        assert timeout <= 10
        raise LOST

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lost)
    assert not available("wikitext2")
    with pytest.raises(ResourceError, match="found nowhere"):
        texts("wikitext2", "train")
    assert fake_hub.calls == []


def test_a_data_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))

    def absent(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", absent)
    with pytest.raises(InputError, match="no usable nobody/nothing, split 'train'"):
        resolve_dataset("nobody/nothing", None, "train")


def test_a_network_lost_on_the_way(fake_hub: FakeHub) -> None:
    fake_hub.lost = LOST
    found = texts("c4", "train")
    assert next(found) == "from the Hub"
    with pytest.raises(ResourceError, match="allenai/c4"):
        next(found)


def test_without_the_package_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    assert list(texts("wikitext2", "train", data_dir=mirror(tmp_path, "one"))) == ["one"]
    with pytest.raises(ResourceError, match="needs the package datasets"):
        texts("wikitext2", "train")


def test_rows_without_the_column_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / WIKITEXT / "train.jsonl", [*text_rows("one"), {"page": "two"}])
    with pytest.raises(InputError, match="wikitext2, row 2: no text in column 'text'"):
        list(texts("wikitext2", "train", data_dir=tmp_path))


def test_roles(fake_hub: FakeHub) -> None:
    list(texts("c4", "test"))
    assert fake_hub.calls[0]["split"] == "validation"
    assert fake_hub.calls[0]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    with pytest.raises(UsageError, match="'pile' has no test text"):
        texts("pile", "test")


def test_unknown_sets_come_with_what_is_close() -> None:
    with pytest.raises(UsageError) as caught:
        texts("wikitext", "train")
    assert caught.value.hint == "Try wikitext2."
    with pytest.raises(UsageError) as caught:
        texts("zzz", "train")
    assert "alpaca" in caught.value.hint


def test_the_option_wins_over_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = mirror(tmp_path / "a", "a"), mirror(tmp_path / "b", "b")
    assert data_root() is None
    monkeypatch.setenv("ULBQ_DATA_DIR", str(first))
    assert list(texts("wikitext2", "train")) == ["a"]
    assert list(texts("wikitext2", "train", data_dir=second)) == ["b"]
    assert local_dataset_path("Salesforce/wikitext") == str(first / "Salesforce/wikitext")
    assert local_dataset_path("baber/piqa") is None
    with pytest.raises(InputError, match="no data folder") as caught:
        data_root(tmp_path / "gone")
    assert "`data_dir`" in caught.value.hint
    monkeypatch.setenv("ULBQ_DATA_DIR", str(tmp_path / "gone"))
    with pytest.raises(InputError) as caught:
        data_root()
    assert "ULBQ_DATA_DIR" in caught.value.hint


def test_no_mirror_no_local_path() -> None:
    assert local_dataset_path("baber/piqa") is None


def test_the_real_mirror_loads_through_datasets(data_dir: Path) -> None:
    """What lm-eval does with :func:`local_dataset_path`."""
    path = local_dataset_path("allenai/ai2_arc", data_dir)
    easy = datasets.load_dataset(path, "ARC-Easy", split="test", streaming=True)
    assert next(iter(easy)) == next(iter(resolve_dataset("allenai/ai2_arc", "ARC-Easy", "test", data_dir=data_dir)))
