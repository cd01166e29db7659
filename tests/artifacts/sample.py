"""Small artifacts for tests, and the tools to damage them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ulbq.artifacts import (
    ArtifactWriter,
    BitsReport,
    BlockRecord,
    LayerRecord,
    Manifest,
    Parent,
    QuantizedManifest,
    read_manifest,
)

FILES = {"config.json": b"{}\n", "model.safetensors": b"weights", "adapter/adapter.safetensors": b"low rank"}
SCHEME = {"format": "affine", "bits": 2, "group_size": 64, "symmetric": False}


def quantized(**changes: Any) -> QuantizedManifest:
    """A manifest of one layer of 4096 weights, as a pipeline hands it to the writer."""
    fields: dict[str, Any] = {
        "name": "tiny-w2g64",
        "request": {"method": "rtn", "bits": 2},
        "seed": 0,
        "device": "cpu, 1 threads",
        "method": "rtn",
        "scheme": SCHEME,
        "bits": BitsReport(parts={"codes": 8192, "scales": 1024, "zeros": 128, "embeddings": 9999}, weights=4096),
        "layers": (
            LayerRecord(
                name="model.layers.0.mlp.up_proj",
                shape=(64, 64),
                scheme=SCHEME,
                bits={"codes": 8192, "scales": 1024, "zeros": 128},
                error=0.125,
                sparsity=(0.5, 0.25),
            ),
        ),
        "blocks": (BlockRecord(index=0, start_error=2.0, end_error=0.5, steps=80, seconds=1.5),),
        "skipped": ("lm_head",),
    }
    return QuantizedManifest(**(fields | changes))


def parent_of(path: Path, manifest: Manifest) -> Parent:
    """The parent record of an artifact that was read from ``path``."""
    kind: str = manifest.kind  # type: ignore[attr-defined]
    return Parent(kind=kind, name=manifest.name, path=str(path), sha256=manifest.digest)


def write_files(folder: Path, files: Mapping[str, bytes] = FILES) -> list[Path]:
    """Write files by relative name, their folders too."""
    paths = [folder / name for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return paths


def write_artifact(
    out: Path, manifest: Manifest | None = None, files: Mapping[str, bytes] = FILES, *, force: bool = False
) -> Path:
    """A finished artifact."""
    with ArtifactWriter(out, "f" * 64, force=force) as writer:
        writer.record("step", 1, files=write_files(writer.path, files))
        return writer.finish(manifest or quantized())


def check_hashes(artifact: Path) -> None:
    """That every file which the manifest lists is what was written; of whatever files the artifact consists."""
    for name, entry in read_manifest(artifact).files.items():
        assert hashlib.sha256((artifact / name).read_bytes()).hexdigest() == entry.sha256


def digest(data: Mapping[str, Any]) -> str:
    """The digest as the documentation defines it, computed without the library."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def edit(artifact: Path, change: Callable[[dict[str, Any]], object], *, reseal: bool) -> None:
    """Edit the manifest's JSON in place; ``reseal`` makes the digest fit again, as another version of ulbq would."""
    path = artifact / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    if reseal:
        data["digest"] = digest(data)
    path.write_text(json.dumps(data))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
