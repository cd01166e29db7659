"""Answers read from what a model wrote, by the rules under which the published scores were taken.

The rules are LLM-Adapters' (arithmetic and commonsense sets), which ApiQ and ULB-SAPR score by too, and LoftQ's for
GSM8K, which ApiQ takes over. Of commonsense answers ApiQ's own script wants all that stands behind "the correct answer
is " to be the answer, which says the same of a model that was trained on the form. The rules are kept as they are,
slips and all, for a better rule gives scores that compare with nobody's. Where a rule reads otherwise than a person
would, its docstring says so.
"""

import re
from collections.abc import Sequence
from math import isfinite

from ulbq.data.prompts import FINAL_ANSWER

TOLERANCE = 1e-3
"""How far a number may lie from the expected one."""

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"[ABCDE]")


def last_number(text: str) -> float | None:
    """The last number of a text: digits, perhaps a minus before and decimals behind; commas are dropped first.

    Known slips, all published: a hyphen counts as a minus (``10-5`` ends with -5); a fraction is its denominator
    (``3/4`` reads 4), a percentage or a power its last number; a list without blanks grows together (``1,2`` reads 12);
    the number of a list's item or of a unit counts where it comes last (``12 m2`` reads 2), and so does what is left of
    one where the longest answer cut the text.
    """
    found = _NUMBER.findall(text.replace(",", ""))
    return _finite(found[-1]) if found else None


def final_number(text: str) -> float | None:
    """The first number behind the first "The final answer is: "; without that, or none behind it, the last number.

    Known slips, both published: the words count only with these letters and the blank at their end, and what the model
    writes behind them cannot correct them.
    """
    pieces = text.replace(",", "").split(FINAL_ANSWER)
    found = _NUMBER.search(pieces[1]) if len(pieces) > 1 else None
    return _finite(found[0]) if found else last_number(text)


def first_letter(text: str) -> str | None:
    """The first capital letter from A to E, wherever it stands.

    Known slip, published, and noted by ApiQ's authors too: the letter of a word counts. ``Answer: b`` reads A, and
    ``Dividing by 2 gives (B)`` reads D; only a text whose first such capital is the choice is read as a person would.
    """
    found = _LETTER.search(text)
    return found[0] if found else None


def first_word(text: str, words: Sequence[str]) -> str | None:
    """The first of some answers, such as ``answer1`` or ``true``, that a text holds.

    Known slips, all published: capitals do not match (``True.`` holds no answer, nor does ``Answer3``), so that a model
    which never saw the form scores next to nothing, whatever it knows; part of a word counts (``untrue`` holds
    ``true``), and so does a text that repeats the choices (``answer1/answer2`` reads ``answer1``).
    """
    found = re.search("|".join(map(re.escape, words)), text)
    return found[0] if found else None


def is_right(found: float | str | None, expected: float | str) -> bool:
    """Whether an answer is the expected one: a number within :data:`TOLERANCE`, a word or letter exactly."""
    if isinstance(expected, float):
        return isinstance(found, float) and abs(found - expected) <= TOLERANCE
    return found == expected


def _finite(digits: str) -> float | None:
    """None for hundreds of digits, which no answer has and JSON cannot say."""
    value = float(digits)
    return value if isfinite(value) else None
