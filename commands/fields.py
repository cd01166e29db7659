"""Parameters of a command from the fields of what it asks for, and errors that name fields as they are typed.

    @from_fields(QuantizeRequest)
    def quantize(source: Source = None, **given: Any) -> None: ...

``given`` holds every field that has an ``Option``, None where it was not typed and has no default.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer
from pydantic import BaseModel, BeforeValidator, create_model
from pydantic.fields import FieldInfo

from ulbq.config.options import SECTIONS, Option, bare, former_names, left_open, options, typed
from ulbq.errors import UsageError

_NAMED = re.compile(r"`(\w+)(?:=([^`]*))?`")

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any option by its name in recipes; repeat for others.", show_default=False
    ),
]


def from_fields(
    settings: type[BaseModel],
    *,
    default: Callable[[str, Option], str] = lambda name, option: option.default,
    taken: Callable[[str], Collection[str]] | None = None,
    names: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command's function take the fields of ``settings`` in place of its ``**given``.

    Args:
        default: what an option is where nobody says, in words; empty where the field's default tells.
        taken: names of the fields that mean something to a method, for the help page of that method.
        names: parameters by fields that errors name and that are called otherwise here.
    """
    fields = {name: (field, option) for name, field, option in options(settings)}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function).parameters.values()
        named = [
            one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for one in own
            if one.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        made = [
            _parameter(name, field, option, settings.model_fields[name].get_default(), default(name, option))
            for name, (field, option) in fields.items()
        ]
        whole = [*named[:1], *sorted([*made, *named[1:]], key=_section)]
        function.__signature__ = inspect.Signature(whole)  # type: ignore[attr-defined]
        function.__annotations__ = {one.name: one.annotation for one in whole}
        function.check = partial(_check, settings)  # type: ignore[attr-defined]
        function.former = {  # type: ignore[attr-defined]
            f"--{old.replace('_', '-')}": name for old, name in former_names(settings).items()
        }
        function.options = {name: option for name, (_, option) in fields.items()}  # type: ignore[attr-defined]
        function.taken = taken  # type: ignore[attr-defined]
        function.names = names or {}  # type: ignore[attr-defined]
        return function

    return decorate


def _check(settings: type[BaseModel], given: Mapping[str, Any]) -> None:
    """Refuse a value that its field does not take. Raises pydantic's ValidationError, or UsageError."""
    fields = {name: left_open(field) for name, field, _ in options(settings)}
    typed_alone: type[BaseModel] = create_model("Typed", **fields)  # type: ignore[call-overload]
    typed_alone.model_validate({name: value for name, value in asked(given).items() if name in fields})


def _section(parameter: inspect.Parameter) -> int:
    """Where a parameter's section stands on the help page."""
    return SECTIONS.index(get_args(parameter.annotation)[1].rich_help_panel or "")


def _parameter(name: str, field: FieldInfo, option: Option, default: Any, told: str) -> inspect.Parameter:
    """The parameter of one field: what pydantic reads from text is text here."""
    kind, metadata = bare(field)
    if option.repeated:
        kind = list[str]
    elif any(isinstance(one, BeforeValidator) for one in metadata):
        kind = str
    given = default if isinstance(default, (bool, int, float, str, Path)) else None
    info = typer.Option(
        *typed(name, option, switch=kind is bool),
        help=option.help,
        metavar=option.metavar,
        show_default=told or not (given is None or given is False),
        autocompletion=(lambda: list(option.offers)) if option.offers else None,
        rich_help_panel=option.section or None,
    )
    wanted = kind if given is not None else Optional[kind]  # noqa: UP045 - a value
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=Annotated[wanted, info])


def asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, or has a default here."""
    return {name: value for name, value in given.items() if value is not None}


def read_settings(
    texts: Collection[str], known: Collection[str], given: Mapping[str, Any], former: Mapping[str, str]
) -> dict[str, Any]:
    """Values of ``--set NAME=VALUE``, as a recipe has them.

    Args:
        texts: as they were typed.
        known: names that there are.
        given: options that were typed by their own flags.
        former: names of today by those of before.

    Raises:
        UsageError: no such name, no YAML, or said twice.
    """
    from difflib import get_close_matches

    from yaml import YAMLError

    from ulbq.artifacts.yaml_files import parse_yaml

    read: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().rpartition(".")[2].replace("-", "_")
        name = former.get(name, name)
        if not equals:
            raise UsageError(f"--set {text} has no value.", hint="As in --set rank=8.")
        if name in given and name not in known:
            raise UsageError(f"--set {text}: `{name}` belongs to one run.", hint=f"Type `{name}` itself.")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else "As in --set weight_lr=1e-5; see --help-all."
            raise UsageError(f"--set {text}: there is no option '{name}'.", hint=hint)
        if name in read or given.get(name) is not None:
            raise UsageError(f"--set {text}: `{name}` is given twice.", hint="Leave one out.")
        try:
            read[name] = parse_yaml(value)
        except (ValueError, YAMLError) as error:
            raise UsageError(f"--set {text}: the value cannot be read.", hint="As in --set rank=8.") from error
    return read


def as_typed(text: str, parameters: Mapping[str, Any]) -> str:
    """A sentence that names fields, as in ```rank` `` and ```dora=True` ``, with the flags of a command.

    A field that the command does not have is shown as another command has it: one may tell how to make its source.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        if (parameter := parameters.get(name)) is not None:
            switch, other = parameter.opts, parameter.secondary_opts
        elif name in _elsewhere():
            switch, other = _elsewhere()[name]
        else:
            return found[0].strip("`")
        spelled = max(other if value == "False" else switch, key=len)
        return spelled if value in (None, "True", "False") else f"{spelled} {value}"

    return _NAMED.sub(flag, text)


@cache
def _elsewhere() -> dict[str, tuple[list[str], list[str]]]:
    """What is typed for every field of every command, and to switch it off."""
    from ulbq.config.convert import ConvertRequest
    from ulbq.config.evaluate import EvaluateRequest
    from ulbq.config.finetuning import FinetuneForm
    from ulbq.config.generate import GenerateRequest, ServeRequest
    from ulbq.config.push import PushRequest
    from ulbq.config.quantize import QuantizeRequest
    from ulbq.config.recommend import RecommendRequest
    from ulbq.config.saliency import SaliencyRequest
    from ulbq.config.sweep import SweepRequest

    found: dict[str, tuple[list[str], list[str]]] = {}
    requests = (
        RecommendRequest,
        SweepRequest,
        ServeRequest,
        GenerateRequest,
        EvaluateRequest,
        ConvertRequest,
        QuantizeRequest,
    )
    for request in (PushRequest, FinetuneForm, SaliencyRequest, *requests):
        for name, field, option in options(request):
            pairs = [one.split("/") for one in typed(name, option, switch=bare(field)[0] is bool)]
            found[name] = [pair[0] for pair in pairs], [pair[-1] for pair in pairs]
    return found
