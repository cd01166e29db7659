"""What fine-tuning learns from: answers alone, the same ones held out, several sets together, blocks of text."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.byte_tokenizer import ByteTokenizer
from tests.data.conftest import text_rows, write_jsonl
from ulbq.data.examples import ExampleSet, draw_examples
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.progress import Silent

BYTES: Any = ByteTokenizer(bos=True)
END = 257


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)


def draw(*specs: Path | str, **changes: Any) -> ExampleSet:
    values: dict[str, Any] = {"template": None, "samples": None, "heldout": 1, "length": 400, "seed": 0}
    values |= {"data_dir": None, "offline": True, "progress": Silent()}
    return draw_examples([str(spec) for spec in specs], BYTES, **{**values, **changes})


def rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(count)]


def test_the_answer_and_its_end_are_learnt_and_nothing_else(tmp_path: Path) -> None:
    found = draw(write_jsonl(tmp_path / "a.jsonl", rows(5)))
    assert (len(found.train), len(found.validation), found.template) == (4, 1, "alpaca")
    for example in (*found.train, *found.validation):
        answer = [token for token, learnt in zip(example.tokens, example.mask, strict=True) if learnt]
        prompt = [token for token, learnt in zip(example.tokens, example.mask, strict=True) if not learnt]
        assert answer[-1] == END
        assert BYTES.read(answer[:-1]).startswith("answer ")
        assert prompt[0] == BYTES.bos_token_id
        assert BYTES.read(prompt[1:]).endswith("### Response:\n")
    assert found.record()["taught_tokens"] == 4 * len("answer 0" + "E")


def test_the_same_examples_are_held_out_however_many_train(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows(40))
    few, many = draw(file, samples=3, heldout=4), draw(file, samples=30, heldout=4)
    assert few.validation == many.validation
    assert few.train == many.train[:3]
    assert not set(map(str, many.validation)) & set(map(str, many.train))
    assert few.sha256 != many.sha256 != draw(file, samples=30, heldout=4, seed=1).sha256
    assert many.sha256 == draw(file, samples=30, heldout=4).sha256


def test_gsm8k_is_read_from_its_configuration_and_taught_its_last_words(tmp_path: Path) -> None:
    made = [{"question": f"{n} and 1?", "answer": f"<<{n}+1={n + 1}>>\n#### {n + 1}"} for n in range(3)]
    write_jsonl(tmp_path / "openai/gsm8k/main/train.jsonl", made)
    found = draw("openai/gsm8k", template="gsm8k", data_dir=tmp_path)
    text = BYTES.read(found.train[0].tokens[1:-1])
    assert "First think step by step" in text
    assert "\nThe final answer is: " in text
    assert "####" not in text


def test_of_several_sets_those_at_hand_count_and_the_others_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "some/a/train.jsonl", rows(4))
    write_jsonl(tmp_path / "some/b/test.jsonl", rows(4))
    write_jsonl(tmp_path / "some/c/train.jsonl", rows(5))
    heard = Heard()
    found = draw("some/a", "some/b", "some/c", data_dir=tmp_path, progress=heard)
    assert found.sources == ("some/a", "some/c")
    assert len(found.train) == 8
    assert any("left out: some/b." in said for said in heard.said)
    with pytest.raises(ResourceError, match="None of some/b, some/d"):
        draw("some/b", "some/d", data_dir=tmp_path)


def test_text_is_cut_into_blocks_and_all_of_it_is_learnt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "Salesforce/wikitext/wikitext-2-raw-v1/train.jsonl", text_rows("abcdef" * 10))
    write_jsonl(tmp_path / "Salesforce/wikitext/wikitext-2-raw-v1/validation.jsonl", text_rows("xyz" * 10))
    found = draw("wikitext2", length=11, heldout=2, data_dir=tmp_path)
    assert [BYTES.read(example.tokens[1:]) for example in found.validation] == ["xyzxyzxyzx", "yzxyzxyzxy"]
    assert {BYTES.read(example.tokens[1:]) for example in found.train} == {"abcdefabcd", "efabcdefab", "cdefabcdef"}
    assert len(found.train) == 6
    assert all(all(example.mask) and len(example.tokens) == 11 for example in found.train)
    assert found.template is None
    with pytest.raises(UsageError, match="plain text"):
        draw("wikitext2", template="alpaca", length=11, data_dir=tmp_path)
    with pytest.raises(InputError, match="6 blocks of 11 tokens to train on and 2 to hold out, not 7 and 2"):
        draw("wikitext2", length=11, heldout=2, samples=7, data_dir=tmp_path)


def test_long_answers_are_cut_and_late_ones_passed_over(tmp_path: Path) -> None:
    made = [*rows(3), {"instruction": "long " * 100, "output": "never seen"}]
    heard = Heard()
    found = draw(write_jsonl(tmp_path / "a.jsonl", made), length=170, progress=heard)
    assert len(found.train) == 2
    assert "1 were passed over" in heard.said[0]
    with pytest.raises(InputError, match="holds 3 examples, not 4; 1 more have their answer behind 170 tokens"):
        draw(tmp_path / "a.jsonl", length=170, samples=3)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        draw(file)
    with pytest.raises(UsageError, match="neither a text, nor an instruction set"):
        draw("nothing")
