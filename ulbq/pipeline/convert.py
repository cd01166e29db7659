"""``convert``: a packed artifact in another tool's layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ulbq import __version__, runtime
from ulbq.artifacts.disk import writing
from ulbq.artifacts.manifest import ConvertedManifest, Manifest, QuantizedManifest, read_manifest
from ulbq.artifacts.records import BitsReport
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter, fingerprint, free_output
from ulbq.config.convert import ConvertRequest, Target
from ulbq.config.run import DtypeName
from ulbq.errors import InputError, UsageError
from ulbq.export import card, engines, fit
from ulbq.export.dense import shard_names, write_dense
from ulbq.export.fit import Candidate
from ulbq.export.gguf import write_gguf
from ulbq.export.gguf_vocab import check_tokenizer
from ulbq.export.half import wide_tensors, write_half
from ulbq.export.packed import write_packed
from ulbq.formats import AffineScheme
from ulbq.models.adapter_files import adapter_folder
from ulbq.models.blocks import skeleton
from ulbq.models.names import state_names
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.proof import proof
from ulbq.progress import Progress, Silent

DTYPES: dict[DtypeName, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class _Job:
    """A conversion, checked."""

    request: ConvertRequest
    source: ModelSource
    candidate: Candidate
    target: Target
    dtype: DtypeName

    @property
    def untie(self) -> bool:
        """Whether a tied head is stored by itself: AutoGPTQ computes with an empty one otherwise."""
        return self.request.engine == "auto-gptq"


def convert(
    request: ConvertRequest, progress: Progress | None = None
) -> tuple[Path, ConvertedManifest | QuantizedManifest]:
    """Convert a model; a full-precision source becomes dense in the new dtype, or GGUF.

    Returns:
        The new folder and its manifest: of a quantized artifact for ``half``, of a converted model for all else.

    Raises:
        InputError: no such model, the target or the engine cannot hold it, no adapter to merge, or the output is taken.
        UsageError: options that do not go together.
        NumericsError: a weight does not fit the dtype, or what was written does not read back.
    """
    progress = progress or Silent()
    source = resolve(request.source, offline=request.offline, verify=request.verify)
    source.tell(progress)
    job = _plan(request, source, progress)
    identity = fingerprint(
        {
            "ulbq": __version__,
            "source": source.content_hash,
            "to": job.target,
            "dtype": job.dtype,
            "merge_adapter": request.merge_adapter,
            "untie": job.untie,
        }
    )
    stem = f"{source.name}-{'merged-' if request.merge_adapter else ''}{job.target}"
    out = request.out or free_output(DEFAULT_ROOT, f"{stem}-{job.dtype}" if job.target == "dense" else stem, identity)
    watch = runtime.Stopwatch()
    with ArtifactWriter(out, identity, force=request.force, spare=[source.path]) as writer:
        with watch.phase("write"), progress.phase("Writing", _steps(job)) as phase:
            stored, saved, names = _write(job, writer.path, lambda name: phase.advance(detail=name))
            writer.plan(*names)
        progress.note(f"Stored: {stored}.")
        if adapter_folder(source) and not request.merge_adapter and job.target != "half":
            more = "" if job.target != "dense" else "; --merge-adapter makes it part of them"
            progress.note(f"The adapter lies beside the weights, for peft to load{more}.")
        if job.target != "half":
            _write_card(job, writer.path, stored, out)
            writer.plan(card.NAME)
        layers = [scheme for scheme in source.packed.values() if isinstance(scheme, AffineScheme)]
        target = None if job.target == "half" else job.target
        check = proof(progress, target, symmetric=all(scheme.symmetric for scheme in layers))
        path = writer.finish(_manifest(job, writer.name, saved, watch), check)
    manifest = read_manifest(path)
    if not isinstance(manifest, ConvertedManifest | QuantizedManifest):
        raise TypeError(f"wrote a manifest of kind {manifest.kind}")
    return path, manifest


def _plan(request: ConvertRequest, source: ModelSource, progress: Progress) -> _Job:
    """Decide on the target and refuse what cannot be; nothing is written yet."""
    candidate = Candidate.of(source)
    target: Target = request.to or "dense"
    if request.merge_adapter and adapter_folder(source) is None:
        raise InputError(f"'{source.given}' has no adapter to merge.", hint="Leave out --merge-adapter.")
    if request.engine is not None:
        verdict = engines.judge(request.engine, candidate, request.to, merge_adapter=request.merge_adapter)
        target = verdict.target
        progress.note(verdict.sentence)
    fit.check(candidate, target, merge_adapter=request.merge_adapter)
    if target == "gguf":
        check_tokenizer(source)
        if source.carried:
            progress.warn(
                f"A GGUF file has no place for the {len(source.carried)} tensors beside the model: they stay behind."
            )
    return _Job(request, source, candidate, target, _dtype(request, source, target))


def _dtype(request: ConvertRequest, source: ModelSource, target: Target) -> DtypeName:
    if target == "half" and request.dtype == "fp32":
        raise UsageError("fp32 is no half precision.", hint="Use --dtype fp16 or bf16, or leave it out.")
    if request.dtype is not None:
        return request.dtype
    if target == "gguf":
        return "fp16"
    if target == "dense":
        return "bf16"
    return "fp16" if source.config.dtype in (torch.float16, "float16") else "bf16"


def _steps(job: _Job) -> int:
    if job.target == "half":
        return len(job.source.stored.files) if job.source.stored is not None else 0
    model = skeleton(job.source)
    return len(state_names(model)) if job.target == "gguf" else len(shard_names(model))


def _write(job: _Job, folder: Path, on_step: Callable[[str], None]) -> tuple[str, dict[str, int], list[str]]:
    """Write all but card and manifest.

    Returns:
        How the weights are stored, in words; the bits that half saved; the names of all files.
    """
    source, dtype, merge = job.source, DTYPES[job.dtype], job.request.merge_adapter
    match job.target:
        case "dense":
            names = write_dense(source, folder, dtype, on_step, merge_adapter=merge)
            return f"all weights in {job.dtype}", {}, names
        case "gptq" | "compressed-tensors":
            names = write_packed(source, folder, job.target, dtype, on_step, untie=job.untie)
            return f"the artifact's own codes, to the bit; what is not packed in {job.dtype}", {}, names
        case "gguf":
            licence = card.front_of(source).get("license")
            kinds, names = write_gguf(
                source,
                folder,
                dtype,
                on_step,
                licence=licence if isinstance(licence, str) else None,
                merge_adapter=merge,
            )
            return _gguf_words(kinds, job.dtype), {}, names
        case "half":
            count, (saved, names) = len(wide_tensors(source)), write_half(source, folder, dtype, on_step)
            if not count:
                return "nothing changed, all of it was in half precision already; this is a copy", {}, names
            return f"{count} float32 tensors became {job.dtype}, {sum(saved.values()) // 8:,} bytes less", saved, names


def _gguf_words(kinds: dict[str, int], dtype: str) -> str:
    dense = {"F16", "BF16", "F32"}
    parts = [
        f"{count} layers as {kind}" + (", rounded (no block type holds them)" if kind in dense else ", to the bit")
        for kind, count in kinds.items()
    ]
    return "; ".join(parts) or f"all matrices in {dtype}"


def _write_card(job: _Job, folder: Path, stored: str, out: Path) -> None:
    near = {DEFAULT_ROOT, out.parent, job.source.path.parent}
    text = card.converted_card(
        job.source,
        job.candidate,
        job.target,
        stored=stored,
        merged=job.request.merge_adapter,
        scores_in=sorted(near) if job.source.manifest is not None else (),
    )
    with writing(folder):
        (folder / card.NAME).write_text(text, encoding="utf-8")


def _manifest(job: _Job, name: str, saved: dict[str, int], watch: runtime.Stopwatch) -> Manifest:
    source, before = job.source, job.source.manifest
    if job.target != "half" or not isinstance(before, QuantizedManifest):
        return ConvertedManifest(
            name=name,
            request=job.request.model_dump(mode="json"),
            seed=0,
            device="cpu",
            parents=(source.record(),),
            phases=tuple(watch.records),
            target=job.target,
            dtype=job.dtype,
        )
    parts = {part: bits - saved.get(part, 0) for part, bits in before.bits.parts.items()}
    kept = before.model_dump(exclude={"files", "fingerprint", "digest", "created", "ulbq_version", "versions"})
    return QuantizedManifest.model_validate(
        kept
        | {
            "name": name,
            "parents": (*before.parents, source.record()),
            "phases": (*before.phases, *watch.records),
            "bits": BitsReport(parts=parts, weights=before.bits.weights),
        }
    )
