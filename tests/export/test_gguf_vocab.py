import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from tests.models.tiny import save_tiny
from ulbq.errors import InputError
from ulbq.export.gguf_vocab import add_tokenizer, check_tokenizer
from ulbq.models.source import ModelSource, resolve

# As the models' own tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ\u30a0-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(*patterns: str, removed: bool = False) -> list[dict[str, Any]]:
    how = {"behavior": "Removed", "invert": True} if removed else {"behavior": "Isolated", "invert": False}
    return [{"type": "Split", "pattern": {"Regex": pattern}, **how} for pattern in patterns]


def model(folder: Path, steps: list[dict[str, Any]], *, normalizer: Any = None, **changes: Any) -> ModelSource:
    """A tiny Llama whose tokenizer splits by these steps."""
    path = save_tiny("llama", folder) / "tokenizer.json"
    backend = json.loads(path.read_text(encoding="utf-8"))
    backend |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "normalizer": normalizer}
    backend["model"] |= changes
    path.write_text(json.dumps(backend), encoding="utf-8")
    return resolve(folder)


def written(source: ModelSource, path: Path) -> dict[str, Any]:
    """What the file says of the tokenizer."""
    writer = GGUFWriter(path, "llama")
    add_tokenizer(writer, source, source.config.vocab_size)
    return {name: value.value for name, value in writer.kv_data[0].items()}


@pytest.mark.parametrize(
    ("name", "steps", "whole"),
    [
        ("gpt-2", [WORDS], False),
        ("smollm", [DIGITS, WORDS], False),
        ("llama-bpe", [*split(LLAMA3), BYTES], True),
        ("smaug-bpe", [*split(LLAMA3), BYTES], False),
        ("smaug-bpe", [*split(LLAMA3, removed=True), BYTES], False),
        ("qwen35", [*split(QWEN35), BYTES], False),
        ("tekken", [*split(TEKKEN), BYTES], True),
        ("gpt-4o", [*split(GPT4O), BYTES], False),
        ("gpt-4o", [*split(GPT4O, removed=True), BYTES], False),
        ("deepseek-v3", [*split(*DEEPSEEK), BYTES], False),
        ("deepseek-coder", [*split(*CODER), DIGITS, BYTES], False),
    ],
)
def test_each_split_has_llama_cpps_name(name: str, steps: list[dict[str, Any]], whole: bool, tmp_path: Path) -> None:
    source = model(tmp_path / "m", steps, normalizer={"type": "Sequence", "normalizers": []}, ignore_merges=whole)
    assert check_tokenizer(source) is None
    said = written(source, tmp_path / "m.gguf")
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", name)


@pytest.mark.parametrize(
    "steps",
    [
        split(LLAMA3),
        [*split(LLAMA3), WORDS | {"add_prefix_space": True}],
        [*split("another"), BYTES],
        [*split(*DEEPSEEK, removed=True), BYTES],
        [WORDS, *split(LLAMA3), BYTES],
    ],
)
def test_another_split_is_refused(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="splits text in a way that is not among those known here"):
        check_tokenizer(model(tmp_path / "m", steps))


def test_a_normal_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"normalizes text \(Lowercase\)"):
        check_tokenizer(model(tmp_path / "m", [WORDS], normalizer={"type": "Lowercase"}))
    assert check_tokenizer(model(tmp_path / "n", [WORDS], normalizer={"type": "NFC"})) is None


@pytest.mark.parametrize("whole", [True, False])
def test_words_that_merges_do_not_make_are_told_where_it_matters(whole: bool, tmp_path: Path) -> None:
    pattern, name = (GPT4O, "gpt-4o") if whole else (TEKKEN, "tekken")
    steps = [*split(pattern), BYTES]
    assert check_tokenizer(model(tmp_path / "m", steps, ignore_merges=whole)) is None
    source = model(tmp_path / "n", steps, ignore_merges=whole, merges=[])
    said = check_tokenizer(source)
    here, there = ("takes whole", "merges") if whole else ("merges", "takes whole")
    assert said is not None
    assert f"llama.cpp's '{name}' {there} words that the tokenizer of '{source.given}' {here}: " in said
    assert written(source, tmp_path / "n.gguf")["tokenizer.ggml.pre"] == name
