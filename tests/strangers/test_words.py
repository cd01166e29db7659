"""Data, templates and settings as people have them: each of them works, or says what is wrong with it."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import save_tiny, tiny_tokenizer
from tests.strangers.conftest import edit_json, reseal
from tests.told import Ulbq
from ulbq.data.files import read_rows, read_text_file
from ulbq.data.instructions import read_chats
from ulbq.data.prompts import Turn, lay_out, prompt_tokens
from ulbq.errors import InputError
from ulbq.progress import Silent

THINKS = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}"
)


def examples(path: Path, *rows: Any) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_chats(str(path), data_dir=None, offline=True, progress=Silent())


def test_a_template_that_opens_the_answer_itself(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    turns = [Turn("user", "hi"), Turn("assistant", "<hello>"), Turn("user", "bye"), Turn("assistant", "so long")]
    for count in (2, 4):
        pieces = lay_out("chat", turns[:count], tokenizer, where="x")
        assert tokenizer.decode([t for p in pieces if p.learnt for t in p.tokens]) == "".join(
            f"{turn.content}</s>\n" for turn in turns[1:count:2]
        )
    assert tokenizer.decode(pieces[0].tokens) == "<s>user\nhi</s>\n<s>assistant\n"
    # It is asked as it was taught.
    assert prompt_tokens("chat", "hi", tokenizer, where="x") == pieces[0].tokens


def test_a_template_that_writes_earlier_turns_anew_is_still_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + THINKS
    with pytest.raises(InputError, match="writes earlier turns anew"):
        lay_out("chat", [Turn("user", "hi"), Turn("assistant", "hello")], tokenizer, where="x")


def test_empty_answers_of_chats_are_not_learnt(tmp_path: Path) -> None:
    def chat(*answers: str | None) -> Any:
        return {"messages": [turn for answer in answers for turn in (
            {"role": "user", "content": "hi"}, {"role": "assistant", "content": answer})]}  # fmt: skip

    found = examples(tmp_path / "a.jsonl", chat("a"), chat(""), chat(" "), chat(None), chat("a", ""), chat("", "b"))
    assert [[turn.content for turn in one.turns] for one in found] == [["hi", "a"], ["hi", "a"], ["hi", "", "hi", "b"]]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    pieces = lay_out("chat", found[2].turns, tokenizer, where="x")
    assert [piece.learnt for piece in pieces] == [False, False, False, True]
    with pytest.raises(InputError, match="holds no answer"):
        examples(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "hi"}]})


def test_rows_whose_answer_is_null_are_passed_over(tmp_path: Path) -> None:
    row = {"instruction": "say", "output": "it"}
    assert len(examples(tmp_path / "a.jsonl", {**row, "output": None}, row)) == 1
    with pytest.raises(InputError, match="no question with an answer"):
        examples(tmp_path / "a.jsonl", row, {"instruction": "say"})


def test_rows_without_a_text_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert list(read_text_file(tmp_path / "a.jsonl")) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    with pytest.raises(InputError, match="row 2: no text"):
        list(read_text_file(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_file_may_be_one_array(name: str, tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    text = "\n  " + json.dumps(rows, indent=2)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert list(read_rows(path)) == rows
    assert list(read_text_file(path)) == ["one", "two"]
    (tmp_path / "b.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="row 1: not a JSON object"):
        list(read_rows(tmp_path / "b.json"))
    (tmp_path / "b.json").write_text("[{}, ")
    with pytest.raises(InputError, match="not JSON"):
        list(read_rows(tmp_path / "b.json"))
    (tmp_path / "b.jsonl").write_text("[{}]\n")
    with pytest.raises(InputError, match="line 1: not a JSON object"):
        list(read_rows(tmp_path / "b.jsonl"))


def test_a_tokenizer_that_needs_sentencepiece_names_it(
    packed: Path, ulbq: Ulbq, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    real = util.find_spec
    lacking = ("sentencepiece", "google")
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name in lacking else real(name, *more))
    os.rename(packed / "tokenizer.json", packed / "tokenizer.model")
    manifest = packed / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tokenizer.json", "tokenizer.model"))
    reseal(packed)
    told = ulbq("generate", packed, "-p", "hi", "-n", 1)
    assert "needs sentencepiece" in told.refused(4)
    assert "ulbq[sentencepiece]" in told.err


@pytest.mark.parametrize("bias", [True, False])
def test_qwen3_with_biases_is_no_gguf(bias: bool, ulbq: Ulbq, tmp_path: Path) -> None:
    dense = save_tiny("qwen3", tmp_path / "dense", attention_bias=bias)
    told = ulbq("convert", dense, "--to", "gguf", "-o", tmp_path / "g", "-q")
    if bias:
        assert "bias" in told.refused()
    else:
        assert told.code == 0, told.err


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("tokenizer_config.json", {"model_max_length": -1}),
        ("config.json", {"eos_token_id": "</s>"}),
        ("config.json", {"eos_token_id": [1, "x"]}),
        ("generation_config.json", {"eos_token_id": "</s>"}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
        ("generation_config.json", {"eos_token_id": []}),
        ("config.json", {"architectures": [5]}),
        ("config.json", {"architectures": "LlamaForCausalLM"}),
    ],
)
def test_settings_of_a_wrong_type(file: str, change: dict[str, Any], packed: Path, ulbq: Ulbq) -> None:
    edit_json(packed / file, **change)
    reseal(packed)
    ulbq("generate", packed, "-p", "hi", "-n", 1).refused()


@pytest.mark.parametrize("width", ["hidden_size", "intermediate_size"])
def test_a_model_of_no_width(width: str, dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    edit_json(dense / "config.json", **{width: 0})
    told = ulbq("quantize", dense, "--method", "rtn", "-o", tmp_path / "q", "-q")
    told.refused()
    assert "0" in told.err


def test_settings_that_are_nested_too_deeply(dense: Path, ulbq: Ulbq) -> None:
    (dense / "generation_config.json").write_text("[" * 100_000)
    assert "generation_config.json' cannot be read" in ulbq("generate", dense, "-p", "hi", "-n", 1).refused()


def test_strings_that_end_a_text_ask_for_nothing(dense: Path, ulbq: Ulbq, tmp_path: Path) -> None:
    edit_json(dense / "generation_config.json", stop_strings=["\n"])
    told = ulbq("generate", dense, "-p", "hi", "-n", 2)
    assert told.code == 0, told.err
    told = ulbq("convert", dense, "--to", "dense", "-o", tmp_path / "d", "-q")
    assert told.code == 0, told.err
    assert json.loads((tmp_path / "d" / "generation_config.json").read_text())["stop_strings"] == ["\n"]


def test_the_hint_of_eval_speaks_of_its_own_options(packed: Path, ulbq: Ulbq, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("ULBQ_DATA_DIR", raising=False)
    (tmp_path / "mirror").mkdir()
    told = ulbq("eval", packed, "--perplexity", "ptb", "--offline", "--data-dir", tmp_path / "mirror")
    assert "found nowhere" in told.refused(4)
    assert "--calibration" not in told.err


class TestReseal:
    def test_a_changed_template_is_taken_over(self, packed: Path, ulbq: Ulbq) -> None:
        (packed / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
        told = ulbq("generate", packed, "-p", "hi", "-n", 1)
        told.refused()
        assert "ulbq inspect --reseal" in told.err
        told = ulbq("inspect", packed, "--reseal", "-q")
        assert told.code == 0, told.err
        assert ulbq("generate", packed, "--chat", "-p", "hi", "-n", 1, "-q").code == 0
        assert ulbq("inspect", packed, "--verify", "-q").code == 0

    def test_a_new_side_file_is_listed(self, packed: Path, ulbq: Ulbq) -> None:
        (packed / "LICENSE").write_text("do as you like")
        told = ulbq("inspect", packed, "--reseal")
        assert told.code == 0
        assert "LICENSE" in json.loads((packed / "manifest.json").read_text())["files"]

    def test_weights_are_not(self, packed: Path, ulbq: Ulbq) -> None:
        before = (packed / "manifest.json").read_text()
        path = packed / "model-outer.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert "weights are not taken over" in ulbq("inspect", packed, "--reseal").refused()
        assert (packed / "manifest.json").read_text() == before

    def test_nothing_changed_changes_nothing(self, packed: Path, ulbq: Ulbq) -> None:
        before = (packed / "manifest.json").read_text()
        assert ulbq("inspect", packed, "--reseal", "-q").code == 0
        assert (packed / "manifest.json").read_text() == before
