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

import torch

from ulbq.artifacts.names import local_path
from ulbq.config.run import Template
from ulbq.data import registry
from ulbq.data.calibration import Calibration, calibration_samples, check_calibration
from ulbq.data.files import (
    ANSWER,
    CHAT,
    CONTEXT,
    QUESTION,
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
from ulbq.data.prompts import Turn, choose_template, lay_out
from ulbq.errors import InputError, UsageError
from ulbq.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_NAMED_INSTRUCTIONS = {"alpaca": "tatsu-lab/alpaca"}
# Sets whose rows lie in a configuration of the repository.
_CONFIGS = {"openai/gsm8k": "main"}


@dataclass(frozen=True)
class Example:
    """A chat that ends with an answer.

    Attributes:
        where: file and line, for errors.
        turns: in order; the last one is the assistant's.
        context: Alpaca's ``input``, which its prompt sets apart; empty for none.
    """

    where: str
    turns: tuple[Turn, ...]
    context: str = ""


def training_text(
    spec: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    length: int,
    seed: int,
    template: Template | None,
    data_dir: Path | None,
    offline: bool,
    progress: Progress,
) -> Calibration:
    """Draw samples of plain text or of an instruction set.

    Args:
        spec: what :func:`~ulbq.data.calibration.calibration_samples` takes; or a file of rows, a folder with a
            ``train`` file of rows, ``alpaca``, or the Hub id of a set (``llm-adapters/math``), whose ``train`` split
            is taken. A file of rows is plain text where its first row has none of an instruction set's layouts.
        tokenizer: the model's.
        samples: how many.
        length: tokens a sample; longer answers are cut.
        seed: of the draw.
        template: how instructions are laid out; None for the tokenizer's chat template where there is one, else
            Alpaca's prompt.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.
        offline: never touch the network.
        progress: told what was left out.

    Returns:
        The samples; of an instruction set with ``taught``, filled up behind their ends.

    Raises:
        UsageError: no such set or file; a template for plain text, or one that the tokenizer does not have.
        InputError: unreadable data, too little of it; a row in no layout, named by its line.
        ResourceError: the set cannot be had here.
    """
    examples = read_examples(spec, data_dir=data_dir, offline=offline, progress=progress)
    if examples is None:
        if template is not None:
            raise UsageError(
                f"--template {template} means nothing to '{spec}', which is plain text.", hint="Leave it out."
            )
        file = _file(spec, data_dir)
        return calibration_samples(
            spec if file is None else str(file),
            tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            data_dir=data_dir,
            offline=offline,
        )
    template = choose_template(template, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    drawn = _draw(spec, (examples[index] for index in order), tokenizer, template, samples, length, progress)
    tokens, taught = _padded(drawn, length, filler(tokenizer))
    return Calibration(Path(spec).name, tokens, seed, taught)


def check_training_text(spec: str, *, data_dir: Path | None, offline: bool) -> None:
    """Refuse what :func:`training_text` could not draw from, without reading it; ``self`` passes.

    Raises:
        UsageError: no such set or file.
        InputError: no such file or data folder, or one without a train split.
        ResourceError: the set cannot be had here, and the network is off.
    """
    file = None if spec == "self" else _file(spec, data_dir)
    if file is not None:
        require_file(file)
    elif "/" in spec:
        registry.check_dataset_at_hand(HubSplit(spec, _CONFIGS.get(spec), "train"), data_dir, offline)
    else:
        check_calibration(spec, data_dir=data_dir, offline=offline)


def read_examples(spec: str, *, data_dir: Path | None, offline: bool, progress: Progress) -> list[Example] | None:
    """All examples of an instruction set, in its order; None for plain text.

    Rows with an empty answer are left out, and ``progress`` is told how many. Arguments and errors are those of
    :func:`training_text`.
    """
    rows = _instruction_rows(spec, data_dir, offline)
    if rows is None:
        return None
    read = [_example(where, row) for where, row in rows]
    examples = [example for example in read if example is not None]
    if len(examples) < len(read):
        progress.note(
            f"Of '{spec}', {len(read) - len(examples)} of {len(read):,} rows have an empty answer and are left out."
        )
    return examples


def encode(example: Example, tokenizer: "PreTrainedTokenizerBase", template: Template) -> tuple[list[int], list[bool]]:
    """Tokens of an example, and which of them are learnt: the answers. Raises InputError as the layout does."""
    pieces = lay_out(template, example.turns, tokenizer, context=example.context, where=example.where)
    tokens = [token for piece in pieces for token in piece.tokens]
    return tokens, [piece.taught for piece in pieces for _ in piece.tokens]


def _instruction_rows(spec: str, data_dir: Path | None, offline: bool) -> Iterable[tuple[str, Row]] | None:
    """All rows of an instruction set, each with the words that name it; None for plain text."""
    if spec == "mix" or spec in registry.TEXT_SETS.keys() - _NAMED_INSTRUCTIONS.keys():
        return None
    file = _file(spec, data_dir)
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


def _file(spec: str, data_dir: Path | None) -> Path | None:
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


def _example(where: str, row: Row) -> Example | None:
    """The example in a row; None where its answer is empty. Raises InputError where it is in no layout."""
    for name in CHAT:
        if isinstance(row.get(name), list):
            turns = _turns(where, name, row[name])
            return Example(where, turns) if turns else None
    question, answer = first(row, QUESTION), _answer(row)
    if question is None or answer is None:
        columns = ", ".join(map(repr, row)) or "(none)"
        raise InputError(f"{where}: no question with an answer among the columns {columns}.", hint=_LAYOUTS)
    if not answer.strip():
        return None  # published sets have some
    _check_text(where, question, answer)
    context = first(row, CONTEXT) or ""
    _check_text(where, context)
    return Example(where, (Turn("user", question), Turn("assistant", answer)), context)


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
        if role not in _ROLES or content is None:
            raise InputError(
                f"{where}: '{column}' holds a turn that is no text of user, assistant or system.",
                hint='A turn is {"role": "user", "content": "…"}.',
            )
        _check_text(where, content)
        turns.append(Turn(_ROLES[role], content))
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


def _draw(
    spec: str,
    examples: Iterable[Example],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    samples: int,
    length: int,
    progress: Progress,
) -> list[tuple[list[int], list[bool]]]:
    """Tokens of the first ``samples`` examples with an answer that begins within ``length``, and which are learnt."""
    drawn: list[tuple[list[int], list[bool]]] = []
    cut = without = 0
    for example in examples:
        tokens, taught = encode(example, tokenizer, template)
        if not any(taught[:length]):
            without += 1
            continue
        cut += len(tokens) > length
        drawn.append((tokens[:length], taught[:length]))
        if len(drawn) == samples:
            break
    if len(drawn) < samples:
        left_out = f"; {without} more have their answer behind {length} tokens" if without else ""
        raise InputError(
            f"'{spec}' holds {len(drawn)} examples, not {samples}{left_out}.",
            hint="Ask for fewer samples, or give more examples"
            + (", or a greater `sequence_length`." if without else "."),
        )
    if cut or without:
        progress.note(
            f"Of '{spec}', {cut} of {samples} examples are cut at {length} tokens"
            + (f", and {without} were passed over because their answer begins later." if without else ".")
        )
    return drawn


def filler(tokenizer: "PreTrainedTokenizerBase") -> int:
    """A token for behind a sample's end, where nobody looks."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def _padded(
    drawn: Sequence[tuple[list[int], list[bool]]], length: int, filler: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 and which are learnt bool, both ``[samples, length]``."""
    tokens = torch.full((len(drawn), length), filler, dtype=torch.int64)
    taught = torch.zeros((len(drawn), length), dtype=torch.bool)
    for row, (own, learnt) in enumerate(drawn):
        tokens[row, : len(own)] = torch.tensor(own)
        taught[row, : len(own)] = torch.tensor(learnt)
    return tokens, taught
