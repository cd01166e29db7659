"""What a string from a file must be before it becomes a path: it says what something is called, never where it lies."""

import os
from pathlib import Path, PurePosixPath

from ulbq.errors import InputError

_LONGEST = 255  # bytes of one component, on every file system in use
_LONGEST_PATH = 4096  # bytes, the null byte among them


def is_component(text: str) -> bool:
    """Whether ``text`` names something directly inside a folder: one component of a path, and not ``.`` or ``..``."""
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        return False
    return 0 < size <= _LONGEST and text not in (".", "..") and not {"/", "\0"} & set(text)


def is_inside(text: str) -> bool:
    """Whether ``text`` names a file somewhere below a folder, with forward slashes, in its one spelling."""
    return str(PurePosixPath(text)) == text and all(map(is_component, text.split("/")))


def component(text: str) -> str:
    """For pydantic: a name that is one path component. Artifacts made by ``-o .`` have an empty one, which is none.

    Raises:
        ValueError: anything else.
    """
    if text and not is_component(text):
        raise ValueError("a name is one component of a path, without slashes")
    return text


def local_path(given: str | Path) -> Path:
    """The path that a text names, ``~`` spelled out. Raises InputError for a text that can be no path."""
    text = str(given)
    try:
        too_long = len(os.fsencode(text)) > _LONGEST_PATH or any(
            len(os.fsencode(p)) > _LONGEST for p in text.split("/")
        )
    except UnicodeEncodeError:
        too_long = True
    if too_long or "\0" in text:
        raise InputError(f"{text[:60]!r} can be no path.", hint="Check its spelling.")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"'{given}' is in the home of somebody unknown here.", hint="Write the path in full."
        ) from error


def leads_out(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is, by a link on its way, one that lies elsewhere.

    A Hub cache keeps a model's content beside its snapshots, in ``blobs``: that is no elsewhere.
    """
    real, base = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    own = [base, base.parent.parent / "blobs"] if base.parent.name == "snapshots" else [base]
    return not any(map(real.is_relative_to, own))
