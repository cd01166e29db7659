import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tests.data.conftest import text_rows, write_jsonl
from ulbq.data import files
from ulbq.data.files import read_rows, read_text_file, text_of
from ulbq.errors import InputError


def test_json_lines_with_blank_lines_between(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "zwei \\u00fc"}\n')
    assert list(read_text_file(path)) == ["one", "zwei ü"]


def test_gzipped_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert [row["text"] for row in read_rows(path)] == ["one", "two"]


def test_parquet_rows_come_in_order_across_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    numbers = [str(number) for number in range(25)]
    parquet.write_table(pyarrow.table({"text": numbers}), path, row_group_size=10)
    assert list(read_text_file(path)) == numbers


@given(text=st.text(alphabet=st.sampled_from("ab\n"), max_size=60), chunk=st.integers(1, 7))
def test_paragraphs_join_to_the_file(tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int) -> None:
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        assert "\n\n".join(read_text_file(path)) == text


def test_text_is_read_lazily(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows("one"))
    with path.open("a") as file:
        file.write("not JSON\n")
    texts = iter(read_text_file(path))
    assert next(texts) == "one"  # the broken line was not reached


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "whole", "instruction": "x", "output": "y"}, "whole"),
        ({"text": ""}, ""),
        ({"page": "an article"}, "an article"),
        ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n\n1 2\n\n3"),
        ({"instruction": "add", "input": "", "output": "3"}, "add\n\n3"),
        ({"question": "why?", "answer": "because"}, "why?\n\nbecause"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, "hi\n\nho"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, "hi\n\nho"),
        ({"text": 3}, None),
        ({"instruction": "add"}, None),
        ({"messages": []}, None),
        ({"label": 1}, None),
    ],
)
def test_layouts(row: dict[str, object], text: str | None) -> None:
    assert text_of(row) == text


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "one"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"line 2: not JSON \(Expecting value at column 9\)\.(\n|$)"),
        ("a.jsonl", b'{"text": "one"}\n[1]\n', "line 2: not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"label": 1}\n', "row 2: no text among the columns 'label'"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\\ud800 alone"}\n', "row 1: half of a surrogate pair"),
        ("a.txt", b"fine\n\n\xff", "not UTF-8"),
        ("a.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("a.jsonl.gz", b'{"text": "plain"}\n', "not a whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(json.dumps(text_rows("one" * 99)).encode(), mtime=0)[:-9],
            "not a whole gzip file",
        ),
        ("a.csv", b"text\none\n", "cannot be read as data"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        list(read_text_file(path))
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_folder_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        read_text_file(tmp_path / "a.jsonl")


def test_missing_file_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        read_text_file(tmp_path / "gone.txt")
