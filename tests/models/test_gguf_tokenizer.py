import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.models.tiny import tiny_config, tiny_model
from tests.models.tiny_gguf import Vocabulary, write_tiny_gguf
from tests.models.tricky import GOLDEN, PAGE, golden, learned_merges, sentencepiece, vocabulary
from ulbq.config.convert import ConvertRequest
from ulbq.errors import InputError
from ulbq.models.gguf_header import read_header
from ulbq.models.pre_tokenizers import PRE_TOKENIZERS
from ulbq.models.source import ModelSource, default_model, resolve
from ulbq.pipeline.convert import convert

NAMES = list({pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}.values())
"""One name of each kind of split, the one that is written."""

SPACED = {"sentencepiece": None, "sentencepiece, no space first": False}

# llama.cpp's forms of these know no capitals but ASCII's, and no marks.
WORDS = ("αΒγ", "हिन्दी", "e\u0301")  # noqa: RUF001
DEPARTURES = {"tekken": WORDS, "gpt-4o": WORDS}

WRITTEN = [name for name in NAMES if name not in ("falcon", "bloom", "viking", "default")]


def gguf(path: Path, pre: str | None, words: Vocabulary | None = None, **options: object) -> Path:
    words = vocabulary(golden()["merges"]) if words is None else words
    config = tiny_config("llama", tied=False, vocab=max(len(words.tokens), 8), num_hidden_layers=1)
    return write_tiny_gguf(tiny_model(config), path, pre=pre, vocabulary=words, **options)


def spaced(path: Path, *, add_space: bool | None = None) -> Path:
    """A file with a tokenizer of SentencePiece's kind."""
    return gguf(path, None, sentencepiece(), add_space=add_space)


def tokens(source: ModelSource) -> list[list[int]]:
    return [source.tokenizer()(text).input_ids for text in PAGE]


def of_llama_cpp(python: Path, model: Path, folder: Path) -> list[list[int]]:
    """What llama.cpp makes of the page."""
    texts, out = folder / "texts.json", folder / "tokens.json"
    texts.write_text(json.dumps(PAGE), encoding="utf-8")
    script = Path(__file__).parents[1] / "export" / "readers" / "llama_cpp_tokens.py"
    subprocess.run([python, script, model, texts, out], check=True, capture_output=True, timeout=100)
    found: list[list[int]] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_the_tokens_that_llama_cpp_makes_of_it(name: str, tmp_path: Path) -> None:
    found, expected = tokens(resolve(gguf(tmp_path / "m.gguf", name))), golden()["tokens"][name]
    other = {text for text, ours, theirs in zip(PAGE, found, expected, strict=True) if ours != theirs}
    assert other == {text for text in PAGE for word in DEPARTURES.get(name, ()) if word in text}


def test_the_page_tells_all_splits_apart() -> None:
    found = golden()["tokens"]
    assert found.keys() == {*NAMES, "default model", *SPACED}
    assert all(found[one] != found[other] for one, other in combinations(found, 2))


@pytest.mark.parametrize("name", SPACED)
def test_sentencepiece_has_llama_cpps_tokens(name: str, tmp_path: Path) -> None:
    source = resolve(spaced(tmp_path / "m.gguf", add_space=SPACED[name]))
    assert source.notes == ()
    assert tokens(source) == golden()["tokens"][name]
    folder, _ = convert(ConvertRequest(source=str(source.path), to="dense", out=tmp_path / "d"))
    assert tokens(resolve(folder)) == tokens(source)


