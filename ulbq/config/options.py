"""How a field is typed and shown, and the types that fields have in common.

    rank: Annotated[Count, Option("Of the adapter.", ADAPTER, "N")] = 64

is all that the option ``--rank`` takes. Messages of the library name fields, as in ```rank` `` or ```dora=True` ``.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from ulbq import limits
from ulbq.errors import UsageError

FORMAT, COLUMNS, CODEBOOKS, CALIBRATION = (
    "Format",
    "Columns (gptq, claq, trellis)",
    "Budget and codebooks",
    "Calibration",
)
TRAINING, ADAPTER, STAGES, END_TO_END, COMPUTE = "Training", "Adapter", "Stages", "End to end", "Compute"
LEARN, MEASURE, ADDRESS = "What to learn", "What to measure", "Address"
SAY, SAMPLING = "What to say", "Sampling"
HOW, RATES, OF_END_TO_END_ALONE, RUN, TERMINAL = "How", "Rates", "Of end-to-end alone", "Run", "Terminal"
SECTIONS = (
    *("", FORMAT, COLUMNS, CODEBOOKS, LEARN, MEASURE, ADDRESS, SAY, SAMPLING, HOW, RATES, CALIBRATION, TRAINING),
    *(ADAPTER, STAGES, END_TO_END, OF_END_TO_END_ALONE, COMPUTE, RUN, TERMINAL),
)
"""Headings in the order in which they are shown."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Option:
    """How a field is typed and shown.

    Attributes:
        help: a sentence or two.
        section: heading that it stands under; empty for the first.
        metavar: what its value is called. ``FILE`` and ``SOURCE`` offer files and folders, ``DIR`` folders.
        flag: where it is not the field's name: ``--lambda``, ``--output -o``, ``--dora/--lora``.
        default: in words, where the field's own default does not tell.
        offers: words that completion offers, of those that it takes.
        primary: whether the short help shows it.
        repeated: whether it is given once for every element.
        planned: whether the plan of a run tells it though nobody changed it.
        formerly: names that the field had: they are still read in recipes, in requests on disk and by ``--set``, and
            typed as flags, but shown nowhere.
    """

    help: str
    section: str = ""
    metavar: str | None = None
    flag: str = ""
    default: str = ""
    offers: tuple[str, ...] = ()
    primary: bool = False
    repeated: bool = False
    planned: bool = False
    formerly: tuple[str, ...] = ()


class Settings(BaseModel):
    """Values that are asked for, whose fields may be given by the names that they had before."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _by_the_names_of_today(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        values = renamed(cls, data)
        for name, value in values.items():
            if isinstance(value, bool) and name in cls.model_fields:  # which Python takes for 0 or 1
                kind, _ = bare(cls.model_fields[name])
                if kind is not Any and bool not in (kind, *get_args(kind)):
                    raise UsageError(f"`{name}` wants a value, not {str(value).lower()}.")
        return values


@cache
def former_names(settings: type[BaseModel]) -> Mapping[str, str]:
    """What is called otherwise today, by the names of before."""
    return {old: name for name, _, option in options(settings) for old in option.formerly}


def renamed(settings: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names that fields have today. Raises UsageError where one is given by two of its names."""
    names = former_names(settings)
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = names.get(given, given)
        if name in found or (name != given and name in values):
            raise UsageError(f"`{name}` is given twice, once as '{given}', its former name.", hint="Leave one out.")
        found[name] = value
    return found


def options(settings: type[BaseModel]) -> Iterator[tuple[str, FieldInfo, Option]]:
    """Every field that can be typed, as it was first declared: one declared anew has another default or bounds."""
    for name in settings.model_fields:
        for owner in settings.__mro__:
            field = getattr(owner, "model_fields", {}).get(name)
            option = next((one for one in bare(field)[1] if isinstance(one, Option)), None) if field else None
            if field is not None and option is not None:
                yield name, field, option
                break


def words(name: str, option: Option, value: Any) -> str:
    """A value as it is shown: ``symmetric`` or ``no-refit`` of a switch, ``a, b`` of several, else the value."""
    if isinstance(value, bool):
        yes, _, no = typed(name, option, switch=True)[0].partition("/")
        return (yes if value else no).removeprefix("--")
    if isinstance(value, tuple):
        return ", ".join(str(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def typed(name: str, option: Option, *, switch: bool) -> tuple[str, ...]:
    """What is typed for a field of that name: ``--group-size``, ``--output`` and ``-o``, ``--refit/--no-refit``."""
    flag = name.replace("_", "-")
    return tuple(option.flag.split()) or (f"--{flag}/--no-{flag}" if switch else f"--{flag}",)


def bare(field: FieldInfo) -> tuple[Any, list[Any]]:
    """A field's type without ``None`` and metadata, and the metadata; of a choice of types their union."""
    kind, metadata = field.annotation, list(field.metadata)
    while get_origin(kind) in (Annotated, Union, UnionType):
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            metadata += more
        else:
            kind, *others = [arm for arm in get_args(kind) if arm is not NoneType]
            if others:
                return Union[kind, *others], metadata
    return kind, metadata


def left_open(field: FieldInfo) -> tuple[Any, None]:
    """The definition of a field in what is typed: None where it was not asked for."""
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return Optional[kind], None  # noqa: UP045 - a value


def read_size(size: object) -> object:
    """Bytes of ``512M``, ``4G``, ``4GiB``, ``1000``; what is no text stays."""
    if not isinstance(size, str):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", size.strip(), flags=re.IGNORECASE)
    if match is None:
        raise UsageError(f"'{size}' is no size.", hint="Write a number of bytes, or 512M, 4G and the like.")
    number = float(match[1]) * _UNITS[match[2].upper()]
    if number > limits.COUNT:
        raise UsageError(f"'{match[0][:40]}' is more than any machine has.", hint="Write 512M, 4G and the like.")
    return int(number)


def _read_number(value: object) -> object:
    """A whole number of what was typed, for a choice of some."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _read_bits(bits: object) -> object:
    """Whole bits; a fraction is what another option takes."""
    if not isinstance(bits, str):
        return bits
    with suppress(ValueError):
        return int(bits)
    if re.fullmatch(r"\d*\.\d+", bits):
        raise UsageError(
            f"`bits` takes a whole number, and {bits} is none.",
            hint=f"`target_bits={bits}` spends so many on average (with `method=gptq`).",
        )
    raise UsageError(f"`bits` takes a number, and '{bits}' is none.", hint="1, 2, 3, 4 or 8.")


def _read_layers(layers: object) -> object:
    """Words of ``q_proj,v_proj``."""
    if not isinstance(layers, str):
        return layers
    names = tuple(name.strip() for name in layers.split(",") if name.strip())
    if not names:
        raise UsageError(f"`targets={layers}` names no layer.", hint="Write `targets=q_proj,v_proj`.")
    return names


# No machine holds more samples, or longer ones: a slip of the finger, and better said than tried.
MOST = 1_000_000
Count = Annotated[int, Field(ge=1, le=MOST)]
Number = Annotated[float, Field(ge=0, le=limits.OPTION, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=limits.OPTION, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Part = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""A share that is not all."""
Size = Annotated[int, Field(ge=0), BeforeValidator(read_size)]
Bits = Annotated[Literal[1, 2, 3, 4, 8], BeforeValidator(_read_bits)]
TableBits = Annotated[Literal[4, 6, 8], BeforeValidator(_read_number)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
"""One is typed; a recipe may have several."""
Layers = Annotated[tuple[str, ...], BeforeValidator(_read_layers)]
