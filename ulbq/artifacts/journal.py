"""The finished steps of a run, one JSON line each, readable after any crash."""

import json
import os
from pathlib import Path
from typing import Any

from ulbq.artifacts.disk import sync
from ulbq.artifacts.manifest import plain
from ulbq.errors import InputError

_FORMAT = 1


class Journal:
    """An append-only file of ``key: value`` steps under one fingerprint.

    Attributes:
        fingerprint: of the run that the steps belong to.
        entries: value of every step by key, as JSON gives it back: equal whether just recorded or read again.
    """

    def __init__(self, path: Path, fingerprint: str, entries: dict[str, Any], size: int) -> None:
        self.fingerprint = fingerprint
        self.entries = entries
        self._file = path.open("r+b")
        # Whatever lies behind the last whole line was torn off by a crash; a new line must not be glued to it.
        self._file.truncate(size)
        self._file.seek(size)

    @classmethod
    def create(cls, path: Path, fingerprint: str) -> "Journal":
        """Start an empty journal, over whatever was there."""
        header = _line({"journal": _FORMAT, "fingerprint": fingerprint})
        path.write_bytes(header)
        sync(path)
        sync(path.parent)
        return cls(path, fingerprint, {}, len(header))

    @classmethod
    def load(cls, path: Path) -> "Journal | None":
        """Open a journal where an earlier run left it; None where there is none or not even its header was whole.

        A torn last line is dropped: its step never counted as finished.

        Raises:
            InputError: a line before the last is damaged.
        """
        lines, size = _read(path)
        if not lines:
            return None
        return cls(path, lines[0]["fingerprint"], {line["key"]: line["value"] for line in lines[1:]}, size)

    @staticmethod
    def fingerprint_at(path: Path) -> str | None:
        """Fingerprint of the journal at ``path``, without opening it for writing.

        Returns and raises as :meth:`load` does.
        """
        lines, _ = _read(path)
        return str(lines[0]["fingerprint"]) if lines else None

    def append(self, key: str, value: Any) -> None:
        """Record a step durably. ``value``: anything JSON can say, pydantic models and paths included."""
        line = _line({"key": key, "value": value})
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries[key] = json.loads(line)["value"]

    def close(self) -> None:
        """Close the file; the entries stay."""
        self._file.close()


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, default=plain) + "\n").encode()


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines (the header first) and the bytes that they take."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    raw = data.splitlines(keepends=True)
    lines: list[dict[str, Any]] = []
    size = 0
    for number, text in enumerate(raw, start=1):
        line = _parse(text, header=number == 1)
        if line is None:
            if number == len(raw):
                break
            raise InputError(
                f"'{path}' is damaged in line {number}: the unfinished run cannot be continued.",
                hint="Discard it with --force.",
            )
        lines.append(line)
        size += len(text)
    return lines, size


def _parse(text: bytes, *, header: bool) -> dict[str, Any] | None:
    if not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    wanted = {"journal", "fingerprint"} if header else {"key", "value"}
    return line if isinstance(line, dict) and line.keys() == wanted else None
