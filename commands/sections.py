"""Help pages in sections: an option that names a ``rich_help_panel`` stands under that heading.

Plain text rather than Typer's boxes: they fold long options into unreadable columns at 80 characters, and importing
what draws them doubles the time of ``--help``.
"""

import re
from typing import Any

from typer.core import TyperCommand


class SectionedCommand(TyperCommand):
    """A command whose help keeps its options in the sections that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(_tidy(*row))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _tidy(name: str, text: str) -> tuple[str, str]:
    """A row without the parentheses that Typer sets around a default in words, and without its word for text."""
    return re.sub(r" <(str|list\[str\])>", "", name), re.sub(r"\[default: \((.*)\)(?=; |\])", r"[default: \1", text)
