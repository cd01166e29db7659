"""Files that are read whole: of bounded size, and never waited on."""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from ulbq import limits


def read_small(path: Path, most: int) -> bytes:
    """A file's bytes.

    Args:
        path: the file.
        most: bytes that it may hold.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file (a pipe would be waited on without end), or holds more.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")
        if status.st_size > most:
            raise ValueError(f"it holds {status.st_size:,} bytes, more than the {most:,} that are read")
        return file.read(most)


def read_json(path: Path, most: int) -> Any:
    """The JSON value in a file, as the standard has it: without NaN and Infinity. Raises as :func:`read_small` does.

    ValueError also stands for what is not JSON, not UTF-8, or nested deeper than :data:`ulbq.limits.JSON_DEPTH`.
    """
    return parse_json(read_small(path, most).decode("utf-8"))


def parse_json(text: str, *, constants: bool = False) -> Any:
    """A JSON value, nested no deeper than :data:`ulbq.limits.JSON_DEPTH`; ``constants`` takes NaN and Infinity too."""
    try:
        value = json.loads(text, parse_constant=None if constants else _refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level: list[Any] = [value]
    for _ in range(limits.JSON_DEPTH):
        level = [part for one in level if isinstance(one, dict | list) for part in _parts(one)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _parts(value: dict[str, Any] | list[Any]) -> list[Any]:
    """The containers among the parts of one."""
    parts = value.values() if isinstance(value, dict) else value
    return [part for part in parts if isinstance(part, dict | list)]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
