"""What lies beside a model's weights and travels with it: known kinds of files, from the model's own folder alone.

What is made from a model may be published. So nothing is copied that nobody knows, and no link is followed that leads
out of the folder: a stranger's LICENSE could be the reader's own key.
"""

import json
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ulbq import limits
from ulbq.artifacts.disk import write_atomically
from ulbq.artifacts.names import leads_out
from ulbq.errors import InputError

CHAT_TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's further chat templates, by transformers' name for it."""

_TOKENIZER = r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|tekken\.json"
_VOCABULARY = r"vocab\.(json|txt|bpe)|merges\.txt|[\w.-]+\.model|[\w.-]+\.tiktoken"
_SETTINGS = r"chat_template\.(jinja|json)|generation_config\.json|(\w+_)?(pre)?processor_config\.json"
_TERMS = r"([\w-]+[_-])?(licen[sc]e|copying|notices?|use_policy|usage_policy)([_-][\w.-]*?)?(\.txt|\.md|\.rst|\.pdf)?"
_KNOWN = re.compile(rf"({_TOKENIZER}|{_VOCABULARY}|{_SETTINGS}|{_TERMS})", re.IGNORECASE)

# Whose vocabularies have no other bound; the other settings are read by libraries that have none.
_LARGE = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"})

# What transformers writes into a tokenizer's configuration of how it was called, and not of the tokenizer.
_OF_THE_CALL = ("local_files_only", "gguf_file")


def side_files(folder: Path) -> list[Path]:
    """Files that belong to a folder's model beside configuration and weights, sorted.

    Tokenizer, chat templates, generation and processor settings, licence and terms; Python code is none of them.

    Raises:
        InputError: one is a link that leads out of the folder.
    """
    found = [*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*")]
    known = [file for file in sorted(found) if is_side_file(file.relative_to(folder).as_posix()) and file.is_file()]
    for file in known:
        check_link(file, folder)
    return known


def is_side_file(name: str) -> bool:
    """Whether a file, by its name relative to its folder, is of a kind that travels with a model."""
    folder, _, last = name.rpartition("/")
    return folder == CHAT_TEMPLATES and last.endswith(".jinja") if folder else _KNOWN.fullmatch(last) is not None


def check_link(file: Path, folder: Path) -> None:
    """Refuse a file of a folder whose content lies elsewhere. Raises InputError."""
    if leads_out(file, folder):
        raise InputError(
            f"'{file}' is a link that leads out of its folder, and would be copied into what is made from it.",
            hint="Put the file itself into the folder, if it belongs there.",
        )


def check_folder(folder: Path) -> None:
    """Look through a model's folder before anything is read from it.

    Raises:
        InputError: something there is neither a file nor a folder (a pipe would be waited on without end), settings or
            templates are larger than any, or a side file is a link that leads out.
    """
    for path in _entries(folder):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"'{path}' is neither a file nor a folder.", hint="Remove it from the model's folder.")
        most = limits.TOKENIZER_SIZE if path.name in _LARGE else limits.SETTINGS_SIZE
        # What nobody reads may be as large as it likes: a trainer's log of its steps, for one.
        if is_side_file(path.relative_to(folder).as_posix()) and path.stat().st_size > most:
            raise InputError(
                f"'{path}' holds {path.stat().st_size:,} bytes, more than the {most:,} that are read.",
                hint="Fetch the model again.",
            )
    side_files(folder)


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in a model's folder and in those of its sub-folders that are read; links that lead nowhere are not."""
    for place in (folder, folder / CHAT_TEMPLATES, folder / "adapter"):
        if place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if path.exists())


def copy_side_files(folder: Path, destination: Path) -> list[str]:
    """Copy a model's side files into another folder; returns their names. Raises InputError as :func:`side_files`."""
    return _copied(side_files(folder), folder, destination)


def copy_tree(folder: Path, destination: Path) -> list[str]:
    """Copy all files of a folder of our own making into another; returns their names."""
    return _copied([path for path in sorted(folder.rglob("*")) if path.is_file()], folder, destination)


def _copied(files: Sequence[Path], folder: Path, destination: Path) -> list[str]:
    names = [file.relative_to(folder).as_posix() for file in files]
    for file, name in zip(files, names, strict=True):
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, destination / name)
    return names


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, destination: Path) -> None:
    """Write a tokenizer that came out of a GGUF file, without the words of the call that read it."""
    tokenizer.save_pretrained(destination)
    path = destination / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in _OF_THE_CALL}
    write_atomically(path, (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode())
