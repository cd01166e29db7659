"""The tokenizer's part of a GGUF file.

llama.cpp has tokenizers of its own; a file names one of them and gives it tokens and merges. Which regular expressions
split text before the merges is not in the file: llama.cpp knows a list of them by name (``tokenizer.ggml.pre``). A
tokenizer whose split is not known here is refused, because a file with another one's would tokenize wrongly and say
nothing.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ulbq.errors import InputError
from ulbq.models.pre_tokenizers import DIGIT, GPT2, PRE_TOKENIZERS
from ulbq.models.source import ModelSource


def check_tokenizer(source: ModelSource) -> str | None:
    """What a person must know of how llama.cpp tokenizes otherwise. Raises InputError: llama.cpp cannot be given it."""
    backend = _backend(source)
    _, split = _kind(source, backend)
    whole = bool(backend["model"].get("ignore_merges"))
    if not split or whole == PRE_TOKENIZERS[split].ignore_merges or not (words := _unmerged(backend)):
        return None
    here, there = ("takes whole", "merges") if whole else ("merges", "takes whole")
    return (
        f"llama.cpp's '{split}' {there} words that the tokenizer of '{source.given}' {here}: {len(words)} of the "
        f"vocabulary, such as {words[0]!r}."
    )


def add_tokenizer(writer: GGUFWriter, source: ModelSource, vocab_size: int) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer does not have are filled up as unused tokens.

    Raises:
        InputError: the tokenizer is one that llama.cpp does not have.
    """
    tokenizer, backend = source.tokenizer(), _backend(source)
    kind, split = _kind(source, backend)
    model = backend["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {token["id"]: token for token in backend["added_tokens"]}
    known = {index: token for token, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens = [known.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    unknown = tokenizer.unk_token_id
    types = [_type(index, known, added, unknown, spaced=kind == "llama") for index in range(vocab_size)]
    writer.add_tokenizer_model(kind)
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        # SentencePiece merges what has the highest score first: a token's is the place of its merge in the list.
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        writer.add_token_scores([-float(ranks[token]) if token in ranks else 0.0 for token in tokens])
        writer.add_add_space_prefix(_prefixes(backend))
    else:
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    _add_special(writer, tokenizer)


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if isinstance(index, int):
            add(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _backend(source: ModelSource) -> dict[str, Any]:
    fast = getattr(source.tokenizer(), "backend_tokenizer", None)
    if fast is None:
        raise _unknown(source, "it has no tokenizer.json")
    backend: dict[str, Any] = json.loads(fast.to_str())
    return backend


def _kind(source: ModelSource, backend: dict[str, Any]) -> tuple[str, str]:
    """llama.cpp's tokenizer, and its name for the split. Raises InputError."""
    model = backend["model"]
    if model["type"] != "BPE":
        raise _unknown(source, f"a {model['type']} model is none that this writes")
    if model.get("byte_fallback"):
        return "llama", ""
    steps = _steps(backend.get("pre_tokenizer"))
    normalizers = [step["type"] for step in _steps(backend.get("normalizer"))]
    # Composed characters: llama.cpp leaves the normal form to whoever writes the text, for every file of Qwen's.
    if any(name != "NFC" for name in normalizers):
        raise _unknown(source, f"it normalizes text ({', '.join(normalizers)})")
    patterns, whole = _patterns(steps), bool(model.get("ignore_merges"))
    fitting = [name for name, pre in PRE_TOKENIZERS.items() if pre.patterns == patterns]
    if not fitting:
        raise _unknown(source, "it splits text in a way that is not among those known here")
    return "gpt2", next((name for name in fitting if PRE_TOKENIZERS[name].ignore_merges == whole), fitting[0])


def _patterns(steps: list[dict[str, Any]]) -> tuple[str, ...]:
    """Regular expressions that text is split by, one after the other; none where the steps do anything else."""
    found: list[str] = []
    for step in steps[:-1]:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            # Only what matches is kept, and that is all: these are written for patterns that match any text.
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True} if (
                len(steps) == 2
            ):
                found.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                found.append(DIGIT)
            case _:
                return ()
    match steps[-1:]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}]:
            found += [GPT2] if splits else []
        case _:
            return ()
    return tuple(pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in found)


def _unmerged(backend: dict[str, Any]) -> list[str]:
    """Words of the vocabulary that merges alone do not make: ``ignore_merges`` is told by them."""
    merging = Tokenizer.from_str(json.dumps(backend | {"model": backend["model"] | {"ignore_merges": False}}))
    added = {token["content"] for token in backend["added_tokens"]}
    apart = [
        token for token in backend["model"]["vocab"] if token not in added and len(merging.model.tokenize(token)) != 1
    ]
    words = [merging.decoder.decode([token]) for token in apart]
    # No word is what the split takes apart, nor a part of a character.
    splits = merging.pre_tokenizer.pre_tokenize_str
    return [word for word in words if "\ufffd" not in word and len(splits(word)) == 1]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part.get("pretokenizers", part.get("normalizers", [part])))


def _type(index: int, known: dict[int, str], added: dict[int, Any], unknown: int | None, *, spaced: bool) -> TokenType:
    if index not in known:
        return TokenType.UNUSED
    token = known[index]
    if spaced and index == unknown:
        return TokenType.UNKNOWN
    if spaced and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return TokenType.BYTE
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL


def _prefixes(backend: dict[str, Any]) -> bool:
    """Whether a tokenizer of SentencePiece's kind puts a space before the text."""
    steps = [*_steps(backend.get("normalizer")), *_steps(backend.get("pre_tokenizer"))]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _unknown(source: ModelSource, why: str) -> InputError:
    return InputError(
        f"The tokenizer of '{source.given}' cannot be written for llama.cpp: {why}.",
        hint="Convert with `to=dense`, and let llama.cpp's own convert_hf_to_gguf.py write the GGUF file.",
    )
