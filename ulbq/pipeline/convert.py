"""``convert``: a packed artifact in another tool's layout."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ulbq import __version__, runtime
from ulbq.artifacts.manifest import ConvertedManifest, read_back
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter, fingerprint, free_output
from ulbq.export.dense import shard_names, write_dense
from ulbq.models.adapter_files import adapter_folder
from ulbq.models.blocks import skeleton
from ulbq.models.source import resolve
from ulbq.progress import Progress, Silent

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class ConvertRequest(BaseModel):
    """A conversion.

    Attributes:
        to: ``dense`` is a plain model folder for transformers.
        dtype: of its tensors.
        merge_adapter: make an artifact's adapter a part of the weights; else it is copied beside them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    to: Literal["dense"] = "dense"
    dtype: Literal["fp16", "bf16", "fp32"] = "bf16"
    merge_adapter: bool = False
    offline: bool = False
    out: Path | None = None
    force: bool = False


def convert(request: ConvertRequest, progress: Progress | None = None) -> tuple[Path, ConvertedManifest]:
    """Convert a model; a full-precision source is copied in the new dtype.

    Returns:
        The new folder and its manifest.

    Raises:
        InputError: no such model, no adapter to merge, or the output is taken.
        NumericsError: a weight does not fit the dtype.
    """
    progress = progress or Silent()
    source = resolve(request.source, offline=request.offline)
    identity = fingerprint(
        {
            "ulbq": __version__,
            "source": source.content_hash,
            **request.model_dump(include={"to", "dtype", "merge_adapter"}),
        }
    )
    stem = f"{source.name}-{'merged-' if request.merge_adapter else ''}{request.to}-{request.dtype}"
    out = request.out or free_output(DEFAULT_ROOT, stem, identity)
    watch = runtime.Stopwatch()
    with ArtifactWriter(out, identity, force=request.force, spare=[source.path]) as writer:
        shards = len(shard_names(skeleton(source)))
        with watch.phase("write"), progress.phase("Writing", shards) as phase:
            write_dense(
                source,
                writer.path,
                DTYPES[request.dtype],
                lambda name: phase.advance(detail=name),
                merge_adapter=request.merge_adapter,
            )
        if adapter_folder(source) and not request.merge_adapter:
            progress.note(
                "The adapter lies beside the weights, for peft to load; --merge-adapter makes it part of them."
            )
        manifest = ConvertedManifest(
            name=out.name,
            request=request.model_dump(mode="json"),
            seed=0,
            device="cpu",
            parents=(source.record(),),
            phases=tuple(watch.records),
            target=request.to,
            dtype=request.dtype,
        )
        path = writer.finish(manifest)
    return path, read_back(path, ConvertedManifest)
