"""Artifact folders that appear whole or not at all, and runs that go on where they stopped.

A run writes into ``<out>.partial`` beside its target, notes every finished step in a journal there, and at the end
writes the manifest and renames the folder into place. A killed run leaves the partial folder; the same run (equal
fingerprint) takes it up again.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ulbq import __version__, distributed
from ulbq.artifacts.disk import disk_full, remove_tree, sha256_file, sync, write_atomically, writing
from ulbq.artifacts.journal import Journal
from ulbq.artifacts.manifest import MANIFEST_NAME, PARTIAL_SUFFIX, Manifest, canonical_json, is_replaceable, sealed
from ulbq.artifacts.names import is_component
from ulbq.artifacts.parents import seen_from
from ulbq.artifacts.partial import (
    JOURNAL,
    LOCK,
    SCRATCH,
    acquire,
    aside_of,
    check_ours,
    clear_up,
    is_own,
    make_folders,
    occupied,
    partial_of,
    remove_leftovers,
)
from ulbq.artifacts.records import FileEntry
from ulbq.errors import InputError, ResourceError
from ulbq.progress import Progress

DEFAULT_ROOT = Path("artifacts")
"""Where artifacts go, and are looked for, that were given no folder."""


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
        raise InputError(f"{stem!r} cannot be the name of a folder.", hint="Give one as `out`.")
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    free = (
        path
        for path in (root / name for name in names)
        if not occupied(path) and not _claimed(partial_of(path), fingerprint)
    )
    # One answer for all processes: the first may make the folder while another still looks for it.
    return distributed.on_main(lambda: next(free))


def check_output(out: Path, target: Path | None = None, *, force: bool) -> None:
    """Refuse a place that is taken: what may be known before hours of work should be.

    What a run that was killed right after it finished left in the artifact there is removed.

    Args:
        out: as it was given.
        target: the same, absolute; None to look at ``out`` itself.
        force: whether an artifact there may be replaced.

    Raises:
        InputError: a file, a folder that is no artifact, or an artifact that must stay.
    """
    target = target or out
    if target.name.endswith(PARTIAL_SUFFIX):
        raise InputError(
            f"'{out}' has the name of an unfinished run.", hint=f"Give an `out` without '{PARTIAL_SUFFIX}'."
        )
    clear_up(target)
    if not occupied(target):
        return
    if not is_replaceable(target):
        what = "is a folder that is not an artifact" if target.is_dir() else "is a file"
        raise InputError(f"'{out}' exists and {what}.", hint="Give another `out`.")
    if not force:
        raise InputError(f"'{out}' exists.", hint="Give another `out`, or replace it with `force=True`.")


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
        nested: a folder in it where other runs write artifacts: what a killed one left there stays, for it goes on.

    Attributes:
        out: as given.
        path: the partial folder, absolute. Write the artifact's files here.
        scratch: a folder for what the run needs only meanwhile; not part of the artifact.
        resumed: whether an unfinished run is being continued.

    Raises:
        InputError: ``out`` is taken, another run's partial folder is in the way, or another process writes to it.
        ResourceError: the folder cannot be written, or the disk is full.
    """

    def __init__(
        self, out: Path, fingerprint: str, *, force: bool = False, spare: Iterable[Path] = (), nested: str | None = None
    ) -> None:
        # What is reached through a folder that does not exist has another name that leads there.
        self.out = Path(os.path.realpath(out)) if ".." in out.parts else out
        self.fingerprint = fingerprint
        self._force = force
        self._spare = [Path(os.path.realpath(path)) for path in spare]
        self._nested = nested
        self._planned: set[str] = set()
        self._fresh = False
        self._finished = False
        # Absolute: a change of the working folder must not move it. Real: partial and target must share a disk.
        self._target = Path(os.path.realpath(out))
        self._aside = aside_of(self._target)
        self.path = partial_of(self._target)
        self.scratch = self.path / SCRATCH
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
            check_ours(self.path)
            self._made = make_folders(self._target.parent)
            self._lock = acquire(self.path, self.out)
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._recover()
                # Again: while this one got hold of the lock, another run may have finished.
                self._check_out()
                self._journal, resumed = self._open_journal()
                self.scratch.mkdir(exist_ok=True)
            except BaseException:
                if self._fresh or os.listdir(self.path) == [LOCK]:
                    self._discard()
                os.close(self._folder)
                os.close(self._lock)
                raise
        return self._journal.entries, resumed

    @classmethod
    def begin(
        cls,
        out: Path | None,
        stem: str,
        decisive: Mapping[str, Any],
        *,
        root: Path = DEFAULT_ROOT,
        force: bool = False,
        spare: Iterable[Path] = (),
        nested: str | None = None,
    ) -> Self:
        """The writer of a run that this version of ulbq makes.

        Args:
            out: where the artifact will stand; None for the first free name of ``stem`` below ``root``.
            decisive: what decides the run's result, beside the version.
            force, spare, nested: as of the class.

        Raises:
            InputError, ResourceError: as of :func:`free_output` and the class.
        """
        identity = fingerprint({"ulbq": __version__, **decisive})
        return cls(out or free_output(root, stem, identity), identity, force=force, spare=spare, nested=nested)

    @property
    def name(self) -> str:
        """What the artifact is called: the last component of ``out``, spelled out where that is ``.`` or ``..``."""
        return os.path.basename(os.path.abspath(self.out))

    def tell(self, progress: Progress, done: str) -> None:
        """Say where a run is resumed that it is, and what is done."""
        if self.resumed:
            progress.note(f"Resuming {self.out}: {done} are done.")

    @property
    def journal(self) -> dict[str, Any]:
        """Values of the finished steps by key, those of the resumed run included, as JSON gives them back."""
        return self._entries

    @property
    def planned(self) -> list[str]:
        """Files of :meth:`plan` so far, in order of their names."""
        return sorted(self._planned)

    def plan(self, *names: str) -> None:
        """Name files, relative to the folder, that the artifact consists of besides those of the recorded steps."""
        self._planned.update(names)

    def record(self, key: str, value: Any, *, files: Iterable[Path] = (), forgets: Iterable[str] = ()) -> None:
        """Note a finished step, durably.

        Args:
            key: names the step; the last value counts.
            value: anything JSON can say, pydantic models included.
            files: what the step wrote; forced onto the disk and hashed first, so that no noted step can lack its files
                or have others. Those outside of ``scratch`` are the artifact's.
            forgets: keys of steps whose files are not needed any more.
        """

        def note() -> Any:
            with writing(self.out):
                self._check_there()
                paths = list(files)
                for path in [*paths, *{path.parent for path in paths}]:
                    sync(path)
                entries = {self._name(path): _entry(path) for path in paths}
                self._journal.append(key, value, files=entries, forgets=[*forgets])
            return self._journal.entries[key]

        self._entries[key] = distributed.on_main(note)

    def move(self, key: str, moves: Mapping[Path, Path]) -> None:
        """Have files of recorded steps take the names of others, all of them or, until the run is resumed, some.

        Args:
            key: names the step.
            moves: new paths by old ones.
        """

        def note() -> None:
            with writing(self.out):
                self._check_there()
                if key not in self._journal.entries:
                    named = {self._name(new): self._name(old) for old, new in moves.items()}
                    self._journal.append(key, {}, moves=named)
                self._move()

        distributed.on_main(note)

    def finish(self, manifest: Manifest, check: Callable[[Path], None] | None = None) -> Path:
        """Hash every file, write the manifest and move the artifact into place.

        Args:
            manifest: with everything but ``files``, ``fingerprint``, ``processes``, ``digest`` and where its parents
                stand from here, filled in now.
            check: looks at the complete folder before it is moved; what it raises keeps the run unfinished.

        Returns:
            ``out``, as it was given; spelled out where that has ``..`` in it or is ``.``.

        Raises:
            InputError: a file of the plan is missing or was changed, one that nobody planned is there, or the folder
                was removed under the run.
        """

        def complete() -> None:
            with writing(self.out):
                self._check_there()
                known = {"files": self._files(), "fingerprint": self.fingerprint, "processes": distributed.size()}
                known |= {"parents": tuple(seen_from(parent, self._target) for parent in manifest.parents)}
                path = self.path / MANIFEST_NAME
                write_atomically(path, sealed(manifest.model_copy(update=known)))
                try:
                    if check is not None:
                        check(self.path)
                    self._journal.close()
                    self._check_there()
                    self._publish()
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
                self._finished = True
                # Only now: until the rename a crash must find them, after it they are mere leftovers.
                remove_leftovers(self._target)

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
            gone = not self._finished and not self._is_there()
            if not self._finished and not self.journal:
                self._discard()
            os.close(self._folder)
            os.close(self._lock)
            if isinstance(error, OSError) and gone:
                raise self._removed() from error
        if error is not None and (full := disk_full(error)):
            raise full from error

    def _check_out(self) -> None:
        """Raise unless ``out`` is free, or may be replaced."""
        check_output(self.out, self._target, force=self._force)
        if occupied(self._target) and any(path.is_relative_to(self._target) for path in self._spare):
            raise InputError(
                f"'{self.out}' is what this run works on, and not even `force=True` replaces that.",
                hint="Give another `out`.",
            )

    def _open_journal(self) -> tuple[Journal, bool]:
        path = self.path / JOURNAL
        try:
            journal = Journal.load(path)
        except InputError:
            if not self._force:
                raise
            journal = None
        if journal is not None and journal.fingerprint == self.fingerprint:
            self._journal = journal
            try:
                self._take_over()
            except InputError:
                if not self._force:
                    raise
            else:
                return journal, True
        elif journal is not None and not self._force:
            journal.close()
            raise InputError(
                f"'{self.out}{PARTIAL_SUFFIX}' holds another run, with other settings or another source.",
                hint="Give another `out`, or discard that run with `force=True`.",
            )
        if journal is not None:
            journal.close()
        # The journal goes last: until then the folder is known as a run's.
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == JOURNAL):
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        self._fresh = True
        return Journal.create(path, self.fingerprint), False

    def _take_over(self) -> None:
        """Take what an interrupted run recorded, and nothing else. Raises InputError where that is not there."""
        found: list[Path] = []
        for folder, folders, files in os.walk(self.path):
            for path in (Path(folder, name) for name in (*folders, *files)):
                if path.is_symlink():
                    raise InputError(
                        f"'{path}' is a link, and no run left one there.",
                        hint="Remove it, or discard all with `force=True`.",
                    )
            found += [Path(folder, name) for name in files]
        self._move()
        for name, entry in self._journal.files.items():
            path = self.path / name
            if not path.is_file() or _entry(path) != entry:
                raise InputError(
                    f"'{path}' is {'missing' if not path.exists() else 'not what the interrupted run wrote'}.",
                    hint="Discard the unfinished run with `force=True`.",
                )
        for path in found:
            name = self._name(path)
            if name not in (*self._journal.files, JOURNAL, LOCK) and name.split("/")[0] != self._nested:
                path.unlink(missing_ok=True)
        for folder, _, _ in os.walk(self.path, topdown=False):
            if not os.listdir(folder):
                os.rmdir(folder)

    def _move(self) -> None:
        for new, old in self._journal.moves.items():
            if (self.path / old).exists():
                os.replace(self.path / old, self.path / new)
                sync((self.path / new).parent)

    def _files(self) -> dict[str, FileEntry]:
        """Hashes of the artifact's files. Raises InputError where the folder does not hold them and no others."""
        recorded = {name: entry for name, entry in self._journal.files.items() if not is_own(name)}
        wanted = self._planned | recorded.keys()
        lying = {self._name(path) for path in self.path.rglob("*") if not path.is_dir() or path.is_symlink()}
        lying = {name for name in lying if not is_own(name)}
        if lost := sorted(wanted - lying):
            raise InputError(f"'{self.path / lost[0]}' disappeared during the run.", hint="Run the same command again.")
        if stray := sorted(lying - wanted):
            raise InputError(
                f"'{self.path / stray[0]}' appeared during the run, and is no part of what it makes.",
                hint="Move it away and run the same command again.",
            )
        entries = {}
        for name in sorted(wanted):
            sync(self.path / name)
            entries[name] = _entry(self.path / name)
            if recorded.get(name, entries[name]) != entries[name]:
                raise InputError(
                    f"'{self.path / name}' was changed during the run.",
                    hint="Discard the unfinished run with `force=True`.",
                )
        return entries

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _is_there(self) -> bool:
        """Whether the folder that this run writes to still stands at its place."""
        try:
            return os.path.samestat(os.fstat(self._folder), self.path.stat())
        except OSError:
            return False

    def _check_there(self) -> None:
        if not self._is_there():
            raise self._removed()

    def _removed(self) -> InputError:
        return InputError(
            f"'{self.path}' was removed or replaced while this run wrote to it.", hint="Run the same command again."
        )

    def _publish(self) -> None:
        """Rename the partial folder to the target. An artifact that is replaced steps aside and back on failure."""
        self._check_out()
        replaces = occupied(self._target)
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
        if self._aside.exists() and not occupied(self._target):
            os.rename(self._aside, self._target)

    def _discard(self) -> None:
        """Remove the partial folder, and the folders above it that this run made and nothing else uses."""
        remove_tree(self.path)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break


def _entry(path: Path) -> FileEntry:
    return FileEntry(size=path.stat().st_size, sha256=sha256_file(path))


def _claimed(partial: Path, fingerprint: str) -> bool:
    """Whether a partial folder belongs to something else than the run with this fingerprint."""
    try:
        check_ours(partial)
        found = Journal.fingerprint_at(partial / JOURNAL)
    except InputError:
        return True
    return found is not None and found != fingerprint
