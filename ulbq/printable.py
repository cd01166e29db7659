"""Text that shows what it says and does nothing else: names, errors and models' words may carry escape sequences."""

import re

# All control characters but line feed and tab, DEL, C1, and what turns the direction of writing round.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What no output can encode: surrogates that stand for no byte of a file's name.
_LONE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")


def encodable(text: str) -> str:
    """Text with a mark in place of what no output can encode."""
    return _LONE.sub("\N{REPLACEMENT CHARACTER}", text)


def printable(text: str) -> str:
    """Text without control characters; line feeds and tabs stay."""
    return encodable(_CONTROL.sub("", text))


def one_line(text: str) -> str:
    """The same in one line."""
    return " ".join(printable(" ".join(text.split())).split())


def binary(count: float) -> str:
    """Bytes in powers of two: ``512 B``, ``15.2 MiB``, ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
