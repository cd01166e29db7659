"""A few primitives to draw figures as inline SVG. Colours are CSS classes, so that a page's theme decides them."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape


def element(tag: str, *content: str, **attributes: str | float | None) -> Markup:
    """One element; every attribute is quoted.

    Args:
        tag: its name.
        content: what stands inside; text is escaped, markup is not.
        attributes: by name, ``class_`` and ``text_anchor`` for ``class`` and ``text-anchor``; None leaves one out.
    """
    told = Markup("").join(
        Markup(' {}="{}"').format(name.removesuffix("_").replace("_", "-"), value)
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), told, Markup("").join(map(escape, content)))


class Drawing:
    """Collects shapes on a canvas of ``width`` by ``height`` CSS pixels; coordinates grow to the right and down."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width = width
        self.height = height
        self.title = title
        self._parts: list[Markup] = []

    def text(self, x: float, y: float, text: str, *, style: str = "", anchor: str = "start") -> None:
        """Text whose baseline starts, ends or is centred (``anchor`` start, end, middle) at a point."""
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
        self._parts.append(element("text", text, **place, text_anchor=anchor, class_=style or None))

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """A straight line."""
        (x1, y1), (x2, y2) = start, end
        ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
        self._parts.append(element("line", **ends, class_=style))

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A line through several points."""
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(element("polyline", points=drawn, class_=style))

    def shape(self, outline: str, style: str, *, opacity: float = 1.0) -> None:
        """A filled shape; ``outline`` as SVG's paths write it."""
        self._parts.append(element("path", class_=style, fill_opacity=f"{opacity:.2f}", d=outline))

    def box(
        self,
        corner: tuple[float, float],
        size: tuple[float, float],
        style: str,
        *,
        hint: str = "",
        opacity: float = 1.0,
        radius: float = 2,
        fill: str | None = None,
    ) -> None:
        """A rectangle, filled as its style says unless ``fill`` does; ``hint`` shows when the pointer rests on it."""
        (x, y), (width, height) = corner, size
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
        shade = None if opacity == 1.0 else f"{opacity:.3f}"
        inner = _hint(hint)
        self._parts.append(
            element("rect", *inner, **place, rx=f"{radius:g}", class_=style, fill_opacity=shade, fill=fill)
        )

    def dot(self, x: float, y: float, style: str, *, hint: str = "", radius: float = 5) -> None:
        """A filled circle; ``hint`` shows when the pointer rests on it."""
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}"}
        self._parts.append(element("circle", *_hint(hint), **place, class_=style))

    def axes(
        self,
        across: "Scale",
        up: "Scale",
        label: str,
        *,
        upward: str = "",
        whole: bool = True,
        told: Callable[[float], str] | None = None,
    ) -> None:
        """A grid with the numbers of both scales, and labels below and above it.

        Args:
            label: of the scale along the bottom.
            upward: of the other.
            whole: whether the numbers along the bottom are whole ones alone.
            told: writes the upward scale's numbers out; None for :func:`number`.
        """
        (left, right), (bottom, top) = across.pixels, up.pixels
        self.text(8, top - 10, upward, style="muted")
        for tick in up.ticks:
            self.line((left, up(tick)), (right, up(tick)), "grid")
            self.text(left - 8, up(tick) + 4, (told or number)(tick), style="muted", anchor="end")
        for tick in across.ticks:
            if tick == int(tick) or not whole:
                self.text(across(tick), bottom + 18, number(tick), style="muted", anchor="middle")
        self.text((left + right) / 2, bottom + 40, label, style="muted", anchor="middle")

    def colours(self, x: float, y: float, shade: Callable[[float], float], low: str, high: str, label: str) -> None:
        """A scale of the heat colour from ``low`` to ``high`` with what it stands for; ``y`` is its upper edge."""
        self.text(x, y + 10, low, style="muted", anchor="end")
        for step in range(24):
            self.box((x + 8 + step * 5, y), (5, 12), "heat", opacity=shade(step / 23), radius=0)
        self.text(x + 136, y + 10, f"{high}  {label}", style="muted")

    def markup(self) -> Markup:
        """The drawing as inline SVG."""
        frame = f"0 0 {self.width:g} {self.height:g}"
        return element("svg", *self._parts, viewBox=frame, role="img", aria_label=self.title)


def _hint(text: str) -> list[Markup]:
    return [element("title", text)] if text else []


class Scale:
    """Maps values onto pixels, linearly or by their logarithm.

    Attributes:
        pixels: where it begins and ends.
        ticks: round values within the range.
    """

    def __init__(
        self, low: float, high: float, pixels: tuple[float, float], *, log: bool = False, ticks: int = 5
    ) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self._log = log
        self._low, self._high = self._at(low), self._at(high)
        self.pixels = pixels
        self.ticks = _log_ticks(low, high, ticks) if log else _linear_ticks(low, high, ticks)

    def __call__(self, value: float) -> float:
        share = (self._at(value) - self._low) / (self._high - self._low)
        start, end = self.pixels
        return start + share * (end - start)

    def _at(self, value: float) -> float:
        return math.log(value) if self._log else value


def number(value: float) -> str:
    """A number for an axis or a label: three significant digits, thousands apart."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values in the finest pattern that does not crowd; over many powers of ten, every second or third."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        ticks = [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]
        if len(ticks) <= wanted + 1:
            return ticks
    return ticks[:: math.ceil(len(ticks) / wanted)]
