"""What a quantization run starts from: a model, an artifact to go on from, or the scores of a model's weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ulbq.artifacts.manifest import QuantizedManifest, SaliencyManifest, is_artifact, read_manifest
from ulbq.errors import InputError
from ulbq.formats import AnyScheme
from ulbq.methods.base import BlockStart, Needs
from ulbq.models.adapter_files import AdapterTensors, adapter_folder, read_adapter, read_config
from ulbq.models.source import ModelSource, resolve
from ulbq.saliency import Saliency, SaliencyKind

KINDS: tuple[str, ...] = get_args(SaliencyKind)
"""Kinds of scores that a run can compute first."""

_FULL_PRECISION = frozenset({"folder", "hub", "gguf", "converted"})


@dataclass(frozen=True)
class Origins:
    """What SOURCE stands for.

    Attributes:
        model: in full precision.
        start: a quantized artifact of that model to go on from; None to start afresh.
        saliency: path of the scores that came as SOURCE; None where a model or a quantized artifact came.
    """

    model: ModelSource
    start: ModelSource | None = None
    saliency: str | None = None


def open_origins(given: str | None, *, offline: bool) -> Origins:
    """Find the full-precision model behind a source.

    Raises:
        InputError: no such source, or the model that an artifact was made from is gone or has changed.
    """
    path = Path(given).expanduser() if given is not None else None
    if given is not None and path is not None and is_artifact(path):
        manifest = read_manifest(path)
        if isinstance(manifest, SaliencyManifest):
            return Origins(_parent(given, manifest, offline), saliency=given)
    source = resolve(given, offline=offline)
    if isinstance(source.manifest, QuantizedManifest):
        return Origins(_parent(source.given, source.manifest, offline), start=source)
    return Origins(source)


def _parent(given: str, manifest: QuantizedManifest | SaliencyManifest, offline: bool) -> ModelSource:
    recorded = next((parent for parent in manifest.parents if parent.kind in _FULL_PRECISION), None)
    if recorded is None:
        raise InputError(f"'{given}' does not say which model it was made from.", hint="Give the model itself.")
    try:
        model = resolve(recorded.path, offline=offline)
    except InputError as error:
        raise InputError(
            f"'{given}' was made from '{recorded.path}', which cannot be read: {error.message}",
            hint="Its weights are needed to go on: put the model back where it was.",
        ) from error
    if model.content_hash != recorded.sha256:
        raise InputError(
            f"'{recorded.path}' has changed since '{given}' was made from it.",
            hint="Make the artifact again from the model as it is now.",
        )
    return model


class Start:
    """Reads what an artifact holds of each block.

    Args:
        source: the artifact.
        scheme: how the run stores layers.
        needs: of the run's method.

    Raises:
        InputError: the method does not go on from artifacts, this one stores another format, or its adapter has
            another form than the run's.
    """

    def __init__(self, source: ModelSource, scheme: AnyScheme, needs: Needs) -> None:
        self.source = source
        if not needs.continues:
            raise InputError(
                f"'{source.given}' is quantized already, and this method does not go on from what is.",
                hint=f"Give the full-precision model it was made from{f': {source.parent}' if source.parent else ''}.",
            )
        others = {found for found in source.packed.values() if found != scheme}
        if others:
            found = min(others, key=str)
            raise InputError(
                f"'{source.given}' stores {found.format} {found.label}, this run {scheme.format} {scheme.label}.",
                hint="Continue with the method and format it was made with, or start from its parent model.",
            )
        self._adapters: AdapterTensors = {}
        folder = adapter_folder(source)
        if folder is not None and needs.adapter is not None:
            stored, wanted = read_config(folder), needs.adapter
            if (stored.rank, stored.alpha, stored.dora) != (wanted.rank, wanted.alpha, wanted.dora):
                raise InputError(
                    f"'{source.given}' has an adapter of rank {stored.rank}, alpha {stored.alpha:g}"
                    f"{', DoRA' if stored.dora else ''}; this run asks for another.",
                    hint="Give the same --rank, --alpha and --dora, or --no-adapter to leave it behind.",
                )
            self._adapters = read_adapter(folder)[1]

    def block(self, prefix: str, linears: tuple[str, ...]) -> BlockStart:
        """One block's packed layers and adapters, by name inside the block."""
        packed = {linear: self.source.read_packed(prefix + linear) for linear in linears}
        adapters = {name: self._adapters[prefix + name] for name in linears if prefix + name in self._adapters}
        return BlockStart(packed, adapters)


def open_saliency(asked: str | None, model: ModelSource) -> Saliency | None:
    """The scores that a run asks for, where they are an artifact; None where there are none or they are computed first.

    Args:
        asked: as :class:`~ulbq.methods.base.Needs` has it.
        model: whose weights are to be scored.

    Raises:
        InputError: no such artifact, or one of another model.
    """
    if asked is None or asked in KINDS:
        return None
    if not Path(asked).expanduser().is_dir():
        raise InputError(
            f"There is no saliency artifact '{asked}'.",
            hint=f"Give one's path, or a kind to compute first: {', '.join(KINDS)}.",
        )
    found = Saliency.open(Path(asked).expanduser())
    made_from = {parent.sha256 for parent in found.manifest.parents} if found.manifest else set()
    if model.content_hash not in made_from:
        raise InputError(
            f"The scores in '{asked}' were computed for another model than '{model.given}'.",
            hint="Run 'ulbq saliency' on this model.",
        )
    return found
