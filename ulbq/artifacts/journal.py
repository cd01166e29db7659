"""The finished steps of a run, one JSON line each, readable after any crash.

A line tells the hashes of the files that its step wrote, and carries a sum over itself and all lines before it: what a
resumed run takes over is what was written, to the bit.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ulbq.artifacts.disk import sync
from ulbq.artifacts.manifest import plain
from ulbq.artifacts.records import FileEntry
from ulbq.errors import InputError

_FORMAT = 2
_HEADER = frozenset({"journal", "fingerprint", "sum"})
_STEP = frozenset({"key", "value", "files", "forgets", "moves", "sum"})


class Journal:
    """An append-only file of ``key: value`` steps under one fingerprint.

    Attributes:
        fingerprint: of the run that the steps belong to.
        entries: value of every step by key, as JSON gives it back: equal whether just recorded or read again.
        files: what must lie in the folder after all steps, by name relative to it.
        moves: all that was ever to be moved, old names by new ones; the last of them may not have come to it.
    """

    def __init__(self, path: Path, lines: list[dict[str, Any]], size: int) -> None:
        self.fingerprint: str = lines[0]["fingerprint"]
        self.entries: dict[str, Any] = {}
        self.files: dict[str, FileEntry] = {}
        self.moves: dict[str, str] = {}
        self._wrote: dict[str, tuple[str, ...]] = {}
        self._sum: str = lines[-1]["sum"]
        for line in lines[1:]:
            self._take(line)
        self._file = path.open("r+b")
        # Whatever lies behind the last whole line was torn off by a crash; a new line must not be glued to it.
        self._file.truncate(size)
        self._file.seek(size)

    @classmethod
    def create(cls, path: Path, fingerprint: str) -> "Journal":
        """Start an empty journal, over whatever was there."""
        header, _ = _summed("", {"journal": _FORMAT, "fingerprint": fingerprint})
        path.write_bytes(header)
        sync(path)
        sync(path.parent)
        return cls(path, [json.loads(header)], len(header))

    @classmethod
    def load(cls, path: Path) -> "Journal | None":
        """Open a journal where an earlier run left it; None where there is none or not even its header was whole.

        A torn last line is dropped: its step never counted as finished.

        Raises:
            InputError: a line before the last is damaged, or another version wrote it.
        """
        lines, size = _read(path)
        return cls(path, lines, size) if lines else None

    @staticmethod
    def fingerprint_at(path: Path) -> str | None:
        """Fingerprint of the journal at ``path``, without opening it for writing.

        Returns and raises as :meth:`load` does.
        """
        lines, _ = _read(path)
        return str(lines[0]["fingerprint"]) if lines else None

    def append(
        self,
        key: str,
        value: Any,
        *,
        files: Mapping[str, FileEntry] = {},
        forgets: Collection[str] = (),
        moves: Mapping[str, str] = {},
    ) -> None:
        """Record a step durably.

        Args:
            key: names the step; the last value counts, and only its files.
            value: anything JSON can say, pydantic models and paths included.
            files: what the step wrote.
            forgets: keys of steps whose files are of no use from now on.
            moves: files that change their names, the old ones by the new ones.
        """
        step = {"key": key, "value": value, "files": dict(files), "forgets": [*forgets], "moves": dict(moves)}
        data, self._sum = _summed(self._sum, step)
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(json.loads(data))

    def close(self) -> None:
        """Close the file; the entries stay."""
        self._file.close()

    def _take(self, line: dict[str, Any]) -> None:
        key: str = line["key"]
        for old in (key, *line["forgets"]):
            for name in self._wrote.pop(old, ()):
                self.files.pop(name, None)
        for new, old in line["moves"].items():
            self.files[new] = self.files.pop(old)
        self.moves |= line["moves"]
        files = {name: FileEntry.model_validate(entry) for name, entry in line["files"].items()}
        self.files |= files
        self._wrote[key] = tuple(files)
        self.entries[key] = line["value"]


def _summed(before: str, line: Mapping[str, Any]) -> tuple[bytes, str]:
    """A line with its sum, which hangs on that of the line before; and the sum."""
    text = json.dumps(line, ensure_ascii=False, default=plain)
    found = hashlib.sha256(f"{before}{text}".encode()).hexdigest()
    return f'{text[:-1]}, "sum": "{found}"}}\n'.encode(), found


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
        line = _parse(text, lines[-1]["sum"] if lines else "", header=number == 1)
        if line is None:
            # A header that a crash tore has no end.
            if number == len(raw) and (lines or not text.endswith(b"\n")):
                break
            raise InputError(
                f"'{path}' is damaged in line {number}: the unfinished run cannot be continued.",
                hint="Discard it with `force=True`.",
            )
        lines.append(line)
        size += len(text)
    return lines, size


def _parse(text: bytes, before: str, *, header: bool) -> dict[str, Any] | None:
    """A line that is whole and unchanged; None for any other."""
    if not text.endswith(b"\n"):
        return None
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.keys() != (_HEADER if header else _STEP):
        return None
    rest = {key: value for key, value in line.items() if key != "sum"}
    return line if _summed(before, rest)[1] == line["sum"] else None
