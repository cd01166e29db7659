"""What an artifact says about itself: ``manifest.json``.

A manifest is written last, so a folder that has one is complete. Its ``digest`` covers every other field, the hashes
of all files among them: whoever knows an artifact's digest knows its content.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from ulbq import __version__, limits, runtime
from ulbq.artifacts.loaded import loaded_names
from ulbq.artifacts.names import component, is_inside
from ulbq.artifacts.records import (
    BitsReport,
    BlockRecord,
    Coverage,
    EndToEndRecord,
    ExpertsRecord,
    FileEntry,
    FinetuneRecord,
    LayerRecord,
    Parent,
    Record,
    RotationRecord,
    SweepRun,
    TemperatureRecord,
)
from ulbq.artifacts.saliency import SaliencyLayer
from ulbq.artifacts.small_files import read_json
from ulbq.errors import InputError

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
PARTIAL_SUFFIX = ".partial"
_LEVELS = 3  # of folders that a search for the newest artifact goes down: a home folder can hold millions

_UPGRADERS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # 2 counts the spurious attention sinks of blocks, and knows parents by more than the path that was typed.
    1: lambda data: data,
}
"""From a schema version to the function that turns its JSON object into the next version's."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Manifest(Record):
    """What every kind of artifact records. ``files``, ``fingerprint``, ``processes`` and ``digest`` are the writer's.

    Attributes:
        created: UTC, ISO 8601 with microseconds.
        name: short name for people, and for what is made from it: one path component.
        request: the full request that made the artifact.
        versions: of the libraries that decide the numbers.
        files: by path relative to the artifact, with forward slashes; all but the manifest itself.
        fingerprint: SHA-256 over what decides the content (request, source, calibration).
        warnings: what the run warned of, each once.
        processes: how many worked on the run together, each on a device of its own.
        digest: SHA-256 over the canonical JSON of all the other fields.
    """

    schema_version: int = SCHEMA_VERSION
    ulbq_version: str = __version__
    created: str = Field(default_factory=_now)
    name: Annotated[str, AfterValidator(component)]
    request: dict[str, Any]
    seed: int
    versions: dict[str, str] = Field(default_factory=runtime.versions)
    device: str
    parents: tuple[Parent, ...] = Field(default=(), max_length=limits.PARENTS)
    files: dict[str, FileEntry] = Field(default_factory=dict)
    phases: tuple[runtime.PhaseRecord, ...] = ()
    fingerprint: str = ""
    warnings: tuple[str, ...] = ()
    processes: int = 1
    digest: str = ""


class QuantizedManifest(Manifest):
    """A packed model.

    Attributes:
        scheme: the default scheme's JSON object; each layer repeats its own.
        tables: of the table of tokens and the head, those that are packed; a head that is tied is the former.
        experts: what each expert of a mixture saw; empty for other models, and without a calibration.
        temperature: what was fitted into the last norm after the blocks; None where nothing was.
        end_to_end: how the whole model trained after its blocks; None where it did not.
        finetune: how it learnt a task after that; None where it did not.
        skipped: modules that stay in full precision.
        coverage: how much is quantized, and why the rest is not; None in artifacts that are older than it.
        rotation: of the weights that were quantized, against those of the model that it was made from; None for none.
        calibration: name, samples, sequence length and SHA-256 of the token samples; empty where none were needed.
    """

    kind: Literal["quantized"] = "quantized"
    method: str
    scheme: dict[str, Any]
    bits: BitsReport
    layers: tuple[LayerRecord, ...]
    tables: tuple[LayerRecord, ...] = ()
    blocks: tuple[BlockRecord, ...] = ()
    experts: tuple[ExpertsRecord, ...] = ()
    temperature: TemperatureRecord | None = None
    end_to_end: EndToEndRecord | None = None
    finetune: FinetuneRecord | None = None
    skipped: tuple[str, ...] = ()
    coverage: Coverage | None = None
    rotation: RotationRecord | None = None
    calibration: dict[str, Any] = Field(default_factory=dict)


class EvaluationManifest(Manifest):
    """Scores of a model; ``results`` is what ``results.json`` holds."""

    kind: Literal["evaluation"] = "evaluation"
    results: dict[str, Any]


class ConvertedManifest(Manifest):
    """A model in another tool's layout; ``target`` names it, ``dtype`` is that of the dense tensors."""

    kind: Literal["converted"] = "converted"
    target: str
    dtype: str


