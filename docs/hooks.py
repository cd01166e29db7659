"""What `mkdocs.yml` hooks in: the options of every command, every family of models, and links that lead out."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import basename, normpath
from typing import Any

import typer

from ulbq.commands.app import app

_COMMANDS_HERE = "<!-- every command -->"
_FAMILIES_HERE = "<!-- every family -->"
_FAMILIES = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "families.json"
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")
_EMPTY_HEAD = re.compile(r"<thead>\s*<tr>(?:\s*<th[^>]*></th>)+\s*</tr>\s*</thead>")
_CELL_CODE = re.compile(r"<code>[^<]*</code>")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(<code>)[~.]?")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Write the commands where their page wants them; a file of the repository is named, not linked to."""
    if _COMMANDS_HERE in markdown:
        markdown = markdown.replace(_COMMANDS_HERE, "\n".join(commands()))
    if _FAMILIES_HERE in markdown:
        markdown = markdown.replace(_FAMILIES_HERE, "\n".join(families(json.loads(_FAMILIES.read_text()))))
    folders = page.file.src_uri.count("/")
    return _LINK.sub(lambda link: _named(link, folders), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take out Sphinx's roles, heads of tables with nothing in them, and backslashes that pipes have in tables."""
    html = _EMPTY_HEAD.sub("", _ROLE.sub(r"\1", html))
    return _CELL_CODE.sub(lambda code: code[0].replace(r"\|", "|"), html)


def commands() -> Iterator[str]:
    """Markdown of every command with a table for each section of its options, as ``--help`` cuts them."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("ulbq", [], resilient_parsing=True)
    for name, command in group.commands.items():
        if not command.hidden:
            own = command.make_context(name, [], parent=context, resilient_parsing=True)
            yield from _command(f"ulbq {name}", command, own)


def families(measured: dict[str, Any]) -> Iterator[str]:
    """Markdown of what ``benchmarks/families.py`` found, as a table, and the families that are refused below it."""
    rows = measured["families"]
    taken = [row for row in rows if not row["quantize"]]
    exports = list(taken[0]["exports"])
    yield f"{len(taken)} of {len(rows)} families are taken, by ulbq {measured['ulbq']} with transformers "
    yield f"{measured['transformers']}:"
    yield from ("", f"| family | share | reload | gptq | {' | '.join(exports)} |", "| --- " * (4 + len(exports)) + "|")
    for row in taken:
        same = "=" if row["difference"] < 1e-4 and not row["lost"] else "differs"
        cells = [_yes(row["gptq"]), *(_yes(row["exports"][name]) for name in exports)]
        yield f"| `{row['family']}` | {row['share']:.0%} | {same} | {' | '.join(cells)} |"
    yield from ("", "Refused, with a sentence:", "", "| family | |", "| --- | --- |")
    yield from (f"| `{row['family']}` | {_cell(row['quantize'])} |" for row in rows if row["quantize"])
    yield from ("", "Not tried:", "", "| families | |", "| --- | --- |")
    for reason, names in measured.get("untried", {}).items():
        yield f"| {', '.join(f'`{name}`' for name in names)} | {_cell(reason)} |"


def _yes(refusal: str) -> str:
    return "no" if refusal else "yes"


def _command(title: str, command: Any, context: Any) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (f"## {title}", "", _flowing(command.help or ""), "", "```text", f"{title} {usage}", "```", "")
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        row = parameter.get_help_record(context)
        if row is not None:
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(row)
    for heading, rows in sections.items():
        yield from (f"**{heading}**", "", "| | |", "| --- | --- |")
        yield from (f"| {_code(name)} | {_cell(text)} |" for name, text in rows)
        yield ""


def _code(text: str) -> str:
    """A cell of options as code, those that say the opposite on lines of their own."""
    parts = re.split(r" / ", re.sub(r" <(str|list\[str\])>", "", text))
    return "<br>".join(f"`{part}`".replace("|", r"\|") for part in parts)


def _cell(text: str) -> str:
    text = re.sub(r"\[default: \((.*)\)(?=; |\])", r"[default: \1", text)
    escaped = re.sub(r"([\\|<>*_\[\]])", r"\\\1", text)
    return escaped.replace("\n", " ")


def _flowing(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _named(link: re.Match[str], folders: int) -> str:
    text, target = link.groups()
    path = normpath(f"{'d/' * folders}{target}")
    if not path.startswith("../"):  # a page of the site
        return link[0]
    path = path.removeprefix("../")
    return f"`{path}`" if text.strip("`") in (basename(path), path) else f"{text} (`{path}`)"
