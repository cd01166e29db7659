"""Shell completion: Typer's own, told what a metavar promises.

A script of ``--install-completion``, or one of ``completions/``, calls ``ulbq`` with ``_ULBQ_COMPLETE`` set. Typer
finds out what is being typed and answers with one line for each word that fits. The scripts in ``completions/`` also
set ``_ULBQ_MARKS``, and are then told by a mark to add files or folders, or that a list may go on.
"""

import os
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import typer

ASKED = "_ULBQ_COMPLETE"

_MARKS = {"FILE": ":files", "SOURCE": ":files", "DIR": ":folders"}


def answer(app: typer.Typer) -> None:
    """Write what may stand at the cursor to standard output, and exit."""
    os.environ["COLUMNS"] = "1000"  # a description is one line
    group: Any = typer.main.get_command(app)
    find = group.get_command

    def found(context: Any, name: str) -> Any:
        return _told(find(context, name))

    group.get_command = found
    _told(group).main(prog_name="ulbq")


def _told(command: Any) -> Any:
    """The command, or None as it came; what completes it knows of metavars from now on."""
    if command is not None:
        command.shell_complete = partial(_names, command, command.shell_complete)
        for parameter in command.params:
            parameter.callback = None  # a Tab behind --version shows no version
            parameter.shell_complete = partial(_values, parameter.metavar or "", parameter.shell_complete)
    return command


def _names(command: Any, complete: Any, context: Any, incomplete: str) -> list[Any]:
    """Names of options and commands, each with the first sentence of its help."""
    opposites = {name for parameter in command.params for name in parameter.secondary_opts}
    items: list[Any] = complete(context, incomplete)
    for item in items:
        sentence = re.split(r"(?<=[.;])\s", item.help or "", maxsplit=1)[0].rstrip(".;").replace("[", r"\[")
        item.help = f"Not: {sentence}" if item.value in opposites else sentence
    return items


def _values(metavar: str, complete: Any, context: Any, incomplete: str) -> list[Any]:
    """Values of one parameter, after a comma too where it takes a list, and then its marks."""
    listed = "," in metavar
    start = incomplete.rpartition(",")[0] + "," if listed and "," in incomplete else ""
    items: list[Any] = complete(context, incomplete.removeprefix(start))
    for item in items:
        item.value = f"{start}{item.value}"
    if "_ULBQ_MARKS" in os.environ:
        marks = {_MARKS[word] for word in re.findall("[A-Z]+", metavar) if word in _MARKS}
        items += [SimpleNamespace(value=mark, help=None) for mark in [*marks, *[":list"] * listed]]
    return items
