"""What ``recommend`` is asked for."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from ulbq.config.convert import EngineName
from ulbq.config.options import Option, Positive, Settings, Size
from ulbq.config.run import DataDir, Device, Force, Offline, Out
from ulbq.errors import UsageError

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _read_time(given: object) -> object:
    """Seconds of ``2h``, ``90m``, ``45 min``, ``3600``; what is no text stays."""
    if not isinstance(given, str):
        return given
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|)", given.strip().lower())
    if match is None:
        raise UsageError(f"'{given}' is no time.", hint="Write 90m, 2h and the like.")
    return float(match[1]) * _SECONDS[match[2]]


class RecommendRequest(Settings):
    """The limits that a setting has to keep. Without any, the memory of this machine is the limit.

    Attributes:
        fit: bytes of weights, the cache of ``context`` tokens, and the program.
        max_time: seconds of quantizing.
        artifacts: where sweeps are looked for, whose runs count besides those that are shipped.
    """

    source: str | None = None
    fit: Annotated[
        Size | None,
        Option("Memory that the model may take where it runs, its cache included (8GB, …).", "", "SIZE", primary=True),
    ] = None
    bits: Annotated[Positive | None, Option("True bits a weight, at most.", "", "X", primary=True)] = None
    max_time: Annotated[
        Annotated[Positive, BeforeValidator(_read_time)] | None,
        Option("Time that quantizing may take here (90m, 2h, …).", "", "TIME", primary=True),
    ] = None
    engine: Annotated[
        EngineName | None,
        Option("What shall run it, with its weights packed.", "", flag="--engine --for", primary=True),
    ] = None
    context: Annotated[
        Annotated[int, Field(ge=1, le=1 << 30)] | None,
        Option("Tokens that the cache has to hold.", "", "N", default="4096, or the longest that the model takes"),
    ] = None
    artifacts: Annotated[Path | None, Option("Where sweeps are looked for.", "", "DIR", default="./artifacts")] = None
    device: Device = "auto"
    data_dir: DataDir = None
    offline: Offline = False
    out: Out = None
    force: Force = False
