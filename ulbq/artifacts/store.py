"""Artifact folders that appear whole or not at all, and runs that go on where they stopped.

A run writes into ``<out>.partial`` beside its target, notes every finished step in a journal there, and at the end
writes the manifest and renames the folder into place. A killed run leaves the partial folder; the same run (equal
fingerprint) takes it up again.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ulbq import distributed
from ulbq.artifacts.disk import (
    TEMPORARY_PREFIX,
    disk_full,
    remove_tree,
    sha256_file,
    sync,
    write_atomically,
    writing,
)
from ulbq.artifacts.journal import Journal
from ulbq.artifacts.manifest import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Manifest,
    canonical_json,
    is_replaceable,
    sealed,
)
from ulbq.artifacts.names import is_component
from ulbq.artifacts.records import FileEntry
from ulbq.errors import InputError, ResourceError

DEFAULT_ROOT = Path("artifacts")
"""Where artifacts go, and are looked for, that were given no folder."""

_JOURNAL = ".journal.jsonl"
_LOCK = ".lock"
_SCRATCH = ".scratch"
_OWN = frozenset({_JOURNAL, _LOCK, _SCRATCH, MANIFEST_NAME})


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 in hex over what decides a run's result. Two runs with one fingerprint can share their steps."""
    return hashlib.sha256(canonical_json(dict(parts)).encode()).hexdigest()


def free_output(root: Path, stem: str, fingerprint: str) -> Path:
    """The first of ``root/stem``, ``root/stem-2``, … that nothing occupies.

    An unfinished run with the same fingerprint does not occupy its name, so that it is resumed; anything else does.

    Raises:
        InputError: ``stem`` is no name of a folder directly below ``root``.
    """
    if not is_component(stem):
        raise InputError(f"{stem!r} cannot be the name of a folder.", hint="Give one with -o.")
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    free = (
        path
        for path in (root / name for name in names)
        if not _occupied(path) and not _claimed(_partial(path), fingerprint)
    )
    # One answer for all processes: the first may make the folder while another still looks for it.
    return distributed.on_main(lambda: next(free))


