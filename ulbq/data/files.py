"""A user's own data files, and those of a mirror, read lazily: one row or one text at a time."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ulbq.errors import InputError, ResourceError

Row = Mapping[str, Any]

ROW_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
TEXT_SUFFIXES = (".txt", *ROW_SUFFIXES)

_CHUNK = 1 << 20  # characters read from a .txt file at a time
_WHOLE_TEXT = ("text", "content", "page")
QUESTION = ("instruction", "prompt", "question", "query")
CONTEXT = ("input", "context")
ANSWER = ("output", "response", "completion", "answer")
CHAT = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""What sides of a chat are called, by their names in files."""

WriteChat = Callable[[str, Sequence[Any]], str | None]
"""Writes the turns of a chat as text, given the words that name the row; None where they hold none."""


def suffix_of(path: Path) -> str:
    """The ending that says how a file is read, such as ``.parquet`` or ``.jsonl.gz``."""
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return inner + (".gz" if name.endswith(".gz") else "")


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON-lines (plain or gzipped) or Parquet file, in order.

    Raises:
        InputError: no such file, another ending, or a broken file; a broken line is named by its number.
        ResourceError: Parquet without pyarrow installed.
    """
    return (row for _, row in numbered_rows(path))


def numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows as :func:`read_rows` gives them, each with its line in the file; else with its number. From 1 on.

    A ``.json`` file may be one array of rows.
    """
    require_file(path)
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return enumerate(_parquet_rows(path), start=1)
    if suffix in ROW_SUFFIXES:
        return _json_rows(path)
    raise _unreadable(path, ROW_SUFFIXES)


def joined_turns(where: str, turns: Sequence[Any]) -> str | None:
    """What was said in a chat, joined with blank lines."""
    contents = [first(turn, ("content", "value")) for turn in turns if isinstance(turn, Mapping)]
    said = [content for content in contents if content]
    return "\n\n".join(said) if said else None


def read_text_file(path: Path, chat: WriteChat = joined_turns) -> Iterator[str]:
    r"""Texts of a ``.txt``, JSON-lines or Parquet file.

    A ``.txt`` file comes apart at its blank lines, so that joining the pieces with ``"\n\n"`` gives the file back.
    A row's text is its column ``text`` (or ``content``, ``page``); else its instruction, input and output joined with
    blank lines, or its chat as ``chat`` writes it. Rows whose text is null are passed over.

    Raises:
        InputError: as :func:`read_rows`; or a row holds no text, named by its number.
        ResourceError: as :func:`read_rows`.
    """
    require_file(path)
    if suffix_of(path) == ".txt":
        return _paragraphs(path)
    if suffix_of(path) in ROW_SUFFIXES:
        return _row_texts(path, chat)
    raise _unreadable(path, TEXT_SUFFIXES)


def text_of(row: Row, where: str = "", chat: WriteChat = joined_turns) -> str | None:
    """The text of one row, by the layouts that :func:`read_text_file` names; None where it has none of them."""
    whole = first(row, _WHOLE_TEXT)
    if whole is not None:
        return whole
    question, answer = first(row, QUESTION), first(row, ANSWER)
    if question is not None and answer is not None:
        return "\n\n".join(part for part in (question, first(row, CONTEXT), answer) if part)
    for name in CHAT:
        if isinstance(row.get(name), list):
            return chat(where, row[name])
    return None


def first(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of some columns that holds text; None where none does."""
    return next((row[name] for name in names if isinstance(row.get(name), str)), None)


def _row_texts(path: Path, chat: WriteChat) -> Iterator[str]:
    for number, row in enumerate(read_rows(path), start=1):
        text = text_of(row, f"{path}, row {number}", chat)
        if text is None and any(row.get(name, 0) is None for name in _WHOLE_TEXT):
            continue  # published sets have some rows without
        if text is None:
            raise InputError(
                f"{path}, row {number}: no text among the columns {', '.join(map(repr, row)) or '(none)'}.",
                hint='Texts are strings: name the column "text", or use instruction/output or messages.',
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}, row {number}: half of a surrogate pair, which is no text.", hint="Take that row out."
            ) from error
        yield text


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    open_binary = gzip.open if path.suffix.lower() == ".gz" else Path.open
    try:
        with open_binary(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.lstrip()[:1] == b"[" and not suffix_of(path).startswith(".jsonl"):
                    yield from _array_rows(path, line + lines.read())
                    return
                if line.strip():
                    yield number, _json_row(path, number, line)
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path} is not a whole gzip file.", hint="Fetch it again.") from error


def _array_rows(path: Path, text: bytes) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}).", hint="It begins as an array of rows.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: not a JSON object.", hint="Each row is one JSON object.")
        yield number, row


def _json_row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        # A decoder's own words count lines from this one on, and would name another line of the file.
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{path}, line {number}: not JSON ({why}).", hint="Each line is one JSON object.") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number}: not a JSON object.", hint="Each line is one JSON object.")
    return row


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ResourceError(f"Reading {path} needs pyarrow.", hint="pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}).", hint="Fetch it again.") from error


def _paragraphs(path: Path) -> Iterator[str]:
    rest = ""
    try:
        with path.open(encoding="utf-8") as file:
            while chunk := file.read(_CHUNK):
                *whole, rest = (rest + chunk).split("\n\n")
                yield from whole
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text.", hint="Convert it, e.g. with iconv -t UTF-8.") from error
    yield rest


def require_file(path: Path) -> None:
    """Refuse what is no file. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file.", hint="Name a file in it.")
    if not path.is_file():
        raise InputError(f"There is no file {path}.", hint="Check the path.")


def _unreadable(path: Path, suffixes: tuple[str, ...]) -> InputError:
    return InputError(f"{path} cannot be read as data.", hint=f"Files end in {', '.join(suffixes)}.")
