"""The folder of an unfinished run: its name, its lock, and what of it is the run's own."""

import contextlib
import fcntl
import os
from pathlib import Path

from ulbq.artifacts.disk import remove_tree
from ulbq.artifacts.manifest import MANIFEST_NAME, PARTIAL_SUFFIX, is_replaceable
from ulbq.errors import InputError

JOURNAL, LOCK, SCRATCH = ".journal.jsonl", ".lock", ".scratch"
_OWN = frozenset({JOURNAL, LOCK, SCRATCH, MANIFEST_NAME})


def partial_of(path: Path) -> Path:
    return path.parent / (path.name + PARTIAL_SUFFIX)


def aside_of(path: Path) -> Path:
    """Where an artifact that is replaced stands until the new one has its place."""
    return path.parent / f".{path.name}.replaced"


def occupied(path: Path) -> bool:
    """Whether anything but an empty folder stands there."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def is_own(name: str) -> bool:
    """Whether a file, relative to the folder, is the writer's and no part of the artifact."""
    return name.split("/")[0] in _OWN


def check_ours(partial: Path) -> None:
    """Raise where a folder (or file, or link) bears the name of a partial folder but no writer made it."""
    if partial.is_symlink():
        ours = False
    elif partial.is_dir():
        names = set(os.listdir(partial))
        ours = names <= {LOCK} or JOURNAL in names
    else:
        ours = not partial.exists()
    if not ours:
        raise InputError(
            f"'{partial}' is in the way: it has the name of an unfinished run but is none.",
            hint="Move it away, or give another `out`.",
        )


def make_folders(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were made, innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"'{folder}' cannot be a folder: there is a file in the way.", hint="Give another `out`."
        ) from error
    return missing


def acquire(partial: Path, out: Path) -> int:
    """Make the partial folder and lock it against other processes; returns the lock's file descriptor."""
    while True:
        partial.mkdir(exist_ok=True)
        lock = partial / LOCK
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its owner finished between the two calls
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have renamed or removed the folder while this one opened the file in it.
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(
                f"Another process is writing '{out}' at this moment.", hint="Wait for it, or give another `out`."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_locked(lock: Path) -> bool:
    """Whether a living process holds a lock."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_leftovers(artifact: Path) -> None:
    """Remove what a run needs no more once its artifact stands; the journal last, which marks what is left."""
    remove_tree(aside_of(artifact))
    remove_tree(artifact / SCRATCH)
    for name in (LOCK, JOURNAL):
        (artifact / name).unlink(missing_ok=True)


def clear_up(artifact: Path) -> None:
    """Remove what a run that was killed right after its end left in the artifact; where that may not be, it stays."""
    left = (artifact / JOURNAL).exists() and is_replaceable(artifact)
    with contextlib.suppress(OSError):
        if left and not partial_of(artifact).exists() and not is_locked(artifact / LOCK):
            remove_leftovers(artifact)