class ArtifactWriter:
    """Writes one artifact; a context manager.

    Leaving the context before :meth:`finish` keeps the partial folder if any step was recorded, and removes it
    otherwise. While the writer lives, no other process can write to the same partial folder. Where a run has several
    processes, the first one's writer writes; the others' know what it knows, and read what it wrote.

    Args:
        out: where the artifact will stand. May exist only as an empty folder.
        fingerprint: identifies the run; an unfinished one with the same is resumed.
        force: replace an existing artifact (only once the new one is complete), and discard an unfinished run with
            another fingerprint. A folder that is no artifact is never replaced.
        spare: what the artifact is made from; an ``out`` that is or holds any of it is never replaced.

    Attributes:
        out: as given.
        path: the partial folder, absolute. Write the artifact's files here.
        scratch: a folder for what the run needs only meanwhile; not part of the artifact.
        resumed: whether an unfinished run is being continued.

    Raises:
        InputError: ``out`` is taken, another run's partial folder is in the way, or another process writes to it.
        ResourceError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, out: Path, fingerprint: str, *, force: bool = False, spare: Iterable[Path] = ()) -> None:
        self.out = out
        self.fingerprint = fingerprint
        self._force = force
        self._spare = [Path(os.path.realpath(path)) for path in spare]
        self._fresh = False
        self._finished = False
        # Absolute: a change of the working folder must not move it. Real: partial and target must share a disk.
        self._target = Path(os.path.realpath(out))
        self._aside = self._target.parent / f".{self._target.name}.replaced"
        self.path = _partial(self._target)
        self.scratch = self.path / _SCRATCH
        self._entries, self.resumed = distributed.on_main(self._open)
        if not self.scratch.is_dir():
            raise ResourceError(
                f"Process {distributed.rank()} of this run does not see '{self.path}'.",
                hint="All processes must share the disk that the output is on.",
            )

    def _open(self) -> tuple[dict[str, Any], bool]:
        """Take hold of the partial folder; gives what its journal holds, and whether a run goes on there."""
        with writing(self.out):
            self._check_out()
            _check_ours(self.path)
            self._made = _make_folders(self._target.parent)
            self._lock = _acquire(self.path, self.out)
            try:
                self._recover()
                # Again: while this one got hold of the lock, another run may have finished.
                self._check_out()
                self._journal, resumed = self._open_journal()
                self.scratch.mkdir(exist_ok=True)
            except BaseException:
                if self._fresh or os.listdir(self.path) == [_LOCK]:
                    self._discard()
                os.close(self._lock)
                raise
        return self._journal.entries, resumed

    @property
    def name(self) -> str:
        """What the artifact is called: the last component of ``out``, spelled out where that is ``.`` or ``..``."""
        return os.path.basename(os.path.abspath(self.out))

    @property
    def journal(self) -> dict[str, Any]:
        """Values of the finished steps by key, those of the resumed run included, as JSON gives them back."""
        return self._entries

    def record(self, key: str, value: Any, *, files: Iterable[Path] = ()) -> None:
        """Note a finished step, durably.

        Args:
            key: names the step; the last value counts.
            value: anything JSON can say, pydantic models included.
            files: what the step wrote; forced onto the disk first, so that no noted step can lack its files.
        """

        def note() -> Any:
            with writing(self.out):
                paths = list(files)
                for path in [*paths, *{path.parent for path in paths}]:
                    sync(path)
                self._journal.append(key, value)
            return self._journal.entries[key]

        self._entries[key] = distributed.on_main(note)

    def finish(self, manifest: Manifest) -> Path:
        """Hash every file, write the manifest and move the artifact into place.

        Args:
            manifest: with everything but ``files``, ``fingerprint``, ``processes`` and ``digest``, filled in here.

        Returns:
            ``out``, as it was given; spelled out where that has ``..`` in it or is ``.``.
        """

        def complete() -> None:
            with writing(self.out):
                remove_tree(self.scratch)
                known = {"files": self._files(), "fingerprint": self.fingerprint, "processes": distributed.size()}
                write_atomically(self.path / MANIFEST_NAME, sealed(manifest.model_copy(update=known)))
                self._journal.close()
                self._publish()
                self._finished = True
                # Only now: until the rename a crash must find the journal, after it these two are mere leftovers.
                for name in (_JOURNAL, _LOCK):
                    (self._target / name).unlink()
                remove_tree(self._aside)

        distributed.on_main(complete)
        # ``a/..`` leads nowhere without an ``a``, and ``.`` is a folder that was just replaced.
        return self.out if self.out.name and ".." not in self.out.parts else self._target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if distributed.is_main():
            self._journal.close()
            if not self._finished and not self.journal:
                self._discard()
            os.close(self._lock)
        if error is not None and (full := disk_full(error)):
            raise full from error

    def _check_out(self) -> None:
        """Raise unless ``out`` is free, or may be replaced."""
        if not _occupied(self._target):
            return
        if not is_replaceable(self._target):
            what = "is a folder that is not an artifact" if self._target.is_dir() else "is a file"
            raise InputError(f"'{self.out}' exists and {what}.", hint="Give another -o.")
        if not self._force:
            raise InputError(f"'{self.out}' exists.", hint="Give another -o, or replace it with --force.")
        if any(path.is_relative_to(self._target) for path in self._spare):
            raise InputError(
                f"'{self.out}' is what this run works on, and not even --force replaces that.", hint="Give another -o."
            )

    def _open_journal(self) -> tuple[Journal, bool]:
        path = self.path / _JOURNAL
        try:
            journal = Journal.load(path)
        except InputError:
            if not self._force:
                raise
            journal = None
        if journal is not None and journal.fingerprint == self.fingerprint:
            for leftover in self.path.rglob(f"{TEMPORARY_PREFIX}*"):
                if leftover.is_file():
                    leftover.unlink()
            return journal, True
        if journal is not None:
            journal.close()
            if not self._force:
                raise InputError(
                    f"'{self.out}{PARTIAL_SUFFIX}' holds another run, with other settings or another source.",
                    hint="Give another -o, or discard that run with --force.",
                )
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        self._fresh = True
        return Journal.create(path, self.fingerprint), False

    def _files(self) -> dict[str, FileEntry]:
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        entries = {}
        for path in files:
            name = path.relative_to(self.path).as_posix()
            if name not in _OWN:
                sync(path)
                entries[name] = FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
        return entries

    def _publish(self) -> None:
        """Rename the partial folder to the target. An artifact that is replaced steps aside and back on failure."""
        self._check_out()
        replaces = _occupied(self._target)
        if replaces:
            remove_tree(self._aside)
            os.rename(self._target, self._aside)
        try:
            os.rename(self.path, self._target)
        except OSError as error:
            if replaces:
                os.rename(self._aside, self._target)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise InputError(
                    f"'{self.out}' appeared during the run and is not replaced.",
                    hint="Move it away and run the same command again.",
                ) from error
            raise
        sync(self._target.parent)

    def _recover(self) -> None:
        """Undo the first of the two renames of a replacement that a crash cut in half."""
        if self._aside.exists() and not _occupied(self._target):
            os.rename(self._aside, self._target)

    def _discard(self) -> None:
        """Remove the partial folder, and the folders above it that this run made and nothing else uses."""
        remove_tree(self.path)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break


def _partial(path: Path) -> Path:
    return path.parent / (path.name + PARTIAL_SUFFIX)


def _occupied(path: Path) -> bool:
    """Whether anything but an empty folder stands there."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _claimed(partial: Path, fingerprint: str) -> bool:
    """Whether a partial folder belongs to something else than the run with this fingerprint."""
    try:
        _check_ours(partial)
        found = Journal.fingerprint_at(partial / _JOURNAL)
    except InputError:
        return True
    return found is not None and found != fingerprint


def _check_ours(partial: Path) -> None:
    """Raise where a folder (or file) bears the name of a partial folder but no writer made it."""
    if partial.is_dir():
        names = set(os.listdir(partial))
        ours = not names or _LOCK in names or _JOURNAL in names
    else:
        ours = not partial.exists()
    if not ours:
        raise InputError(
            f"'{partial}' is in the way: it has the name of an unfinished run but is none.",
            hint="Move it away, or give another -o.",
        )


def _make_folders(folder: Path) -> list[Path]:
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
            f"'{folder}' cannot be a folder: there is a file in the way.", hint="Give another -o."
        ) from error
    return missing


def _acquire(partial: Path, out: Path) -> int:
    """Make the partial folder and lock it against other processes; returns the lock's file descriptor."""
    while True:
        partial.mkdir(exist_ok=True)
        lock = partial / _LOCK
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
                f"Another process is writing '{out}' at this moment.", hint="Wait for it, or give another -o."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
