"""Files that survive a crash, and disk errors as sentences."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ulbq.errors import DiskFullError, InputError, ResourceError

TEMPORARY_PREFIX = ".tmp"
"""Names that a killed write may leave behind; safetensors uses the same prefix for its own."""

# How numpy tells that the disk took less than it was given.
_SHORT = re.compile(r"\d+ requested and \d+ written")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ENOLCK, errno.EOPNOTSUPP}
)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hex, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Stamp(NamedTuple):
    """What a file is known by without a look into it; another after it was replaced or written to."""

    device: int
    inode: int
    size: int
    modified: int


def stamp_of(file: Path | int) -> Stamp:
    """Of a path or an open file's descriptor."""
    found = os.stat(file)
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def check_unchanged(path: Path, before: Stamp) -> None:
    """Refuse a file that was removed, replaced or written to since ``before``. Raises InputError."""
    try:
        same = stamp_of(path) == before
    except OSError:
        same = False
    if not same:
        raise InputError(
            f"'{path}' changed while it was being read.", hint="Leave it as it is during a run, and start again."
        )


def changed(path: Path) -> InputError:
    """The sentence for a file of an artifact that is not what was written."""
    return InputError(
        f"'{path}' was changed after the artifact was written: its SHA-256 differs.",
        hint="Make the artifact again, or restore the file from a copy.",
    )


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    """Where ``path`` is written before it is renamed into place."""
    return path.with_name(f"{TEMPORARY_PREFIX}-{path.name}")


def replace_synced(temporary_path: Path, path: Path) -> None:
    """Rename a complete temporary file into place so that after a crash either the old or the new file is there."""
    sync(temporary_path)
    os.replace(temporary_path, path)
    sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file, or leave what was there."""
    scratch = temporary(path)
    try:
        scratch.write_bytes(data)
        replace_synced(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def remove_tree(path: Path) -> None:
    """Remove a folder with all it holds; nothing happens where there is none."""
    if path.exists():
        shutil.rmtree(path)


def disk_full(error: BaseException) -> DiskFullError | None:
    """The sentence for a full disk or an exhausted quota; None where ``error`` is anything else."""
    short = isinstance(error, OSError) and error.errno is None and _SHORT.fullmatch(str(error))
    if isinstance(error, OSError) and (short or error.errno in _FULL):
        return DiskFullError(
            f"The disk is full: {error.strerror or os.strerror(errno.ENOSPC)}.",
            hint="Free some space (or point `out` at another disk) and run the same command again.",
        )
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk into DiskFullError, one that refuses into ResourceError; ``path`` is what the sentence names."""
    try:
        yield
    except OSError as error:
        if full := disk_full(error):
            raise full from error
        if error.errno in _REFUSED:
            raise ResourceError(
                f"'{path}' cannot be written: {error.strerror}.", hint="Give a folder that can be written, as `out`."
            ) from error
        raise
