"""The tokenizer in a GGUF file.

A byte-level one is built here, and splits text as llama.cpp does for the name that the file gives
(see :mod:`ulbq.models.pre_tokenizers`). SentencePiece's kinds split nothing, and transformers builds them, but for the
space that comes before text.
"""

import tempfile
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import TOKENIZER_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase, TokenizersBackend

from ulbq.errors import InputError
from ulbq.models.gguf_header import GgufHeader, read_header
from ulbq.models.pre_tokenizers import PRE_TOKENIZERS

_KEY = "tokenizer.ggml."
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def check_pre_tokenizer(header: GgufHeader, given: str) -> str | None:
    """What a person must know of how a file's tokenizer splits text; None where its name says all.

    Raises:
        InputError: the name is unknown here.
    """
    if header.values.get(f"{_KEY}model") != _BYTE_LEVEL:
        return None
    name = header.values.get(f"{_KEY}pre")
    if name is None:
        return (
            f"'{given}' does not say how its tokenizer splits text (tokenizer.ggml.pre): it is split by llama.cpp's "
            "default, which may not be how the model was trained."
        )
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f"'{given}' splits text by '{name}' (tokenizer.ggml.pre), which is unknown here.",
            hint="Use the model's original folder or Hub id instead of the GGUF file.",
        )
    return None


def read_tokenizer(path: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a file that :func:`check_pre_tokenizer` lets through; ``config`` is its model's.

    Raises:
        ValueError, TypeError, KeyError, OSError: it is damaged, or of a kind that transformers does not know.
    """
    header = read_header(path)
    kind = header.values.get(f"{_KEY}model")
    if kind == _BYTE_LEVEL:
        return _byte_level(header)
    built = _built(path, config)
    if kind == _SENTENCEPIECE and type(built) is TokenizersBackend:
        # Before any text, one that begins with a space too, and behind special tokens; transformers only leads words.
        space = [normalizers.Prepend("▁")] if header.values.get(f"{_KEY}add_space_prefix", True) else []
        built.backend_tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
        built.backend_tokenizer.pre_tokenizer = None
    return built


def _byte_level(header: GgufHeader) -> TokenizersBackend:
    tokens = [str(token) for token in header.array(f"{_KEY}tokens")]
    merges = [(left, right) for left, _, right in (str(m).partition(" ") for m in header.array(f"{_KEY}merges"))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if any(part not in vocabulary for left, right in merges for part in (left, right, left + right)):
        raise ValueError("a merge of the tokenizer has parts that are no tokens")
    pre = PRE_TOKENIZERS[str(header.values.get(f"{_KEY}pre", "default"))]
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.step()
    backend.decoder = decoders.ByteLevel()
    types = header.array(f"{_KEY}token_type")
    for kinds, special in (((TokenType.CONTROL, TokenType.UNKNOWN), True), ((TokenType.USER_DEFINED,), False)):
        found = [token for token, kind in zip(tokens, types, strict=False) if kind in kinds and token]
        # llama.cpp finds them in the text as it is given.
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in found])
    named = {name: header.values.get(f"{_KEY}{short}_token_id") for name, short in _SPECIAL.items()}
    numbers = {name: index for name, index in named.items() if isinstance(index, int)}
    if any(index >= len(tokens) for index in numbers.values()):
        raise ValueError("a special token is none of the vocabulary")
    template = header.values.get("tokenizer.chat_template")
    return TokenizersBackend(
        tokenizer_object=backend,
        chat_template=template if isinstance(template, str) else None,
        add_bos_token=bool(header.values.get(f"{_KEY}add_bos_token", pre.add_bos)),
        add_eos_token=bool(header.values.get(f"{_KEY}add_eos_token", False)),
        **{name: tokens[index] for name, index in numbers.items()},
    )


def _built(path: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers builds it, out of sight of files beside it, with which it would mix it.

    Its class is the one that ``AutoTokenizer`` finds, which first derives the configuration anew, for seconds.
    """
    kind: Any = TOKENIZER_MAPPING.get(type(config), TokenizersBackend)
    if kind is None or kind.__name__ == "MistralCommonBackend":
        kind = TokenizersBackend  # the other one reads Mistral's own files alone
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, path.name).symlink_to(path.resolve())
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, gguf_file=path.name)
    return tokenizer
