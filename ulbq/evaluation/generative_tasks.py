"""Tasks whose answers a model writes and a rule reads: LLM-Adapters' arithmetic and commonsense sets.

They need no lm-eval, and no name is one of lm-eval's: ``piqa`` stays its piqa, ``piqa-instruct`` is the instruction
form that LLM-Adapters, ApiQ and ULB-SAPR train and score on. Nor is the group called ``arithmetic``, which lm-eval has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite, nan
from pathlib import Path

from ulbq.data.files import Row, numbered_rows
from ulbq.data.mirror import data_root, mirror_file
from ulbq.errors import InputError, ResourceError, UsageError
from ulbq.evaluation.answers import final_number, first_letter, first_word, last_number

_OWNER = "llm-adapters"
_ARITHMETIC_TOKENS = 256  # LLM-Adapters, LoftQ; ApiQ gives its arithmetic mix 512
_COMMONSENSE_TOKENS = 32  # LLM-Adapters, ApiQ


@dataclass(frozen=True)
class Rule:
    """How an answer is read.

    Attributes:
        kind: what an expected answer is: a ``number``, a ``letter`` or a ``word``.
        find: the answer in a text; None where there is none.
        words: the answers that there are, where it is a word.
    """

    kind: str
    find: Callable[[str], float | str | None]
    words: tuple[str, ...] = ()

    def chance(self, question: str) -> float | None:
        """Share of right answers that guessing gives among those that the question names; None for numbers."""
        if not self.words:
            return None
        named = sum(word in question for word in self.words) if self.kind == "word" else 0
        return 1 / (named or len(self.words))


def _words(*names: str) -> Rule:
    return Rule("word", lambda text: first_word(text, names), names)


_GSM8K = Rule("number", final_number)
_NUMBER = Rule("number", last_number)
_LETTER = Rule("letter", first_letter, tuple("ABCDE"))
_ANSWERS = _words(*(f"answer{number}" for number in range(1, 6)))


@dataclass(frozen=True)
class WrittenTask:
    """One task.

    Attributes:
        name: as ``--tasks`` takes it.
        data: name of its set in the mirror, under ``llm-adapters``.
        rule: how its answers are read.
        new_tokens: longest answer, in tokens, as published.
    """

    name: str
    data: str
    rule: Rule
    new_tokens: int


@dataclass(frozen=True)
class Document:
    """One question.

    Attributes:
        where: file and line, for errors.
        question: what is asked.
        expected: its answer.
    """

    where: str
    question: str
    expected: float | str


@dataclass(frozen=True)
class LoadedTask:
    """A task with its questions."""

    task: WrittenTask
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class LoadedGroup:
    """A group that was asked for.

    Attributes:
        name: as ``--tasks`` takes it.
        members: names of the tasks that are at hand.
        missing: names of those that the mirror does not have.
    """

    name: str
    members: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class GenerativeTasks:
    """Tasks and groups, ready to be run on any number of models; made by :func:`load_generative`."""

    tasks: tuple[LoadedTask, ...]
    groups: tuple[LoadedGroup, ...]


_TASKS = {
    task.name: task
    for task in (
        WrittenTask("gsm8k-cot", "gsm8k", _GSM8K, _ARITHMETIC_TOKENS),
        WrittenTask("svamp", "svamp", _NUMBER, _ARITHMETIC_TOKENS),
        WrittenTask("mawps", "mawps", _NUMBER, _ARITHMETIC_TOKENS),
        WrittenTask("aqua", "aqua", _LETTER, _ARITHMETIC_TOKENS),
        WrittenTask("boolq-instruct", "boolq", _words("true", "false"), _COMMONSENSE_TOKENS),
        WrittenTask("piqa-instruct", "piqa", _words("solution1", "solution2"), _COMMONSENSE_TOKENS),
        WrittenTask("siqa-instruct", "siqa", _ANSWERS, _COMMONSENSE_TOKENS),
        WrittenTask(
            "hellaswag-instruct", "hellaswag", _words("ending1", "ending2", "ending3", "ending4"), _COMMONSENSE_TOKENS
        ),
        WrittenTask("winogrande-instruct", "winogrande", _words("option1", "option2"), _COMMONSENSE_TOKENS),
        WrittenTask("arc_easy-instruct", "arc_easy", _ANSWERS, _COMMONSENSE_TOKENS),
        WrittenTask("arc_challenge-instruct", "arc_challenge", _ANSWERS, _COMMONSENSE_TOKENS),
        WrittenTask("openbookqa-instruct", "openbookqa", _ANSWERS, _COMMONSENSE_TOKENS),
    )
}
_GROUPS = {
    "arithmetic-cot": ("gsm8k-cot", "svamp", "mawps", "aqua"),
    "commonsense": tuple(name for name in _TASKS if name.endswith("-instruct")),
}
GENERATIVE_NAMES = (*_GROUPS, *_TASKS)
"""Every name that ``--tasks`` takes beside lm-eval's, groups first."""


