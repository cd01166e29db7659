"""Generative tasks: which there are, and what their data must look like."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.sample import write_rows
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation.generative_tasks import GENERATIVE_NAMES, load_generative


@pytest.mark.slow
def test_no_name_is_one_of_lm_evals() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    # The name of a task, group or tag stands in its YAML file; to read them all through lm-eval takes longer.
    names = "|".join(map(re.escape, GENERATIVE_NAMES))
    named = re.compile(rf"^\s*(?:(?:task|group|tag):|-)\s*['\"]?(?:{names})['\"]?\s*$".encode(), re.MULTILINE)
    assert named.search(b"task: svamp\n")
    files = [file for file in Path(tasks.__file__).parent.rglob("*.y*ml") if named.search(file.read_bytes())]
    assert not files


def test_questions_come_in_order_up_to_the_limit(mirror: Path) -> None:
    found = load_generative(["svamp", "aqua"], limit=3, data_dir=mirror)
    svamp, aqua = found.tasks
    assert [one.expected for one in svamp.documents] == [0.0, 2.0, 4.0]
    assert [one.question for one in svamp.documents] == [f"What is {i} + {i}?" for i in range(3)]
    assert svamp.documents[2].where == f"{mirror}/llm-adapters/svamp/test.jsonl, line 3"
    assert [one.expected for one in aqua.documents] == ["A", "B", "C"]
    assert len(load_generative(["svamp"], data_dir=mirror).tasks[0].documents) == 5
    assert not found.groups


def test_a_group_takes_what_is_at_hand_and_names_the_rest(mirror: Path) -> None:
    found = load_generative(["commonsense", "arithmetic-cot"], data_dir=mirror)
    commonsense, arithmetic = found.groups
    assert commonsense.members == ("boolq-instruct", "piqa-instruct")
    assert "hellaswag-instruct" in commonsense.missing
    assert len(commonsense.members) + len(commonsense.missing) == 8
    assert arithmetic.members == ("gsm8k-cot", "svamp", "mawps", "aqua")
    assert not arithmetic.missing
    assert [one.task.name for one in found.tasks] == [*commonsense.members, *arithmetic.members]
    assert {one.task.new_tokens for one in found.tasks} == {32, 256}


def test_what_is_not_there_is_a_sentence(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ULBQ_DATA_DIR", raising=False)
    with pytest.raises(ResourceError, match=r"has no llm-adapters/siqa/test\.jsonl, which 'siqa-instruct'"):
        load_generative(["siqa-instruct"], data_dir=mirror)
    with pytest.raises(ResourceError, match="which 'commonsense' is scored on") as caught:
        load_generative(["commonsense"], data_dir=tmp_path)
    assert str(tmp_path) in caught.value.message
    with pytest.raises(ResourceError, match=r"^There is no llm-adapters/svamp/test\.jsonl"):
        load_generative(["svamp"])


def test_a_task_is_scored_once(mirror: Path) -> None:
    with pytest.raises(UsageError, match="'commonsense' and 'boolq-instruct' both contain the task 'boolq-instruct'"):
        load_generative(["commonsense", "boolq-instruct"], data_dir=mirror)
    assert len(load_generative(["svamp", "svamp"], data_dir=mirror).tasks) == 1


@pytest.mark.parametrize(
    ("name", "data", "row", "says"),
    [
        ("svamp", "svamp", {"answer": "3"}, "no text in column 'instruction'"),
        ("svamp", "svamp", {"instruction": " ", "answer": "3"}, "no text in column 'instruction'"),
        ("svamp", "svamp", {"instruction": "a", "answer": "three"}, "the answer 'three' is no number"),
        ("svamp", "svamp", {"instruction": "a", "answer": "nan"}, "the answer 'nan' is no number"),
        ("svamp", "svamp", {"instruction": "a"}, "the answer None is no number"),
        ("aqua", "aqua", {"instruction": "a", "answer": "F"}, "the answer 'F' is none of aqua's"),
        ("aqua", "aqua", {"instruction": "a", "answer": ["A"]}, "is none of aqua's"),
        (
            "boolq-instruct",
            "boolq",
            {"instruction": "a", "answer": True},
            "the answer True is none of boolq-instruct's",
        ),
    ],
)
def test_a_row_that_is_none_is_named_by_its_line(
    name: str, data: str, row: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = tmp_path / "llm-adapters" / data / "test.jsonl"
    write_rows(file, [row])
    file.write_text(f"\n{file.read_text()}")
    with pytest.raises(InputError, match=f"line 2: .*{says}"):
        load_generative([name], data_dir=tmp_path)


def test_broken_and_empty_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "llm-adapters" / "svamp" / "test.jsonl"
    write_rows(file, [])
    with pytest.raises(InputError, match=f"{file} is empty"):
        load_generative(["svamp"], data_dir=tmp_path)
    file.write_text(json.dumps({"instruction": "a", "answer": 1}) + "\n{\n")
    assert load_generative(["svamp"], limit=1, data_dir=tmp_path).tasks[0].documents[0].expected == 1.0
    with pytest.raises(InputError, match="line 2: not JSON"):
        load_generative(["svamp"], data_dir=tmp_path)
