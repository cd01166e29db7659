"""What a quantization run starts from: a model, an artifact to go on from, or the scores of a model's weights."""

from dataclasses import dataclass
from pathlib import Path

from ulbq.artifacts.manifest import QuantizedManifest, SaliencyManifest, is_artifact, read_manifest
from ulbq.artifacts.names import local_path
from ulbq.config.adapter import AdapterConfig
from ulbq.errors import InputError
from ulbq.formats import AnyScheme, read_scheme
from ulbq.methods.base import BlockStart, Needs
from ulbq.models.adapter_files import AdapterTensors, adapter_folder, read_adapter, read_config
from ulbq.models.source import FULL_PRECISION, ModelSource, resolve, resolve_parent
from ulbq.sensitivity import KINDS, Saliency


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


def open_origins(given: str | None, *, offline: bool, outline: bool = False) -> Origins:
    """Find the full-precision model behind a source.

    Args:
        given: the source.
        offline: as of :func:`~ulbq.models.source.resolve`, and so is ``outline``.

    Raises:
        InputError: no such source, or the model that an artifact was made from is gone or has changed.
    """
    path = local_path(given) if given is not None else None
    if given is not None and path is not None and is_artifact(path):
        manifest = read_manifest(path)
        if isinstance(manifest, SaliencyManifest):
            return Origins(_parent(path, manifest, offline), saliency=given)
    source = resolve(given, offline=offline, outline=outline)
    if source.quantized is not None:
        return Origins(_parent(source.path, source.quantized, offline), start=source)
    source.check_parent()
    return Origins(source)


def _parent(child: Path, manifest: QuantizedManifest | SaliencyManifest, offline: bool) -> ModelSource:
    recorded = next((parent for parent in manifest.parents if parent.kind in FULL_PRECISION), None)
    if recorded is None:
        raise InputError(f"'{child}' does not say which model it was made from.", hint="Give the model itself.")
    model = resolve_parent(child, recorded, offline=offline)
    if model.content_hash != recorded.sha256:
        raise InputError(
            f"'{model.given}' has changed since '{child}' was made from it.",
            hint="Make the artifact again from the model as it is now.",
        )
    return model


def rotation_seed(asked: bool | None, seed: int, start: ModelSource | None) -> int | None:
    """Seed that a run's model is rotated by; None where it stays as it is.

    What goes on from an artifact is rotated as that was, whatever the run's own seed: its codes are of those weights.

    Args:
        asked: as the request has it.
        seed: of the run.
        start: the artifact to go on from.

    Raises:
        InputError: the artifact was made the other way.
    """
    if start is None:
        return seed if asked else None
    recorded = start.quantized.rotation if start.quantized else None
    if asked is not None and asked != (recorded is not None):
        raise InputError(
            f"'{start.given}' was made {'without' if asked else 'with'} `rotate`, and its codes cannot be changed to "
            "the other.",
            hint="Leave out the option, or start from the full-precision model.",
        )
    return None if recorded is None else recorded.seed


