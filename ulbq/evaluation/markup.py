"""HTML that is put together from escaped parts: whatever is no markup yet becomes text, and every attribute is quoted.

Pages show strings of files that strangers made. None is written into a page but through this module.
"""

from collections.abc import Iterable

from markupsafe import Markup, escape

_VOID = frozenset({"meta", "br"})


def element(tag: str, *content: str, **attributes: str | float | None) -> Markup:
    """One element.

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
    if tag in _VOID:
        return Markup("<{}{}>").format(Markup(tag), told)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), told, together(content))


def together(parts: Iterable[str]) -> Markup:
    """Parts one after the other; text is escaped, markup is not."""
    return Markup("").join(map(escape, parts))


def page(title: str, style: str, body: Iterable[str]) -> Markup:
    """A whole page.

    Args:
        title: of the window, as text.
        style: a style sheet of our own: it is not escaped, and holds nothing that came out of a file.
        body: its parts.
    """
    head = together(
        [
            Markup('\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'),
            element("title", f"{title} · ulbq"),
            Markup("\n<style>{}</style>\n").format(Markup(style)),
        ]
    )
    main = Markup("\n<main>\n{}\n</main>\n").format(together(body))
    whole = element("html", Markup("\n"), element("head", head), Markup("\n"), element("body", main), "\n", lang="en")
    return Markup("<!doctype html>\n{}\n").format(whole)


def header(title: str, told: str) -> Markup:
    """The top of a page: what it is about, and a line below."""
    return element("header", element("h1", title), element("p", told, class_="sub"))


def footer(version: str, created: str) -> Markup:
    """The foot of a page."""
    return element("footer", f"ulbq {version} · {created}")


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Labels, each beside the colour of its CSS class."""
    items = (element("span", element("i", class_=style), label) for label, style in entries)
    return element("div", *items, class_="legend")


def table_row(head: str, *cells: str, style: str | None = None) -> Markup:
    """A row of a table that begins with its name."""
    return element("tr", element("th", head), *(element("td", cell) for cell in cells), class_=style)


def table(heads: Iterable[str], rows: Iterable[str]) -> Markup:
    """A table; without ``heads`` it has no head."""
    named = [element("th", head) for head in heads]
    top = element("thead", element("tr", *named)) if named else Markup("")
    return element("table", top, element("tbody", *rows))
