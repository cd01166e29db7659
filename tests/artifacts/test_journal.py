from pathlib import Path

import pytest

from tests.artifacts.sample import quantized
from ulbq.artifacts import BlockRecord
from ulbq.artifacts.journal import Journal
from ulbq.errors import InputError

FINGERPRINT = "ab" * 32
STEPS = {"block-0": {"loss": 0.5, "name": "größer"}, "block-1": [1, 2, None], "block-2": "line\nbreak"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def write(path: Path) -> None:
    journal = Journal.create(path, FINGERPRINT)
    for key, value in STEPS.items():
        journal.append(key, value)
    journal.close()


def load(path: Path) -> Journal:
    journal = Journal.load(path)
    assert journal is not None
    return journal


def test_steps_are_read_back(path: Path) -> None:
    write(path)
    assert Journal.fingerprint_at(path) == FINGERPRINT
    journal = load(path)
    assert journal.fingerprint == FINGERPRINT
    assert journal.entries == STEPS


def test_a_value_is_the_same_just_recorded_or_read_again(path: Path) -> None:
    journal = Journal.create(path, FINGERPRINT)
    journal.append("block", BlockRecord(index=0, start_error=float("inf"), end_error=1.0, steps=3, seconds=0.25))
    journal.append("layer", quantized().layers[0])
    journal.append("path", path)
    journal.append("pair", (1, 2))
    journal.close()
    assert load(path).entries == journal.entries
    assert journal.entries["pair"] == [1, 2]
    assert journal.entries["block"]["start_error"] == float("inf")


def test_the_last_value_of_a_key_counts(path: Path) -> None:
    journal = Journal.create(path, FINGERPRINT)
    journal.append("block", 1)
    journal.append("block", 2)
    journal.close()
    assert load(path).entries == {"block": 2}


def test_a_journal_torn_at_any_byte_keeps_its_whole_lines(path: Path) -> None:
    write(path)
    whole = path.read_bytes()
    header, *lines = whole.splitlines(keepends=True)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        if cut < len(header):
            assert Journal.load(path) is None
            assert Journal.fingerprint_at(path) is None
            continue
        finished = sum(sum(map(len, lines[: n + 1])) <= cut - len(header) for n in range(len(lines)))
        journal = load(path)
        assert journal.entries == dict(list(STEPS.items())[:finished])
        assert path.read_bytes() == header + b"".join(lines[:finished])
        journal.append("next", cut)
        journal.close()
        assert load(path).entries == {**dict(list(STEPS.items())[:finished]), "next": cut}


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\0" * 40 + b"\n", b"[1]\n", b'{"key": "a"}\n'])
def test_a_last_line_that_is_no_step_is_dropped(path: Path, tail: bytes) -> None:
    write(path)
    with path.open("ab") as file:
        file.write(tail)
    journal = load(path)
    journal.append("next", 1)
    journal.close()
    assert load(path).entries == {**STEPS, "next": 1}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_damage_before_the_last_line_is_said(path: Path, number: int) -> None:
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = b"scribble\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=f"damaged in line {number}") as caught:
        Journal.load(path)
    assert "`force=True`" in caught.value.hint


def test_no_journal(path: Path) -> None:
    assert Journal.load(path) is None


def test_what_json_cannot_say_is_refused_before_it_is_written(path: Path) -> None:
    journal = Journal.create(path, FINGERPRINT)
    with pytest.raises(TypeError, match="set has no JSON form"):
        journal.append("block", {1, 2})
    journal.append("block", 1)
    journal.close()
    assert load(path).entries == {"block": 1}
