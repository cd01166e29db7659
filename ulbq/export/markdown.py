"""Markdown that shows a file's strings as they are: none of them becomes a tag, a link or another cell of a table."""

import re
from html import escape

from ulbq.printable import one_line

_ACTIVE = re.compile(r"([\\`*\[\]|~])")


def plain(text: str) -> str:
    """Text on one line that Markdown takes for text."""
    return _ACTIVE.sub(r"\\\1", escape(one_line(text), quote=False))


def code(text: str) -> str:
    """Text as code on one line; a backtick in it becomes an apostrophe."""
    return f"`{one_line(text).replace('`', chr(39)) or ' '}`"
