"""Strings that end a text where they come up."""

from collections.abc import Sequence


class StopStrings:
    """Lets a text through, piece by piece, up to the first of some strings.

    A string may be spread over pieces: what could be the beginning of one is held until more is known.

    Args:
        strings: none of them empty.

    Attributes:
        found: whether one of them came; nothing is let through any more.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def let_through(self, piece: str, *, last: bool = False) -> str:
        """What is certain, with this piece, to stand before every string.

        Args:
            last: nothing follows, so that a beginning is no more than that.
        """
        if self.found:
            return ""
        text = self._held + piece
        places = [place for place in map(text.find, self._strings) if place >= 0]
        self.found = bool(places)
        sure = min(places) if places else len(text) - (0 if last else self._begun(text))
        self._held = "" if places else text[sure:]
        return text[:sure]

    def _begun(self, text: str) -> int:
        """Characters at the end of the text that one of the strings begins with; the most there are."""
        lengths = (length for one in self._strings for length in range(1, len(one)) if text.endswith(one[:length]))
        return max(lengths, default=0)
