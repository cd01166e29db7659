"""Reading answers: what the published rules make of tricky texts, slips and all."""

import re
from math import inf

import pytest

from ulbq.evaluation.answers import final_number, first_letter, first_word, is_right, last_number

NUMBERS = [
    ("1,234.50 dollars", 1234.5),
    ("-3.", -3.0),
    ("$5", 5.0),
    ("It costs $1,000,000.", 1000000.0),
    ("First 7, then 12.", 12.0),
    ("The answer is 0.5.", 0.5),
    ("no number at all", None),
    ("", None),
    ("minus - 4", 4.0),
    ("**18**", 18.0),
    ("\\boxed{42}", 42.0),
    ("6 x 7 = 42 apples\n", 42.0),
    ("50%", 50.0),
    ("007", 7.0),
    ("9" * 400, None),
    # Slips of the published rule, which stay.
    ("the answer is 3/4", 4.0),
    ("10-5", -5.0),
    ("either 1,2", 12.0),
    ("12 m2", 2.0),
    (".75", 75.0),
    ("1.2.3", 3.0),
    ("2e3", 3.0),
]


@pytest.mark.parametrize(("text", "wanted"), NUMBERS)
def test_the_last_number(text: str, wanted: float | None) -> None:
    assert last_number(text) == wanted


@pytest.mark.parametrize(("text", "wanted"), NUMBERS)
def test_without_its_words_a_final_answer_is_the_last_number(text: str, wanted: float | None) -> None:
    assert final_number(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1+2=3\nThe final answer is: 3", 3.0),
        ("The final answer is:  1,234 (as 1,000 + 234)", 1234.0),
        ("The final answer is: $-5.50 and not 6", -5.5),
        ("The final answer is: 3\nThe final answer is: 4", 3.0),
        ("It is 8.\nThe final answer is: unknown", 8.0),
        ("The final answer is: unknown", None),
        # Slips of the published rule, which stay.
        ("The final answer is:3, of 9", 9.0),
        ("the final answer is: 3, of 9", 9.0),
    ],
)
def test_the_final_number(text: str, wanted: float | None) -> None:
    assert final_number(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("(B)", "B"),
        ("\nit is (D).", "D"),
        ("C then A", "C"),
        ("none of these", None),
        ("f or F", None),
        # Slips of the published rule, which stay.
        ("Answer: b", "A"),
        ("The Answer is (E)", "A"),
        ("Dividing by 2 gives (B)", "D"),
    ],
)
def test_the_first_letter(text: str, wanted: str | None) -> None:
    assert first_letter(text) == wanted


ANSWERS = tuple(f"answer{number}" for number in range(1, 6))


@pytest.mark.parametrize(
    ("text", "words", "wanted"),
    [
        ("the correct answer is answer3", ANSWERS, "answer3"),
        ("answer2, not answer1", ANSWERS, "answer2"),
        ("the correct answer is answer 3", ANSWERS, None),
        ("the correct answer is true", ("true", "false"), "true"),
        ("It is false that it is true.", ("true", "false"), "false"),
        ("option2", ANSWERS, None),
        ("solution2", ("solution1", "solution2"), "solution2"),
        ("ending4", ("ending1", "ending2", "ending3", "ending4"), "ending4"),
        # Slips of the published rule, which stay.
        ("Answer3", ANSWERS, None),
        ("True", ("true", "false"), None),
        ("untrue", ("true", "false"), "true"),
        ("Answer format: answer1/answer2", ANSWERS, "answer1"),
        ("answer12", ANSWERS, "answer1"),
    ],
)
def test_the_first_word(text: str, words: tuple[str, ...], wanted: str | None) -> None:
    assert first_word(text, words) == wanted


def test_words_are_no_patterns() -> None:
    assert first_word("axb", ("a.b",)) is None
    assert re.search("a.b", "axb")


def test_what_is_right() -> None:
    assert is_right(1.8333, 1.8333333333333335)
    assert not is_right(1.83, 1.8333333333333335)
    assert is_right(-15.0, -15.0)
    assert not is_right(15.0, -15.0)
    assert not is_right(None, 0.0)
    assert not is_right(inf, 3.0)
    assert not is_right("3", 3.0)
    assert is_right("A", "A")
    assert not is_right(None, "A")
    assert not is_right("answer1", "answer2")