def load_generative(names: Sequence[str], *, limit: int | None = None, data_dir: Path | None = None) -> GenerativeTasks:
    """Read the questions of tasks and groups from the mirror.

    Args:
        names: from :data:`GENERATIVE_NAMES`.
        limit: questions a task, the first ones; None: all.
        data_dir: mirror folder, see :func:`ulbq.data.mirror.data_root`.

    Returns:
        The tasks. A group goes without those of its members that the mirror does not have, but not without all.

    Raises:
        UsageError: two of the names contain the same task.
        InputError: a broken file, a row without question and answer, or with an answer that is none of the task's.
        ResourceError: the mirror does not have a task's set.
    """
    root = data_root(data_dir)
    files = {name: mirror_file(root, f"{_OWNER}/{task.data}", None, "test") for name, task in _TASKS.items()}
    wanted: dict[str, str] = {}
    groups = []
    for name in dict.fromkeys(names):
        members = _GROUPS.get(name, (name,))
        at_hand = tuple(member for member in members if files[member])
        if not at_hand:
            raise _not_there(name, members, root)
        for member in at_hand:
            if wanted.setdefault(member, name) != name:
                raise UsageError(
                    f"'{wanted[member]}' and '{name}' both contain the task '{member}'.", hint="Leave one of them out."
                )
        if name in _GROUPS:
            groups.append(LoadedGroup(name, at_hand, tuple(member for member in members if member not in at_hand)))
    tasks = (_load(_TASKS[name], file, limit) for name in wanted if (file := files[name]))
    return GenerativeTasks(tuple(tasks), tuple(groups))


def _not_there(name: str, members: Sequence[str], root: Path | None) -> ResourceError:
    data = f"{_OWNER}/{_TASKS[members[0]].data}/test.jsonl"
    looked = f"The mirror {root} has" if root else "There is"
    return ResourceError(
        f"{looked} no {data}, which '{name}' is scored on.",
        hint="Put LLM-Adapters' test set there, one row of instruction and answer a line; `data_dir` or ULBQ_DATA_DIR "
        "names the mirror.",
    )


def _load(task: WrittenTask, file: Path, limit: int | None) -> LoadedTask:
    rows = islice(numbered_rows(file), limit)
    documents = tuple(_document(task, f"{file}, line {number}", row) for number, row in rows)
    if not documents:
        raise InputError(f"{file} is empty.", hint="Each line is one JSON object with instruction and answer.")
    return LoadedTask(task, documents)


def _document(task: WrittenTask, where: str, row: Row) -> Document:
    question, answer = row.get("instruction"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: no text in column 'instruction'.", hint="It holds the question.")
    if task.rule.kind == "number":
        return Document(where, question, _number(where, answer))
    if answer not in task.rule.words:
        raise InputError(
            f"{where}: the answer {answer!r} is none of {task.name}'s.",
            hint=f"Column 'answer' holds one of {', '.join(task.rule.words)}.",
        )
    return Document(where, question, str(answer))


def _number(where: str, answer: object) -> float:
    try:
        value = float(answer.replace(",", "") if isinstance(answer, str) else answer)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = nan
    if not isfinite(value):
        raise InputError(f"{where}: the answer {answer!r} is no number.", hint="Check column 'answer'.")
    return value