class Start:
    """Reads what an artifact holds of each block.

    Args:
        source: the artifact.
        scheme: how the run stores layers.
        needs: of the run's method.
        without_adapter: an adapter that the run has none for may be left behind: that was asked for.

    Raises:
        InputError: the method does not go on from artifacts, this one stores another format, or its adapter has
            another form than the run's, is beside other layers, or would be lost.
    """

    def __init__(self, source: ModelSource, scheme: AnyScheme, needs: Needs, *, without_adapter: bool) -> None:
        self.source = source
        if not needs.continues:
            raise InputError(
                f"'{source.given}' is quantized already, and this method does not go on from what is.",
                hint=f"Give the full-precision model it was made from{f': {source.parent}' if source.parent else ''}.",
            )
        # Layers may have widths of their own, as a plan or a budget gave them; the rest is common to all.
        usual = read_scheme(source.quantized.scheme) if source.quantized else scheme
        others = {found for found in source.packed.values() if found.format != scheme.format}
        if usual.nominal != scheme.nominal or others:
            found = min(others, key=str, default=usual)
            raise InputError(
                f"'{source.given}' stores {found.format} {found.label}, this run {scheme.format} {scheme.label}.",
                hint="Continue with the method and format it was made with, or start from its parent model.",
            )
        self._adapters: AdapterTensors = {}
        folder = adapter_folder(source)
        if folder is not None and not (needs.adapter is None and without_adapter):
            self._adapters = self._take_adapter(folder, needs.adapter)

    def _take_adapter(self, folder: Path, wanted: AdapterConfig | None) -> AdapterTensors:
        """The stored adapter, which has to be the one that the run trains. Raises InputError."""
        given, stored = self.source.given, read_config(folder)
        form = f"rank {stored.rank}, alpha {stored.alpha:g}{', DoRA' if stored.dora else ''}"
        options = f"`rank={stored.rank}` `alpha={stored.alpha:g}`{' `dora`' if stored.dora else ''}"
        if wanted is None:
            raise InputError(
                f"'{given}' has an adapter of {form}, and this run would lose it.",
                hint=f"Give `adapter` {options} to keep it, or `adapter=False` to leave it behind.",
            )
        if (stored.rank, stored.alpha, stored.dora) != (wanted.rank, wanted.alpha, wanted.dora):
            raise InputError(
                f"'{given}' has an adapter of {form}; this run asks for another.",
                hint=f"Give {options} to go on with it, or `adapter=False` to leave it behind.",
            )
        spelled, adapters = read_adapter(folder)
        if adapters.keys() != self._adapted(wanted):
            # What is short for layers of some blocks means those of all.
            targets = spelled.targets if adapters.keys() == self._adapted(spelled) else sorted(adapters)
            everywhere = adapters.keys() == self.source.packed.keys()
            remedy = "Leave out `targets`" if everywhere else f"Give `targets={','.join(targets)}`"
            raise InputError(
                f"'{given}' has its adapter beside other layers than this run asks for.",
                hint=f"{remedy} to go on with it, or `adapter=False` to leave it behind.",
            )
        return adapters

    @property
    def adapted(self) -> bool:
        """Whether it brings an adapter."""
        return bool(self._adapters)

    def _adapted(self, config: AdapterConfig) -> set[str]:
        return {linear for linear in self.source.packed if config.matches(linear)}

    def block(self, prefix: str, linears: tuple[str, ...]) -> BlockStart:
        """One block's packed layers and adapters, by name inside the block."""
        packed = {linear: self.source.read_packed(prefix + linear) for linear in linears}
        adapters = {name: self._adapters[prefix + name] for name in linears if prefix + name in self._adapters}
        schemes = {linear: self.source.packed[prefix + linear] for linear in linears}
        return BlockStart(packed, adapters, schemes=schemes)


def check_saliency(asked: str) -> None:
    """Refuse what is neither a kind of scores nor a folder. Raises InputError."""
    if asked not in (*KINDS, "none") and not local_path(asked).is_dir():
        raise InputError(
            f"There is no saliency artifact '{asked}'.",
            hint=f"Give one's path, or a kind to compute first: {', '.join(KINDS)}.",
        )


def open_saliency(asked: str | None, model: ModelSource) -> Saliency | None:
    """The scores that a run asks for, where they are an artifact; None where there are none or they are computed first.

    Args:
        asked: as :class:`~ulbq.methods.base.Needs` has it.
        model: whose weights are to be scored.

    Raises:
        InputError: no such artifact, or one of another model, of which a rotated one is one.
    """
    if asked is None or asked in KINDS:
        return None
    check_saliency(asked)
    if model.rotation is not None:
        raise InputError(
            f"The scores in '{asked}' are of weights that were not rotated, and this run rotates them.",
            hint=f"Give `saliency` a kind to compute first ({', '.join(KINDS)}), or leave out `rotate`.",
        )
    found = Saliency.open(local_path(asked))
    made_from = {parent.sha256 for parent in found.manifest.parents} if found.manifest else set()
    if model.content_hash not in made_from:
        raise InputError(
            f"The scores in '{asked}' were computed for another model than '{model.given}'.",
            hint="Run 'ulbq saliency' on this model.",
        )
    return found
