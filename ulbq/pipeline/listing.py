"""The artifacts under a folder: what each is, how good it was measured to be, and what it was made from."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field, ValidationError

from ulbq.artifacts import ConvertedManifest, EvaluationManifest, QuantizedManifest, SaliencyManifest, SweepManifest
from ulbq.artifacts.manifest import MANIFEST_NAME, PARTIAL_SUFFIX, AnyManifest, is_artifact, read_manifest
from ulbq.artifacts.records import Record
from ulbq.errors import InputError
from ulbq.evaluation.metrics import METRICS
from ulbq.evaluation.results import Results


class Listed(Record):
    """One artifact.

    Attributes:
        path: of its folder, as the folder that was looked through was given.
        kind: of its manifest; ``damaged`` where it cannot be read, ``unfinished`` where its run has not ended.
        what: method and format, target, score, or the models that were measured; what is wrong with a damaged one.
        bits: true bits a quantized weight; None where there are none.
        size: bytes of all its files.
        scores: by name, from the newest evaluation under the same folder that names this very artifact.
        parents: names of what it was made from.
        created: UTC, ISO 8601.
    """

    path: str
    kind: str
    what: str = ""
    bits: float | None = None
    size: int = 0
    scores: dict[str, float] = Field(default_factory=dict)
    parents: tuple[str, ...] = ()
    created: str = ""


def artifacts(folder: Path) -> list[Listed]:
    """Every artifact in a folder or below it, the oldest first; those without a date, which cannot be read, last.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder '{folder}'.", hint="Check the path.")
    found: list[Listed] = []
    manifests: dict[Path, AnyManifest] = {}
    for path in _folders(folder):
        if path.name.endswith(PARTIAL_SUFFIX):
            found.append(Listed(path=str(path), kind="unfinished", what="the same command goes on with it"))
            continue
        try:
            manifests[path] = read_manifest(path)
        except InputError as error:
            found.append(Listed(path=str(path), kind="damaged", what=error.message))
    scores = _scores(manifests.values())
    found += [_listed(path, manifest, scores.get(manifest.digest, {})) for path, manifest in manifests.items()]
    return sorted(found, key=lambda one: (not one.created, one.created, one.path))


def _folders(root: Path) -> Iterator[Path]:
    """Folders that are artifacts or unfinished ones; what lies in them is theirs."""
    for place, folders, files in os.walk(root):
        path = Path(place)
        if path.name.endswith(PARTIAL_SUFFIX) or (MANIFEST_NAME in files and is_artifact(path)):
            folders.clear()
            yield path
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _listed(path: Path, manifest: AnyManifest, scores: dict[str, float]) -> Listed:
    bits = manifest.bits.bits_per_weight if isinstance(manifest, QuantizedManifest) else None
    return Listed(
        path=str(path),
        kind=manifest.kind,
        what=_what(manifest),
        bits=bits,
        size=sum(entry.size for entry in manifest.files.values()) + (path / MANIFEST_NAME).stat().st_size,
        scores=scores,
        parents=tuple(parent.name for parent in manifest.parents),
        created=manifest.created,
    )


def _what(manifest: AnyManifest) -> str:
    if isinstance(manifest, QuantizedManifest):
        tuned = "" if manifest.finetune is None else f", tuned on {manifest.finetune.task}"
        return f"{manifest.method}, {manifest.scheme.get('format')}{tuned}"
    if isinstance(manifest, ConvertedManifest):
        return f"{manifest.target}, {manifest.dtype}"
    if isinstance(manifest, SaliencyManifest):
        return manifest.score
    if isinstance(manifest, SweepManifest):
        return f"{len(manifest.runs)} runs of {', '.join(dict.fromkeys(run.method for run in manifest.runs))}"
    return ", ".join(parent.name for parent in manifest.parents)


def _scores(manifests: Iterable[AnyManifest]) -> dict[str, dict[str, float]]:
    """What model cards show of evaluations, by the digest of the artifact that was measured; the newest count."""
    found: dict[str, dict[str, float]] = {}
    evaluations = [one for one in manifests if isinstance(one, EvaluationManifest)]
    for evaluation in sorted(evaluations, key=lambda one: one.created):
        try:
            results = Results.model_validate(evaluation.results)
        except ValidationError:  # of another version
            continue
        digests = {parent.path: parent.sha256 for parent in evaluation.parents}
        for model in results.models:
            digest = digests.get(model.subject.path)
            if digest is not None:
                numbers = [one for metric in METRICS.values() for one in metric.numbers(model)]
                published = {one.published.name: one.value for one in numbers if one.published is not None}
                found.setdefault(digest, {}).update(published)
    return found
