"""Which models an evaluation measures, what they are called, and which full-precision model each was made from."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from ulbq.artifacts import ConvertedManifest, Parent, QuantizedManifest
from ulbq.config.run import Template
from ulbq.errors import UlbqError
from ulbq.evaluation.results import WITHOUT_ADAPTER, Subject
from ulbq.formats import read_scheme
from ulbq.models.adapter_files import adapter_folder, read_config
from ulbq.models.source import ModelSource, resolve, resolve_parent
from ulbq.progress import Progress, Silent

_TEMPLATE: TypeAdapter[Template] = TypeAdapter(Template)


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A model to be measured.

    Attributes:
        source: where it is read from.
        name: unique within the evaluation.
        parent: the full-precision model that it was made from; None where it has none, or none that can be read here.
        adapter: whether it is measured with the adapter that it may have.
    """

    source: ModelSource
    name: str
    parent: "EvaluatedModel | None" = None
    adapter: bool = True

    @property
    def quantized(self) -> QuantizedManifest | None:
        """The manifest of a quantized model, its bits those of what is measured; None for any other."""
        manifest = self.source.quantized
        return manifest if manifest is None or self.adapter else base_alone(manifest)

    @property
    def subject(self) -> Subject:
        """What the results say about it."""
        manifest = self.quantized
        kind: Literal["model", "quantized", "converted"] = "model"
        method, scheme, bits = None, None, None
        if manifest is not None:
            kind = "quantized"
            method, scheme, bits = manifest.method, format_label(manifest), manifest.bits.bits_per_weight
        elif self.source.stored_as is not None:
            scheme, bits = self.source.stored_as
        if isinstance(self.source.manifest, ConvertedManifest):
            kind = "converted"
        return Subject(
            name=self.name,
            path=self.source.given,
            kind=kind,
            method=method,
            scheme=scheme,
            bits_per_weight=bits,
            adapter=self._adapter(),
            parent=self.parent.name if self.parent else None,
        )

    @property
    def template(self) -> Template:
        """How questions are laid out for it: as it was taught, before it was converted too, else as Alpaca's prompt."""
        manifest, path = self.source.manifest, self.source.folder
        while isinstance(manifest, ConvertedManifest) and manifest.parents:
            try:
                parent = resolve_parent(path, manifest.parents[0], offline=True)
                manifest, path = parent.manifest, parent.folder
            except UlbqError:  # said when the full-precision parent was looked for
                break
        taught = manifest.finetune.template if isinstance(manifest, QuantizedManifest) and manifest.finetune else None
        return _TEMPLATE.validate_python(taught or "alpaca")

    def record(self) -> Parent:
        """How the evaluation's manifest names it."""
        return self.source.record()

    def _adapter(self) -> str | None:
        folder = adapter_folder(self.source)
        if folder is None:
            return None
        config = read_config(folder)
        return f"{'DoRA' if config.dora else 'LoRA'} rank {config.rank}" if self.adapter else WITHOUT_ADAPTER


def base_alone(manifest: QuantizedManifest) -> QuantizedManifest:
    """A quantized model's manifest without the bits of its adapter: what is left when only the base is measured."""
    parts = {part: bits for part, bits in manifest.bits.parts.items() if part != "adapter"}
    return manifest.model_copy(update={"bits": manifest.bits.model_copy(update={"parts": parts})})


def open_candidates(
    sources: Sequence[str | None],
    *,
    parent: str | None = None,
    adapter: bool = True,
    offline: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> list[EvaluatedModel]:
    """Open models and the full-precision parents of those that have one.

    Args:
        sources: as :func:`ulbq.models.source.resolve` takes them.
        parent: everybody's parent, whatever the artifacts say.
        adapter: measure artifacts with the adapter that they have; else the base alone, and its name says so.
        offline: never touch the network.
        verify: compare what is read of artifacts with their hashes.
        progress: told about parents that cannot be read, or are not what they were.

    Returns:
        The models in order, each once. Models made from the same one share their ``parent``, which is itself in the
        list where it was among the sources.

    Raises:
        InputError, ResourceError: a source, or the named ``parent``, cannot be opened.
    """
    opened = [resolve(source, offline=offline, verify=verify) for source in sources]
    named = resolve(parent, offline=offline) if parent is not None else None
    origins = [named or _recorded_parent(source, offline, progress or Silent()) for source in opened]
    everyone = {source.content_hash: source for source in [*opened, *origins] if source is not None}
    for source in everyone.values():
        source.tell(progress or Silent())
    times = Counter(source.name for source in everyone.values())
    names = {key: source.name if times[source.name] == 1 else source.given for key, source in everyone.items()}
    if not adapter:
        names |= {key: f"{names[key]} {WITHOUT_ADAPTER}" for key, source in everyone.items() if adapter_folder(source)}
    hashes = [origin.content_hash if origin else None for origin in origins]
    found = {key: EvaluatedModel(everyone[key], names[key], None, adapter) for key in hashes if key is not None}
    for source, key in zip(opened, hashes, strict=True):
        own = source.content_hash
        found.setdefault(own, EvaluatedModel(source, names[own], found[key] if key is not None else None, adapter))
    return [found[key] for key in dict.fromkeys(source.content_hash for source in opened)]


def _recorded_parent(source: ModelSource, offline: bool, progress: Progress) -> ModelSource | None:
    """The full-precision model at the end of an artifact's ancestry."""
    found = source
    while isinstance(found.manifest, QuantizedManifest | ConvertedManifest):
        if not found.manifest.parents:
            return None
        recorded = found.manifest.parents[0]
        try:
            found = resolve_parent(found.folder, recorded, offline=offline)
        except UlbqError as error:
            progress.note(error.message)
            return None
        if found.content_hash != recorded.sha256:
            progress.warn(f"'{recorded.path}' has changed since '{source.name}' was made from it.")
    return None if found is source else found


def format_label(manifest: QuantizedManifest) -> str:
    """The format's short name, such as ``w2g64``; of one that this version does not know, its name."""
    try:
        return read_scheme(manifest.scheme).label
    except ValueError:
        return str(manifest.scheme.get("format", "?"))
