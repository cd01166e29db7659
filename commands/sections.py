"""Help pages in sections: an option that names a ``rich_help_panel`` stands under that heading.

Plain text rather than Typer's boxes: they fold long options into unreadable columns at 80 characters, and importing
what draws them doubles the time of ``--help``.
"""

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .options import State
from .streams import write

HelpAll = Annotated[bool, typer.Option("--help-all", help="All options, by section.")]


class SectionedCommand(TyperCommand):
    """A command whose help keeps its options in the sections that they name.

    Where its function has more options than a page holds (:func:`~ulbq.commands.fields.from_fields`), ``--help`` shows
    those that most people need, and ``--help-all`` all of them.
    """

    def make_parser(self, ctx: Any) -> Any:
        """The parser of the command line, which knows flags of before too; no help page shows them."""
        parser = super().make_parser(ctx)
        own: dict[Any, Any] = {one.name: one for one in self.params}
        for flag, name in getattr(self.callback, "former", {}).items():
            parser.add_option(obj=own[name], opts=[flag], dest=name, nargs=own[name].nargs)
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show all options where that is asked for: before anything is required, and whatever the order of words."""
        if "--help-all" in args:
            words = self.make_parser(ctx).parse_args(list(args))[0]
            if words.get("help_all"):
                ctx.meta["hidden"] = self._meaningless(words.get("method"))
                write(self.get_help(ctx))
                raise typer.Exit
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Check what was typed and run it; its parameters are kept for errors that name them."""
        own = {one.name: one for one in self.params if one.name is not None}
        called = {field: own[name] for field, name in getattr(self.callback, "names", {}).items()}
        ctx.ensure_object(State).parameters = own | called
        # Before a pipe is waited for, whose other end may take hours.
        if (check := getattr(self.callback, "check", None)) is not None:
            check(ctx.params)
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        more = {name for name, option in self._options.items() if not option.primary}
        short = "hidden" not in ctx.meta and any(one.name == "help_all" for one in self.params)
        hidden = more if short else ctx.meta.get("hidden", ())
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None and parameter.name not in hidden:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                section = None if short else getattr(parameter, "rich_help_panel", None)
                sections.setdefault(section or usual, []).append(_tidy(*row, short=short))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)
        if short:
            with formatter.section(f"{len(more)} more options, by section"):
                method = "" if getattr(self.callback, "taken", None) is None else " [--method NAME]"
                formatter.write_text(f"{ctx.command_path}{method} --help-all")

    @property
    def _options(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = getattr(self.callback, "options", {})
        return found

    def _meaningless(self, method: str | None) -> Collection[str]:
        """Names of the parameters that mean nothing to a method; none where none is named."""
        taken = getattr(self.callback, "taken", None)
        return () if method is None or taken is None else self._options.keys() - taken(method)


def _tidy(name: str, text: str, *, short: bool) -> tuple[str, str]:
    """A row without the parentheses that Typer sets around a default in words, and without its word for text.

    Args:
        short: of several sentences keep the first.
    """
    text = re.sub(r"\[default: \((.*)\)(?=; |\])", r"[default: \1", text)
    if short:
        help_text, bracket, default = text.partition("  [")
        text = re.split(r"(?<=\.)\s", help_text)[0] + bracket + default
    return re.sub(r" <(str|list\[str\])>", "", name), text