class SaliencyManifest(Manifest):
    """Scores of a model's weights, one shard a block.

    Attributes:
        score: how they were computed: ``fisher``, ``gradient``, ``hessian``, ``wanda`` or ``magnitude``.
        dtype: in which they are stored, each layer with a scale of its own.
        top: as a layer's, over the weights of all layers together.
        rounding: as a layer's; that of the worst layer.
        loss: mean cross-entropy of the calibration samples, nats a token; None for kinds that need none.
        calibration: name, samples, sequence length and SHA-256 of the token samples; empty where none were needed.
    """

    kind: Literal["saliency"] = "saliency"
    score: str
    dtype: str
    layers: tuple[SaliencyLayer, ...]
    top: dict[str, float]
    rounding: float
    loss: float | None = None
    calibration: dict[str, Any] = Field(default_factory=dict)


class SweepManifest(Manifest):
    """Runs of one model with different settings, which lie below ``runs``, and their scores.

    Attributes:
        runs: those that ended.
        left_out: why others did not, by their names.
        results: as of an evaluation; the full-precision model is among the models.
    """

    kind: Literal["sweep"] = "sweep"
    runs: tuple[SweepRun, ...]
    left_out: dict[str, str] = Field(default_factory=dict)
    results: dict[str, Any]


M = TypeVar("M", QuantizedManifest, EvaluationManifest, ConvertedManifest, SaliencyManifest, SweepManifest)
AnyManifest = QuantizedManifest | EvaluationManifest | ConvertedManifest | SaliencyManifest | SweepManifest
_CLASSES: dict[str, type[AnyManifest]] = {
    "quantized": QuantizedManifest,
    "evaluation": EvaluationManifest,
    "converted": ConvertedManifest,
    "saliency": SaliencyManifest,
    "sweep": SweepManifest,
}


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces. Takes pydantic models and paths too.

    Raises:
        ValueError: a number that is not finite.
        TypeError: a value with no order or no JSON form, a set for one.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=plain)


def plain(value: Any) -> Any:
    """JSON form of a pydantic model or a path; for ``json.dumps(default=...)``."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def sealed(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``, with the digest filled in."""
    # Through pydantic's own JSON, which alone turns non-finite numbers into strings.
    data: dict[str, Any] = json.loads(manifest.model_dump_json())
    data["digest"] = _digest(data)
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _digest(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def is_artifact(path: Path) -> bool:
    """Whether a folder claims to be an artifact. A damaged one does too, so that reading it can say what is wrong."""
    try:
        return _is_ours(_load(path))
    except ValueError:
        return True
    except OSError:
        return False


def is_replaceable(path: Path) -> bool:
    """Whether a folder is beyond doubt an artifact of ours, which ``--force`` may replace."""
    return _glance(path) is not None


def newest(root: Path, kinds: Collection[str]) -> Path | None:
    """The finished artifact up to three folders below ``root`` that was written last, of one of the kinds.

    Last is by the file system's clock, not by what a manifest says of itself. Only glances at manifests, from the
    newest on: a damaged artifact may be returned, and reading it says what is wrong.
    """
    found: list[tuple[int, Path]] = []
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        level = len(folder.relative_to(root).parts)
        seen = (name for name in folders if not name.startswith(".") and not name.endswith(PARTIAL_SUFFIX))
        folders[:] = seen if level < _LEVELS else ()
        if level and MANIFEST_NAME in files:
            with contextlib.suppress(OSError):
                found.append(((folder / MANIFEST_NAME).stat().st_mtime_ns, folder))
    for _, folder in sorted(found, reverse=True):
        data = _glance(folder)
        if data is not None and data["kind"] in kinds:
            return folder
    return None


def read_manifest(path: Path, *, unfinished: bool = False) -> AnyManifest:
    """Read and check an artifact's manifest, and that its files are there in full size.

    Args:
        path: the artifact.
        unfinished: take one that does not stand at its place yet.

    Raises:
        InputError: no artifact, a foreign or unfinished folder, a corrupt, newer or hand-edited manifest, a missing
            or truncated file, or one that would be loaded and is not listed; each in its own words.
    """
    if not unfinished and path.resolve().name.endswith(PARTIAL_SUFFIX):
        raise _unfinished(path)
    manifest = load_manifest(path)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry)
    if stray := next(
        (name for name in loaded_names(path) if name not in manifest.files and name != MANIFEST_NAME), None
    ):
        raise InputError(
            f"'{path / stray}' was not written with the artifact, and would be loaded with it.", hint="Remove it."
        )
    return manifest


def load_manifest(path: Path) -> AnyManifest:
    """As :func:`read_manifest`, without a look at the files."""
    return _parse(path, _read_json(path))


