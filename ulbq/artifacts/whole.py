"""Whether an artifact is what was written: all of it, and nothing else."""

from pathlib import Path

from ulbq import limits
from ulbq.artifacts.disk import changed, sha256_file
from ulbq.artifacts.loaded import is_loaded
from ulbq.artifacts.manifest import (
    AnyManifest,
    ConvertedManifest,
    EvaluationManifest,
    Manifest,
    QuantizedManifest,
    SaliencyManifest,
    SweepManifest,
    read_manifest,
)
from ulbq.artifacts.small_files import read_json
from ulbq.errors import InputError
from ulbq.progress import Progress, Silent

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def verify(path: Path, progress: Progress | None = None) -> None:
    """Hash every file of an artifact again, and see that its list has all that its kind needs.

    Raises:
        InputError: naming the first file that is not what was written, or that ought to be listed.
    """
    manifest = read_manifest(path)
    for name in _needed(path, manifest):
        if name not in manifest.files:
            raise InputError(
                f"The manifest of '{path}' lists no '{name}', without which the artifact is not whole.",
                hint="Make the artifact again, or restore it from a copy.",
            )
    with (progress or Silent()).phase("Verifying", len(manifest.files)) as phase:
        for name, entry in manifest.files.items():
            if sha256_file(path / name) != entry.sha256:
                raise changed(path / name)
            phase.advance(detail=name)


def check_small_files(path: Path, manifest: Manifest) -> None:
    """Hash what is read of an artifact besides its weights: configuration, tokenizer, index, adapter.

    Raises:
        InputError: naming the first one that is not what was written.
    """
    for name, entry in manifest.files.items():
        weights = "/" not in name and name.endswith(".safetensors")
        if not weights and is_loaded(name) and sha256_file(path / name) != entry.sha256:
            raise changed(path / name)


def _needed(path: Path, manifest: AnyManifest) -> list[str]:
    """Names of the files that an artifact of its kind cannot do without."""
    if isinstance(manifest, EvaluationManifest):
        return ["results.json"]
    if isinstance(manifest, SweepManifest):
        return [f"runs/{run.name}/manifest.json" for run in manifest.runs]
    if isinstance(manifest, SaliencyManifest):
        blocks = len({layer.block for layer in manifest.layers})
        listed = [name for name in manifest.files if name.endswith(".safetensors")]
        return [] if len(listed) >= blocks else ["block-*.safetensors"]
    if isinstance(manifest, ConvertedManifest) and manifest.target == "gguf":
        return ["model.gguf"]
    needed = ["config.json"]
    if isinstance(manifest, QuantizedManifest) and manifest.bits.parts.get("adapter"):
        needed += ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    if _SINGLE in manifest.files:
        return needed
    try:
        index = read_json(path / _INDEX, limits.INDEX_SIZE)
        shards = sorted({str(file) for file in index["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        shards = []
    return [*needed, _INDEX, *shards]
