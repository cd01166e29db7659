"""A tokenizer's file, tried out before it is trusted: in a process of its own, on text that any tokenizer takes."""

import importlib.util
import string
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ulbq import limits
from ulbq.artifacts.disk import sha256_file
from ulbq.errors import InputError, ResourceError

# What reads a SentencePiece model, each by a module that tells whether it is there.
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google"}

_HINT = "Put the original model's tokenizer.json beside the weights."
_FILE = "tokenizer.json"
_COUNTED: dict[str, int] = {}
"""Tokens that a file of some SHA-256 made of the text in this process: an artifact has the tokenizer of its model."""
_TEXT = f"The quick brown fox, 1234567890. {string.printable} äöü ß é ñ Ω я 漢字 かな 한국 👍🏽 \u00a0\u200b\n\n  x" * 4


def check_tokenizer(folder: Path, given: str) -> None:
    """Try a folder's ``tokenizer.json``, where it has one.

    Its normalizer may multiply the text, its patterns need not end, and its library, written in Rust, ends the whole
    process where it finds what it does not expect.

    Args:
        folder: of the model.
        given: what the model is called in errors.

    Raises:
        InputError: it breaks, goes beyond its bounds, or makes far more tokens than there is text.
        ResourceError: there is none, but a SentencePiece model, and what reads that is not installed.
    """
    file = folder / _FILE
    if not file.is_file():
        _check_packages(folder, given)
        return
    what = f"The tokenizer of '{given}'"
    digest = sha256_file(file)
    if (known := _COUNTED.get(digest)) is None:
        _COUNTED[digest] = known = limits.apart(lambda: _count(file), what, hint=_HINT)
    count: int = known
    size = len(_TEXT.encode())
    if count > limits.TOKENS_PER_BYTE * size:
        raise InputError(f"{what} makes {count:,} tokens of {size:,} bytes of text.", hint=_HINT)


def _check_packages(folder: Path, given: str) -> None:
    """Refuse a tokenizer of SentencePiece's where what reads it is not installed. Raises ResourceError."""
    lacking = [package for package, module in _SENTENCEPIECE.items() if importlib.util.find_spec(module) is None]
    if any(folder.glob("*.model")) and lacking:
        raise ResourceError(
            f"The tokenizer of '{given}' is SentencePiece's alone, and reading it needs {' and '.join(lacking)}.",
            hint="pip install 'ulbq[sentencepiece]'",
        )


def check_ids(values: Mapping[str, object], where: str) -> None:
    """Refuse token ids that are no numbers, and lists of none. Raises InputError.

    Args:
        values: settings, ``eos_token_id`` and the like among them.
        where: the file that says so.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        each = value if isinstance(value, list) else [value]
        if value == [] or not all(one is None or (isinstance(one, int) and not isinstance(one, bool)) for one in each):
            raise InputError(f"'{where}' says {name} {value!r}, which is no number of a token.")


def check_loaded(tokenizer: PreTrainedTokenizerBase, given: str) -> None:
    """Refuse a loaded tokenizer whose settings are of other types than all that use them take. Raises InputError."""
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length > 0:
        raise InputError(
            f"The tokenizer of '{given}' says model_max_length {length!r}, which is no length.", hint=_HINT
        )
    check_ids({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}, given)


def _count(file: Path) -> int:
    """Tokens that it makes of some text, nothing filled up or cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return len(tokenizer.encode(_TEXT, add_special_tokens=False).ids)
