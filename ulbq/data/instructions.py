"""Text to train a whole model on: plain text, or an instruction set, of which only the answers are learnt.

An example of an instruction set is a row in one of these layouts:

* ``instruction`` (or ``prompt``, ``question``, ``query``), perhaps ``input`` (or ``context``), and ``output`` (or
  ``response``, ``completion``, ``answer``): Alpaca's layout, pairs of prompt and completion, LLM-Adapters' sets;
* a chat, ``messages`` of ``role`` and ``content``, or ``conversations`` of ``from`` and ``value``; all answers in it
  are learnt.

It is laid out by :mod:`ulbq.data.prompts`. Examples are not packed: samples run one by one, each cut behind its own
answer, so that what fills them up costs no time, and no example sees another one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulbq.artifacts.names import local_path
from ulbq.config.run import Template
from ulbq.data import registry
from ulbq.data.calibration import check_calibration
from ulbq.data.files import (
    ANSWER,
    CHAT,
    CONTEXT,
    QUESTION,
    ROLES,
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    Row,
    first,
    numbered_rows,
    require_file,
    suffix_of,
)
from ulbq.data.hub import HubSplit
from ulbq.data.mirror import data_root, mirror_file
from ulbq.data.prompts import Turn, lay_out
from ulbq.errors import InputError
from ulbq.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED_INSTRUCTIONS = {"alpaca": "tatsu-lab/alpaca"}
# Sets whose rows lie in a configuration of the repository.
_CONFIGS = {"openai/gsm8k": "main"}


@dataclass(frozen=True)
class Chat:
    """A chat that ends with an answer.

    Attributes:
        where: file and line, for errors.
        turns: in order; the last one is the assistant's.
        context: Alpaca's ``input``, which its prompt sets apart; empty for none.
    """

    where: str
    turns: tuple[Turn, ...]
    context: str = ""


def check_training_text(spec: str, *, data_dir: Path | None, offline: bool) -> None:
    """Refuse what :func:`~ulbq.data.examples.training_text` could not draw from, without reading it; ``self`` passes.

    Raises:
        UsageError: no such set or file.
        InputError: no such file or data folder, or one without a train split.
        ResourceError: the set cannot be had here, and the network is off.
    """
    file = None if spec == "self" else data_file(spec, data_dir)
    if file is not None:
        require_file(file)
    elif "/" in spec:
        registry.check_dataset_at_hand(HubSplit(spec, _CONFIGS.get(spec), "train"), data_dir, offline)
    else:
        check_calibration(spec, data_dir=data_dir, offline=offline)


def read_chats(spec: str, *, data_dir: Path | None, offline: bool, progress: Progress) -> list[Chat] | None:
    """All chats of an instruction set, in its order; None for plain text.

    Rows with an empty answer are left out, and ``progress`` is told how many. Arguments and errors are those of
    :func:`~ulbq.data.examples.training_text`.
    """
    rows = _instruction_rows(spec, data_dir, offline)
    if rows is None:
        return None
    read = [_chat(where, row) for where, row in rows]
    chats = [chat for chat in read if chat is not None]
    if len(chats) < len(read):
        progress.note(
            f"Of '{spec}', {len(read) - len(chats)} of {len(read):,} rows have an empty answer and are left out."
        )
    return chats


def encode(chat: Chat, tokenizer: "PreTrainedTokenizerBase", template: Template) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and which of them are learnt: the answers. Raises InputError as the layout does."""
    pieces = lay_out(template, chat.turns, tokenizer, context=chat.context, where=chat.where)
    tokens = [token for piece in pieces for token in piece.tokens]
    return tokens, [piece.learnt for piece in pieces for _ in piece.tokens]


def _instruction_rows(spec: str, data_dir: Path | None, offline: bool) -> Iterable[tuple[str, Row]] | None:
    """All rows of an instruction set, each with the words that name it; None for plain text."""
    if spec == "mix" or spec in registry.TEXT_SETS.keys() - _NAMED_INSTRUCTIONS.keys():
        return None
    file = data_file(spec, data_dir)
    if file is not None and suffix_of(file) not in ROW_SUFFIXES:
        return None
    if file is not None:
        word = "line" if suffix_of(file).startswith(".jsonl") else "row"
        rows: Iterator[tuple[str, Row]] = ((f"{file}, {word} {number}", row) for number, row in numbered_rows(file))
    elif spec in _NAMED_INSTRUCTIONS or "/" in spec:
        found = registry.resolve_dataset(
            _NAMED_INSTRUCTIONS.get(spec, spec), _CONFIGS.get(spec), "train", data_dir=data_dir, offline=offline
        )
        rows = ((f"{spec}, row {number}", row) for number, row in enumerate(found, start=1))
    else:
        return None  # the calibration's own sentence says that there is no such set
    opening = next(rows, None)
    if opening is None:
        raise InputError(f"'{spec}' is empty.", hint="Each line is one JSON object.")
    if not _is_instruction(opening[1]):
        if file is None:
            raise InputError(f"{opening[0]}: no layout of an instruction set.", hint=_LAYOUTS)
        return None
    return chain([opening], rows)


