"""Instruction sets: layouts, prompts, which tokens are learnt, and bad lines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.byte_tokenizer import ByteTokenizer
from tests.data.conftest import text_rows, write_jsonl
from tests.models.tiny import tiny_tokenizer
from ulbq.data.calibration import Calibration, calibration_samples, load_calibration, save_calibration
from ulbq.data.examples import training_text
from ulbq.errors import InputError, UsageError
from ulbq.progress import Silent

BYTES: Any = ByteTokenizer(bos=True)
PAIR = {"instruction": "Add 1 and 2.", "output": "It is 3."}
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "later"},
    {"role": "user", "content": "anyone"},
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def read(path: Path | str, tokenizer: Any = BYTES, **changes: Any) -> Calibration:
    values = {"samples": 1, "length": 400, "seed": 0, "template": None, "data_dir": None, "offline": True}
    return training_text(str(path), tokenizer, **{"progress": Silent(), **values, **changes})


def parts(found: Calibration, row: int = 0) -> tuple[list[int], list[int]]:
    """Tokens before the end that are not learnt, and those that are."""
    assert found.mask is not None
    taught = found.mask[row]
    end = int(taught.nonzero().max()) + 1
    return found.tokens[row, :end][~taught[:end]].tolist(), found.tokens[row][taught].tolist()


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": "Add 1 and 2.", "completion": "It is 3."},
        {"question": "Add 1 and 2.", "answer": "It is 3."},
        {**PAIR, "input": "", "answer": "3", "text": "all of it"},
        {"messages": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "It is 3."}]},
        {"conversations": [{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "It is 3."}]},
    ],
    ids=lambda row: ",".join(row),
)
def test_every_layout_gives_alpacas_prompt_and_teaches_the_answer_alone(row: dict[str, Any], tmp_path: Path) -> None:
    prompt, answer = parts(read(write_jsonl(tmp_path / "a.jsonl", [row])))
    assert prompt[0] == BYTES.bos_token_id
    told = ByteTokenizer.read(prompt[1:])
    assert told.startswith("Below is an instruction that describes a task. Write")
    assert told.endswith("### Instruction:\nAdd 1 and 2.\n\n### Response:\n")
    assert answer[-1] == BYTES.eos_token_id
    assert ByteTokenizer.read(answer[:-1]) == "It is 3."


def test_an_input_stands_apart_in_alpacas_prompt(tmp_path: Path) -> None:
    prompt, _ = parts(read(write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "input": "1, 2"}])))
    told = ByteTokenizer.read(prompt[1:])
    assert "paired with an input" in told
    assert told.endswith("### Input:\n1, 2\n\n### Response:\n")


def test_a_chat_template_lays_turns_out_and_every_answer_is_learnt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt, answers = parts(read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer))
    assert tokenizer.decode(answers) == "hello</s>\nlater</s>\n"
    assert tokenizer.decode(prompt) == (
        "<s>system\nBe short.</s>\n<s>user\nhi</s>\n<s>assistant\n<s>user\nbye</s>\n<s>assistant\n"
    )
    paired = read(write_jsonl(tmp_path / "b.jsonl", [{**PAIR, "input": "1, 2"}]), tokenizer)
    assert tokenizer.decode(parts(paired)[0]) == "<s>user\nAdd 1 and 2.\n\n1, 2</s>\n<s>assistant\n"
    alpaca = read(write_jsonl(tmp_path / "b.jsonl", [PAIR]), tokenizer, template="alpaca")
    assert "### Instruction" in tokenizer.decode(parts(alpaca)[0])


def test_a_template_that_writes_earlier_turns_anew_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(InputError, match="line 1: the chat template writes earlier turns anew"):
        read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InputError, match=r"line 1: the chat template refuses it \(no system here\)"):
        read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer)


def test_what_is_behind_an_answer_is_filled_up_and_not_learnt(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "a.jsonl", [PAIR, {**PAIR, "output": "3"}]), samples=2)
    assert found.mask is not None
    assert found.tokens.shape == found.mask.shape == (2, 400)
    for tokens, taught in zip(found.tokens, found.mask, strict=True):
        end = int(taught.nonzero().max()) + 1
        assert (tokens[end:] == BYTES.eos_token_id).all()
        assert tokens[end - 1] == BYTES.eos_token_id
    assert found.record()["taught_tokens"] == int(found.mask.sum()) == len("It is 3.") + len("3") + 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"instruction": "a", ', "not JSON"),
        ('["a"]', "not a JSON object"),
        ('{"instruction": "a"}', "no question with an answer among the columns 'instruction'"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "no text of user, assistant or system"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "no text of user, assistant or system"),
        ('{"messages": ["a"]}', "no text of user, assistant or system"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "'messages' holds no answer"),
        ('{"instruction": "a", "output": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # Blank lines are no rows, and count as lines.
    path.write_text(f"{json.dumps(PAIR)}\n\n\n{line}\n{json.dumps(PAIR)}\n")
    with pytest.raises(InputError, match="line 4: ") as caught:
        read(path)
    assert says in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_chat_of_many_turns_wants_a_template(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 1: a chat of more than a question"):
        read(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    with pytest.raises(UsageError, match="no chat template"):
        read(tmp_path / "a.jsonl", template="chat")


def test_a_file_of_texts_is_plain_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", text_rows("one two three", "four five six"))
    found = read(path, length=8)
    assert found.mask is None
    assert torch.equal(found.tokens, calibration_samples(str(path), BYTES, samples=1, length=8).tokens)
    with pytest.raises(UsageError, match="plain text"):
        read(path, template="alpaca")
    with pytest.raises(UsageError, match="neither a calibration set nor a data file"):
        read("nowhere")


def test_long_examples_are_cut_or_passed_over_and_that_is_said(tmp_path: Path) -> None:
    long = {**PAIR, "instruction": "x" * 500}
    heard = Heard()
    rows = write_jsonl(tmp_path / "a.jsonl", [long, {**PAIR, "output": "y" * 500}, long, PAIR])
    found = read(rows, samples=2, progress=heard)
    assert found.mask is not None
    assert found.mask.any(1).all()
    assert len(heard.notes) == 1
    assert "1 of 2 examples are cut at 400 tokens" in heard.notes[0]
    with pytest.raises(InputError, match="holds 2 examples, not 3; 2 more have their answer behind 400 tokens"):
        read(rows, samples=3)


def test_empty_answers_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    heard = Heard()
    rows = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "output": "\n"}, PAIR, {**PAIR, "output": ""}])
    assert ByteTokenizer.read(parts(read(rows, progress=heard))[1][:-1]) == "It is 3."
    assert "2 of 3 rows have an empty answer" in heard.notes[0]
    with pytest.raises(InputError, match="holds 1 examples, not 2"):
        read(rows, samples=2)


def test_a_seed_draws_the_same_examples(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "output": str(number)} for number in range(50)])
    drawn = [read(rows, samples=5, seed=seed).sha256 for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sets_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "llm-adapters" / "math" / "train.jsonl", [PAIR])
    write_jsonl(tmp_path / "llm-adapters" / "piqa" / "test.jsonl", [PAIR])
    write_jsonl(tmp_path / "tatsu-lab" / "alpaca" / "train.jsonl", [{**PAIR, "input": ""}])
    for spec in ("llm-adapters/math", str(tmp_path / "llm-adapters" / "math"), "alpaca"):
        found = read(spec, data_dir=tmp_path)
        assert ByteTokenizer.read(parts(found)[1][:-1]) == "It is 3."
    with pytest.raises(InputError, match="no train split") as caught:
        read("llm-adapters/piqa", data_dir=tmp_path)
    assert str(tmp_path / "llm-adapters" / "piqa" / "test.jsonl") in caught.value.hint


def test_what_is_learnt_is_saved_and_hashed_with_the_tokens(tmp_path: Path) -> None:
    found = read(write_jsonl(tmp_path / "a.jsonl", [PAIR, PAIR]), samples=2)
    assert found.mask is not None
    assert Calibration(found.name, found.tokens, 0).sha256 != found.sha256
    path = tmp_path / "samples.safetensors"
    save_calibration(path, found)
    again = load_calibration(path)
    assert again.mask is not None
    assert torch.equal(again.mask, found.mask)
    assert again.sha256 == found.sha256
    taken = read(path, samples=1, length=390)
    assert taken.mask is not None
    assert torch.equal(taken.mask, found.mask[:1, :390])
    with pytest.raises(InputError, match="answers begin behind 20 tokens"):
        read(path, length=20)


def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(InputError, match=r"a\.csv cannot be read as data") as caught:
        read(str(tmp_path / "a.csv"))
    assert ".jsonl" in caught.value.hint
