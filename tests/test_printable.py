"""Text that shows everything and obeys nothing."""

import pytest

from ulbq.printable import one_line, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (" two\n\n words\t", "two words"),
        ("\x1b[31mred\x1b[0m \x07bell", "[31mred[0m bell"),
        ("a\x00b\x9bc\x7f", "abc"),
        ("right\u202eto left\u2066", "rightto left"),
        ("a\u2028b", "a b"),
        ("näïve 猫 🐱", "näïve 猫 🐱"),
        ("", ""),
        (" \n\x1b ", ""),
    ],
)
def test_a_line_shows_everything_and_obeys_nothing(text: str, line: str) -> None:
    assert one_line(text) == line


def test_lines_stay_apart_where_there_is_room() -> None:
    assert printable("a\r\n\tb\x1b") == "a\n\tb"