_LAYOUTS = "A row has instruction and output, prompt and completion, or messages; or a text, in all rows of a file."


def data_file(spec: str, data_dir: Path | None) -> Path | None:
    """The file that a spec stands for; None for a named set and for what only the Hub may have."""
    path = local_path(spec)
    if spec in registry.TEXT_SETS:
        id = _NAMED_INSTRUCTIONS.get(spec)
        return mirror_file(data_root(data_dir), id, None, "train") if id else None
    if suffix_of(path) in (*TEXT_SUFFIXES, ".safetensors"):
        return path
    if ("/" in spec or path.suffix) and path.is_file():  # or it would be looked for on the Hub
        raise InputError(f"{path} cannot be read as data.", hint=f"Files end in {', '.join(TEXT_SUFFIXES)}.")
    folders = [path] if path.is_dir() else []
    root = data_root(data_dir)
    if root is not None and "/" in spec and (root / spec).is_dir():
        folders.append(root / spec)
    for folder in folders:
        found = mirror_file(folder.parent, folder.name, _CONFIGS.get(spec), "train")
        if found is not None:
            return found
    if folders:
        others = sorted(file for file in folders[0].iterdir() if suffix_of(file) in ROW_SUFFIXES)
        hint = f"To train on another split, name its file: {others[0]}." if others else "Name a file."
        raise InputError(f"'{spec}' has no train split in {folders[0]}.", hint=hint)
    return None


def _is_instruction(row: Row) -> bool:
    asked = first(row, QUESTION) is not None and _answer(row) is not None
    return asked or any(isinstance(row.get(name), list) for name in CHAT)


def _chat(where: str, row: Row) -> Chat | None:
    """The chat in a row; None where its answer is empty. Raises InputError where it is in no layout."""
    for name in CHAT:
        if isinstance(row.get(name), list):
            turns = _turns(where, name, row[name])
            return Chat(where, turns) if turns else None
    question, answer = first(row, QUESTION), _answer(row)
    if question is None or answer is None:
        columns = ", ".join(map(repr, row)) or "(none)"
        raise InputError(f"{where}: no question with an answer among the columns {columns}.", hint=_LAYOUTS)
    if not answer.strip():
        return None  # published sets have some
    _check_text(where, question, answer)
    context = first(row, CONTEXT) or ""
    _check_text(where, context)
    return Chat(where, (Turn("user", question), Turn("assistant", answer)), context)


def _answer(row: Row) -> str | None:
    """A row's answer, empty where it is null; None where there is no such column."""
    found = first(row, ANSWER)
    return "" if found is None and any(row.get(name, 0) is None for name in ANSWER) else found


def _turns(where: str, column: str, said: Sequence[Any]) -> tuple[Turn, ...]:
    """The turns of a chat up to its last answer that is not empty; none where all are."""
    turns = []
    for one in said:
        role = first(one, ("role", "from")) if isinstance(one, dict) else None
        content = first(one, ("content", "value")) if isinstance(one, dict) else None
        if content is None and isinstance(one, dict) and one.get("content", one.get("value", 0)) is None:
            content = ""  # as a call of a tool has it
        if role not in ROLES or content is None:
            raise InputError(
                f"{where}: '{column}' holds a turn that is no text of user, assistant or system.",
                hint='A turn is {"role": "user", "content": "…"}.',
            )
        _check_text(where, content)
        turns.append(Turn(ROLES[role], content))
    answered = any(turn.role == "assistant" for turn in turns)
    while turns and not (turns[-1].role == "assistant" and turns[-1].content.strip()):
        turns.pop()  # a question that nobody answered teaches nothing
    if not answered:
        raise InputError(f"{where}: '{column}' holds no answer.", hint="An answer is a turn of the assistant's.")
    return tuple(turns)


def _check_text(where: str, *texts: str) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half of a surrogate pair, which is no text.", hint="Take that row out.") from error
