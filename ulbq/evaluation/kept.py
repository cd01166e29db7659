"""Scores of full-precision models under the user's cache, so that the next artifact of one finds them there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from ulbq import __version__, runtime
from ulbq.artifacts import fingerprint
from ulbq.artifacts.disk import write_atomically

T = TypeVar("T")

_RULES = 1  # counts up where ulbq comes to measure otherwise


def folder() -> Path:
    """``ulbq/scores`` under the user's cache. Raises RuntimeError where this user has no home."""
    return runtime.user_cache() / "scores"


def key(parts: Mapping[str, Any]) -> str:
    """Name of a score by all that it follows from; versions of ulbq and of its libraries are added."""
    return fingerprint({"rules": _RULES, "ulbq": __version__, "versions": runtime.versions(), **parts})


def find(name: str, kind: type[T]) -> T | None:
    """The score kept under a name; None where there is none, or none that can be read."""
    try:
        value: T = TypeAdapter(kind).validate_python(json.loads((folder() / f"{name}.json").read_bytes()))
    except (OSError, RuntimeError, ValueError):
        return None
    return value


def keep(name: str, kind: type[T], value: T) -> str:
    """Keep a score. Gives why it could not be kept; empty where it was."""
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(folder() / f"{name}.json", TypeAdapter(kind).dump_json(value))
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""