@pytest.mark.real
def test_the_default_model_has_llama_cpps_tokens(default_source: ModelSource) -> None:
    assert tokens(default_source) == golden()["tokens"]["default model"]
    assert len(default_source.tokenizer()("List:\n\n1. One\n2. Two").input_ids) == 10


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_made_of_a_file_splits_as_it_does(name: str, tmp_path: Path) -> None:
    source = resolve(gguf(tmp_path / "m.gguf", name))
    folder, _ = convert(ConvertRequest(source=str(source.path), to="dense", out=tmp_path / "d"))
    assert tokens(resolve(folder)) == tokens(source)
    assert [AutoTokenizer.from_pretrained(folder)(text).input_ids for text in PAGE] == tokens(source)
    back, _ = convert(ConvertRequest(source=str(folder), to="gguf", out=tmp_path / "g"))
    again = resolve(back / "model.gguf")
    assert read_header(again.path).values["tokenizer.ggml.pre"] == name
    assert tokens(again) == tokens(source)


def test_a_split_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.gguf' splits text by 'kimi-k9' \(tokenizer\.ggml\.pre\)") as caught:
        resolve(gguf(tmp_path / "m.gguf", "kimi-k9"))
    assert "original folder" in caught.value.hint


def test_a_file_that_names_no_split_has_llama_cpps_default_and_says_so(tmp_path: Path) -> None:
    source = resolve(gguf(tmp_path / "m.gguf", None))
    assert tokens(source) == golden()["tokens"]["default"]
    assert "does not say how its tokenizer splits text" in source.notes[0]
    assert resolve(gguf(tmp_path / "n.gguf", "qwen2")).notes == ()


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    words = vocabulary(golden()["merges"])
    for number, damaged in enumerate((words._replace(merges=["a nowhere"]), Vocabulary(["one token"], []))):
        with pytest.raises(InputError, match="has no tokenizer that transformers can read"):
            resolve(gguf(tmp_path / f"{number}.gguf", "qwen2", damaged)).tokenizer()


def test_tokens_of_their_own_are_found_whole(tmp_path: Path) -> None:
    tokenizer = resolve(gguf(tmp_path / "m.gguf", "deepseek-v3")).tokenizer()
    words = tokenizer.convert_ids_to_tokens(tokenizer("<think>a<｜fim▁hole｜><|im_start|>").input_ids)  # noqa: RUF001
    assert words == ["<think>", "a", "<｜fim▁hole｜>", "<|im_start|>"]  # noqa: RUF001
    ids = tokenizer("<think>a<|im_start|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"
    assert len(tokenizer) == len(vocabulary(golden()["merges"]).tokens)


@pytest.mark.parametrize(
    ("name", "says", "starts"), [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", True, True)]
)
def test_bos_comes_first_where_the_file_or_its_split_says_so(
    name: str, says: bool | None, starts: bool, tmp_path: Path
) -> None:
    tokenizer = resolve(gguf(tmp_path / "m.gguf", name, add_bos=says)).tokenizer()
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) is starts


def file_of(name: str, path: Path) -> Path:
    """The file whose golden tokens have this name."""
    if name == "default model":
        return default_model(offline=True).path
    return spaced(path, add_space=SPACED[name]) if name in SPACED else gguf(path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *SPACED, "default model"])
def test_the_tokens_are_llama_cpps(name: str, tmp_path: Path) -> None:
    from tests.export.test_targets_readers import environment

    model = file_of(name, tmp_path / "m.gguf")
    assert of_llama_cpp(environment("llama-cpp"), model, tmp_path) == golden()["tokens"][name]


def _write_golden(python: Path, folder: Path) -> None:
    GOLDEN.write_text(json.dumps({"merges": learned_merges(1000)}), encoding="utf-8")
    names = [*NAMES, *SPACED, "default model"]
    found = {name: of_llama_cpp(python, file_of(name, folder / "m.gguf"), folder) for name in names}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(ids, separators=(',', ':'))}" for name, ids in found.items())
    merges = json.dumps(golden()["merges"])
    GOLDEN.write_text(f'{{"merges": {merges},\n"tokens": {{\n{rows}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    # ULBQ_READERS=… python -m tests.models.test_gguf_tokenizer FOLDER writes the golden tokens.
    _write_golden(Path(os.environ["ULBQ_READERS"], "llama-cpp", "bin", "python"), Path(sys.argv[1]))
