"""Where compiled libraries are kept, and which of what lies there is loaded: what this user's own process left, whole.

A shared library runs as whoever loads it. So the folders are the user's own and closed to others, and a library bears
the hash of its bytes in its name: what was cut short or changed on the disk is built again, not run.
"""

import contextlib
import os
import stat
from pathlib import Path

from ulbq import runtime
from ulbq.artifacts.disk import sha256_file

_OPEN_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(RuntimeError):
    """The cache is not this user's own; the message says what is wrong, for people."""


def folder() -> Path:
    """``ulbq/kernels`` under the user's cache. Raises UntrustedError where this user has no home."""
    try:
        return runtime.user_cache() / "kernels"
    except RuntimeError as error:
        raise UntrustedError("no home folder") from error


def find(key: str) -> Path | None:
    """The library that was kept under ``key``; None where there is none that can be loaded as it is.

    Raises:
        UntrustedError: another user owns the folder.
        OSError: it cannot be read.
    """
    place = folder()
    if not place.is_dir():
        return None
    _close(place)
    for path in sorted(place.glob(f"{key}-*.so")):
        if _is_ours(path) and path.name == _name(key, path):
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def open_folder() -> Path:
    """The folder, made where it is missing, closed to other users. Raises as :func:`find` does."""
    place = folder()
    place.parent.parent.mkdir(parents=True, exist_ok=True)
    for one in (place.parent, place):
        one.mkdir(mode=0o700, exist_ok=True)
    _close(place)
    return place


def keep(made: Path, key: str) -> Path:
    """Move a library from inside the folder to where :func:`find` finds it: whole or not at all."""
    made.chmod(0o700)
    path = folder() / _name(key, made)
    made.replace(path)
    return path


def _name(key: str, path: Path) -> str:
    return f"{key}-{sha256_file(path)[:32]}.so"


def _close(place: Path) -> None:
    """Shut the folder and the one above it to others. Raises UntrustedError where they are somebody else's."""
    for one in (place.parent, place):
        status = one.stat()
        if status.st_uid != os.geteuid():
            raise UntrustedError(f"'{one}' belongs to another user")
        if stat.S_IMODE(status.st_mode) != 0o700:
            one.chmod(0o700)


def _is_ours(path: Path) -> bool:
    """Whether a library is a file that only this user can have written."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & _OPEN_TO_OTHERS