def read_back(path: Path, kind: type[M]) -> M:
    """The manifest that a run of our own has just written, digest and file hashes included."""
    manifest = read_manifest(path)
    if not isinstance(manifest, kind):
        raise TypeError(f"wrote a manifest of kind {manifest.kind}")
    return manifest


def _load(path: Path) -> Any:
    """The manifest's JSON. Raises OSError where there is none, ValueError where it is not JSON."""
    return read_json(path / MANIFEST_NAME, limits.MANIFEST_SIZE)


def _glance(path: Path) -> dict[str, Any] | None:
    """The unchecked manifest of a folder; None where it is not ours beyond doubt."""
    try:
        data = _load(path)
    except (OSError, ValueError):
        return None
    return data if _is_ours(data) else None


def _is_ours(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("kind"), str) and _is_version(data.get("schema_version"))


def _is_version(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_json(path: Path) -> dict[str, Any]:
    """The manifest's JSON object as it stands in the file, known to be ours and of a version that can be read."""
    try:
        data = _load(path)
    except FileNotFoundError as error:
        raise _absent(path) from error
    except NotADirectoryError as error:
        raise InputError(f"'{path}' is a file, not an artifact folder.") from error
    except OSError as error:
        raise InputError(f"'{path / MANIFEST_NAME}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(
            f"'{path / MANIFEST_NAME}' is corrupt: {error}.", hint="Make the artifact again, or restore it from a copy."
        ) from error
    if not _is_ours(data):
        raise InputError(
            f"'{path}' is not an artifact: ulbq did not write its {MANIFEST_NAME}.",
            hint="Give a folder that a ulbq command made.",
        )
    version: int = data["schema_version"]
    if version > SCHEMA_VERSION:
        raise InputError(
            f"'{path}' was written by a newer ulbq ({data.get('ulbq_version', 'unknown')}, schema {version}); "
            f"this one reads schemas up to {SCHEMA_VERSION}.",
            hint="Upgrade with 'pip install --upgrade ulbq'.",
        )
    return {str(key): value for key, value in data.items()}


def _unfinished(path: Path) -> InputError:
    return InputError(
        f"'{path}' is an unfinished run.", hint="Run the command that makes it again: it goes on where it stopped."
    )


def _absent(path: Path) -> InputError:
    if not path.exists():
        if path.with_name(path.name + PARTIAL_SUFFIX).exists():
            return InputError(
                f"'{path}' is not finished yet.",
                hint="Run the command that makes it again: it goes on where it stopped.",
            )
        return InputError(f"There is no artifact '{path}'.", hint="Check the path.")
    return InputError(
        f"'{path}' is not an artifact: it has no {MANIFEST_NAME}.", hint="Give a folder that a ulbq command made."
    )


def _parse(path: Path, data: dict[str, Any]) -> AnyManifest:
    try:
        intact = data.get("digest") == _digest(data)
    except ValueError as error:  # a number so large that it is none
        raise InputError(f"'{path / MANIFEST_NAME}' is corrupt: {error}.") from error
    if not intact:
        raise InputError(
            f"'{path / MANIFEST_NAME}' was edited after it was written: its digest does not fit its content.",
            hint="Make the artifact again, or restore the manifest from a copy.",
        )
    for version in range(data["schema_version"], SCHEMA_VERSION):
        if version not in _UPGRADERS:
            raise InputError(f"'{path}' has schema {version}, which no ulbq ever wrote.")
        data = {**_UPGRADERS[version](data), "schema_version": version + 1}
    if data["kind"] not in _CLASSES:
        raise InputError(f"'{path}' is an artifact of an unknown kind, '{data['kind']}'.")
    try:
        return _CLASSES[data["kind"]].model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise InputError(f"The manifest of '{path}' does not fit its schema: {field}: {what}.") from error


def _remedy(name: str) -> str:
    if name.endswith(".safetensors"):
        return "Make the artifact again, or copy it again in full."
    return "Copy the file again; if you changed it on purpose, 'ulbq inspect --reseal' takes it over as it is."


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    if not is_inside(name):
        raise InputError(f"The manifest of '{path}' names a file outside the artifact: '{name}'.")
    file = path / name
    if not file.is_file():
        raise InputError(
            f"'{file}' is missing from the artifact.", hint="Make the artifact again, or restore the file from a copy."
        )
    size = file.stat().st_size
    if size != entry.size:
        raise InputError(
            f"'{file}' holds {size:,} bytes where {entry.size:,} were written: "
            f"{'truncated' if size < entry.size else 'changed'}.",
            hint=_remedy(name),
        )
