"""Help pages in sections."""

from typing import Annotated

import typer

from ulbq.commands.options import Quiet, Source
from ulbq.commands.sections import SectionedCommand


def _help(capsys) -> str:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)

    @app.command(cls=SectionedCommand)
    def quantize(
        source: Source = None,
        out: Annotated[
            str | None, typer.Option("--output", help="Folder.", show_default="a telling name under ./artifacts")
        ] = None,
        samples: Annotated[
            int | None,
            typer.Option("--samples", min=1, help="Samples (of text).", show_default="preset", rich_help_panel="Data"),
        ] = None,
        seed: Annotated[int, typer.Option("--seed", help="Seed.", rich_help_panel="Data")] = 0,
        quiet: Quiet = False,
    ) -> None:
        """Make it small."""

    app(["--help"], standalone_mode=False)
    return capsys.readouterr().out


def test_options_stand_under_the_headings_that_they_name(capsys):
    shown = _help(capsys)
    headings = [line for line in shown.splitlines() if line.endswith(":")]
    assert headings == ["Arguments:", "Options:", "Data:", "Terminal:"]
    assert shown.index("Data:") < shown.index("--samples") < shown.index("--seed") < shown.index("Terminal:")
    assert shown.index("Options:") < shown.index("--help") < shown.index("Data:")


def test_defaults_in_words_stand_without_parentheses(capsys):
    shown = " ".join(_help(capsys).split())
    assert "[default: a telling name under ./artifacts]" in shown
    assert "Samples (of text). [default: preset; x>=1]" in shown
    assert "Seed. [default: 0]" in shown


def test_argument_is_its_metavar_alone(capsys):
    assert "\n  SOURCE  Hub id" in _help(capsys)
