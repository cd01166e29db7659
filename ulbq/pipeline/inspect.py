"""What an artifact is, whether it is intact, and what it was made from."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from ulbq import limits
from ulbq.artifacts.manifest import MANIFEST_NAME, AnyManifest, is_artifact, read_manifest
from ulbq.artifacts.parents import places
from ulbq.artifacts.records import Parent, Record
from ulbq.artifacts.whole import verify as verify_files
from ulbq.errors import InputError, ResourceError
from ulbq.progress import Progress, Silent

State = Literal["same", "changed", "damaged", "missing", "unchecked"]

_MODELS = frozenset({"folder", "gguf", "hub"})


class Ancestor(Record):
    """A parent, or a parent's parent.

    Attributes:
        depth: 1 for a parent, 2 for a parent's parent, ….
        parent: as its child recorded it.
        state: what stands at its path now. ``same`` and ``changed`` compare the manifest digest of an artifact, and,
            where files are verified, the content of a model; else a model is ``unchecked``, and so is a model of the
            Hub that the local cache does not hold.
        created: of an artifact that was found, UTC, ISO 8601.
    """

    depth: int
    parent: Parent
    state: State
    created: str | None = None


class Inspection(Record):
    """What is known of one artifact.

    Attributes:
        path: as it was given.
        ancestry: depth first, every parent followed by its own parents; the first :data:`ulbq.limits.ANCESTORS`.
        total_size: bytes of all files, the manifest included.
        verified: whether every file was hashed again; else only the sizes were compared.
    """

    path: str
    manifest: AnyManifest = Field(discriminator="kind")
    ancestry: tuple[Ancestor, ...]
    total_size: int
    verified: bool


def inspect(path: Path, *, verify: bool = False, progress: Progress | None = None) -> Inspection:
    """Read an artifact's manifest, check its files and follow its parents.

    Args:
        path: the artifact.
        verify: hash every file again, and the model that it was made from.
        progress: told of the hashing.

    Raises:
        InputError: no artifact, or one that is not intact. What is wrong with a parent is told, not raised.
    """
    progress = progress or Silent()
    manifest = read_manifest(path)
    if verify:
        verify_files(path, progress)
    return Inspection(
        path=str(path),
        manifest=manifest,
        ancestry=tuple(islice(_ancestors(path, manifest, 1, progress if verify else None), limits.ANCESTORS)),
        total_size=sum(entry.size for entry in manifest.files.values()) + (path / MANIFEST_NAME).stat().st_size,
        verified=verify,
    )


def _ancestors(child: Path, manifest: AnyManifest, depth: int, progress: Progress | None) -> Iterator[Ancestor]:
    """Ancestors of an artifact; models are hashed where there is a ``progress`` to tell."""
    for parent in manifest.parents:
        if parent.kind in _MODELS:
            yield Ancestor(depth=depth, parent=parent, state=_model_state(parent, child, progress))
            continue
        path = _find(parent, child)
        if path is None:
            yield Ancestor(depth=depth, parent=parent, state="missing")
            continue
        try:
            found = read_manifest(path)
        except InputError:
            yield Ancestor(depth=depth, parent=parent, state="damaged")
            continue
        same = found.digest == parent.sha256
        yield Ancestor(depth=depth, parent=parent, state="same" if same else "changed", created=found.created)
        # Another artifact's parents are not this one's. And a digest cannot lie on a circle, so this comes to an end.
        if same:
            yield from _ancestors(path, found, depth + 1, progress)


def _find(parent: Parent, child: Path) -> Path | None:
    """Where an artifact parent stands: the first of its places that holds it, else the first that holds another."""
    found = [place for place in places(parent, child) if is_artifact(place)]
    return next((place for place in found if _digest(place) == parent.sha256), found[0] if found else None)


def _digest(path: Path) -> str | None:
    try:
        return read_manifest(path).digest
    except InputError:
        return None


def _model_state(parent: Parent, child: Path, progress: Progress | None) -> State:
    if parent.kind != "hub" and not places(parent, child):
        return "missing"
    if progress is None:
        return "unchecked"
    # Imported here because it needs torch and transformers, and a look at a manifest does not.
    from ulbq.models.source import resolve_parent

    with progress.phase(f"Hashing {parent.name}"):
        try:
            content = resolve_parent(child, parent, offline=True).content_hash
        except ResourceError:
            return "unchecked"
        except InputError:
            return "damaged"
    return "same" if content == parent.sha256 else "changed"
