"""Finished evaluations whose scores a comparison takes over instead of measuring again."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ulbq.artifacts import EvaluationManifest, Parent, QuantizedManifest, is_artifact, read_manifest
from ulbq.artifacts.names import local_path
from ulbq.errors import InputError
from ulbq.evaluation.evaluated import base_alone
from ulbq.evaluation.results import WITHOUT_ADAPTER, ModelScores, Protocol, Results, read_results


@dataclass(frozen=True)
class Recorded:
    """One finished evaluation.

    Attributes:
        path: as the user gave it.
        manifest: of the evaluation.
        results: its scores.
    """

    path: str
    manifest: EvaluationManifest
    results: Results

    def check(self, protocol: Protocol) -> None:
        """Raise InputError unless the scores were taken under this protocol."""
        mine, theirs = self.results.protocol.model_dump(), protocol.model_dump()
        different = [name for name in mine if mine[name] != theirs[name]]
        if different:
            name = different[0]
            raise InputError(
                f"'{self.path}' was measured with another {name} ({mine[name]}, not {theirs[name]}).",
                hint="Scores of different protocols do not compare: name the models instead, to measure them alike.",
            )

    def record(self) -> Parent:
        """How a comparison's manifest names it."""
        absolute, digest = os.path.realpath(self.path), self.manifest.digest
        return Parent(kind="evaluation", name=self.manifest.name, path=self.path, sha256=digest, absolute=absolute)

    def quantized(self) -> dict[str, QuantizedManifest]:
        """Manifests of the quantized models that it measured, by name, of those that are still where they were."""
        digests = {parent.path: parent.sha256 for parent in self.manifest.parents}
        found = {}
        for scores in self.results.models:
            manifest = _manifest_at(scores.subject.path)
            if isinstance(manifest, QuantizedManifest) and manifest.digest == digests.get(scores.subject.path):
                alone = scores.subject.adapter == WITHOUT_ADAPTER
                found[scores.subject.name] = base_alone(manifest) if alone else manifest
        return found


def read_recorded(sources: Sequence[str]) -> tuple[list[Recorded], list[str]]:
    """Tell finished evaluations from models.

    Returns:
        The evaluations, and the other sources; each once and in order.

    Raises:
        InputError: a damaged evaluation, or one of another version's results.
    """
    recorded, others = [], []
    for source in dict.fromkeys(sources):
        path = local_path(source)
        manifest = read_manifest(path) if is_artifact(path) else None
        if isinstance(manifest, EvaluationManifest):
            recorded.append(Recorded(source, manifest, read_results(source, manifest)))
        else:
            others.append(source)
    return recorded, others


def merge(measured: Sequence[ModelScores], recorded: Sequence[Recorded]) -> tuple[ModelScores, ...]:
    """All scores in one list, full-precision parents first; a model that was measured twice stands there once.

    Raises:
        InputError: two different models have one name.
    """
    found: dict[str, ModelScores] = {}
    for scores in [*measured, *(scores for one in recorded for scores in one.results.models)]:
        name, path = scores.subject.name, scores.subject.path
        if name in found and found[name].subject.path != path:
            raise InputError(
                f"'{path}' and '{found[name].subject.path}' are both called '{name}'.",
                hint="Name the models themselves instead of their evaluations.",
            )
        found.setdefault(name, scores)
    originals = {scores.subject.parent for scores in found.values()}
    return tuple(sorted(found.values(), key=lambda scores: scores.subject.name not in originals))


def _manifest_at(given: str) -> object:
    try:
        path = local_path(given)
        return read_manifest(path) if is_artifact(path) else None
    except InputError:  # only a figure goes without it
        return None
