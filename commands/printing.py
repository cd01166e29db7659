"""The console that everything for people goes through; imported when there is something to print, as rich is slow."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ulbq.printable import printable


class PrintableConsole(Console):
    """A console whose text has no control characters but the console's own: strings of files come out as text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's own, its texts made printable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
