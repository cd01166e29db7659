"""Artifacts: folders with a manifest, written atomically, resumable, checked on reading.

``ulbq.artifacts.shards`` (safetensors files) stands apart because it imports torch.
"""

from ulbq.artifacts.manifest import (
    SCHEMA_VERSION,
    AnyManifest,
    ConvertedManifest,
    EvaluationManifest,
    Manifest,
    QuantizedManifest,
    SaliencyManifest,
    SweepManifest,
    is_artifact,
    newest,
    read_back,
    read_manifest,
)
from ulbq.artifacts.records import BitsReport, BlockRecord, FileEntry, LayerRecord, Parent, SweepRun
from ulbq.artifacts.saliency import BlockScores, SaliencyLayer
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter, fingerprint, free_output
from ulbq.artifacts.whole import verify

__all__ = [
    "DEFAULT_ROOT",
    "SCHEMA_VERSION",
    "AnyManifest",
    "ArtifactWriter",
    "BitsReport",
    "BlockRecord",
    "BlockScores",
    "ConvertedManifest",
    "EvaluationManifest",
    "FileEntry",
    "LayerRecord",
    "Manifest",
    "Parent",
    "QuantizedManifest",
    "SaliencyLayer",
    "SaliencyManifest",
    "SweepManifest",
    "SweepRun",
    "fingerprint",
    "free_output",
    "is_artifact",
    "newest",
    "read_back",
    "read_manifest",
    "verify",
]
