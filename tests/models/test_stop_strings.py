"""Strings that end a text: where, however the text is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from ulbq.models.stop_strings import StopStrings

_LETTERS = st.text("ab", max_size=30)


def through(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    gate = StopStrings(stops)
    passed = [gate.let_through(piece) for piece in pieces]
    return [*passed, gate.let_through("", last=True)], gate.found


@given(_LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_text_ends_before_the_string_that_is_whole_first(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    passed, found = through(stops, pieces)
    assert found == any(one in text for one in stops)
    assert text.startswith("".join(passed))
    if not found:
        assert "".join(passed) == text
    else:
        assert not any(one in "".join(passed) for one in stops)


def test_a_string_over_several_pieces_is_seen_and_its_beginning_held():
    assert through(["STOP"], ["one S", "TO", "P two"]) == (["one ", "", "", ""], True)
    assert through(["STOP"], ["one S", "TO", "O two"]) == (["one ", "", "STOO two", ""], False)
    assert through(["STOP"], ["one ST"]) == (["one ", "ST"], False)


def test_nothing_passes_behind_it():
    gate = StopStrings(["."])
    assert [gate.let_through(piece) for piece in ("a.b", "c")] == ["a", ""]
    assert gate.let_through("d", last=True) == ""


def test_the_longest_beginning_counts():
    assert through(["abac", "ca"], ["xaba"])[0] == ["x", "aba"]
