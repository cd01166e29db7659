"""``convert``: a packed artifact in another tool's layout."""

from collections.abc import Mapping
from pathlib import Path

from ulbq import runtime
from ulbq.artifacts.disk import writing
from ulbq.artifacts.manifest import ConvertedManifest, Manifest, QuantizedManifest, read_manifest
from ulbq.artifacts.records import BitsReport
from ulbq.artifacts.store import DEFAULT_ROOT, ArtifactWriter
from ulbq.config.convert import ENGINES, ConvertRequest
from ulbq.errors import InputError, UsageError
from ulbq.export import card, engines, fit, packed
from ulbq.export.fit import Candidate
from ulbq.export.targets import target
from ulbq.export.targets.base import Conversion, Target, Written
from ulbq.models.adapter_files import adapter_folder
from ulbq.models.load import DTYPES
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.proof import proof
from ulbq.progress import Progress, Silent


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
    into, job = _plan(request, source, progress)
    decisive = {"source": source.content_hash, "to": into.name, "dtype": job.dtype, "untie": job.untie}
    decisive |= {"merge_adapter": job.merge_adapter} | ({"fast_types": True} if job.fast_types else {})
    stem = f"{source.name}-{'merged-' if job.merge_adapter else ''}{into.name}"
    stem += f"-{job.dtype}" if into.name == "dense" else ""
    watch = runtime.Stopwatch()
    with ArtifactWriter.begin(request.out, stem, decisive, force=request.force, spare=[source.path]) as writer:
        with watch.phase("write"), progress.phase("Writing", into.steps(source)) as phase:
            written = into.write(job, writer.path, lambda name: phase.advance(detail=name))
            writer.plan(*written.names)
        progress.note(f"Stored: {written.stored}.")
        if dense := sorted(job.candidate.tables.keys() - {*written.tables}):
            progress.note(f"Dense, since {into.name} has none packed so: {', '.join(dense)}.")
        if written.warning:
            progress.warn(written.warning)
        if not into.is_artifact:
            _write_beside(into, job, written, writer, progress)
        check = proof(progress, None if into.is_artifact else into, job.candidate)
        path = writer.finish(_manifest(request, into, job, writer.name, written.saved, watch), check)
    manifest = read_manifest(path)
    if not isinstance(manifest, ConvertedManifest | QuantizedManifest):
        raise TypeError(f"wrote a manifest of kind {manifest.kind}")
    return path, manifest


def _plan(request: ConvertRequest, source: ModelSource, progress: Progress) -> tuple[Target, Conversion]:
    """Decide on the target and refuse what cannot be; nothing is written yet."""
    candidate, engine = Candidate.of(source), request.engine
    into = target(request.to or "dense")
    if request.merge_adapter and adapter_folder(source) is None:
        raise InputError(f"'{source.given}' has no adapter to merge.", hint="Leave out `merge_adapter`.")
    if engine is not None:
        into, sentence = engines.judge(engine, candidate, request.to, merge_adapter=request.merge_adapter)
        progress.note(sentence)
    fit.check(candidate, into, merge_adapter=request.merge_adapter)
    _check_size(request, candidate, into)
    if (warning := into.check(source)) is not None:
        progress.warn(warning)
    if request.block_types is not None and into.name != "gguf":
        raise UsageError(
            f"`block_types` is for GGUF files, and this becomes {into.name}.", hint="Leave out `block_types`."
        )
    untie, fast = engine is not None and into.readers[engine].untie, request.block_types == "fastest"
    dtype, keeps = into.dtype(source, request.dtype), into.keeps and request.dtype is None and bool(candidate.layers)
    return into, Conversion(source, candidate, dtype, keeps, request.merge_adapter, untie, fast)


def _check_size(request: ConvertRequest, candidate: Candidate, into: Target) -> None:
    """Refuse a layout in which every layer would grow, unless dense weights were asked for. Raises InputError."""
    asked = request.to == "dense" or request.dtype is not None or request.merge_adapter
    if asked or not candidate.layers or (request.to is None and request.engine is None):
        return
    if into.bits(candidate) < packed.bits(candidate, packed.dense_bits):
        return
    reader = ENGINES[request.engine] if request.engine else into.name
    way = "`to=dense`" if into.name == "dense" else "`dtype=fp16`"
    tied = " `method=db-llm` with `tied_scales` leaves packed." if candidate.schemes[0].format == "dual_binary" else ""
    own = target("half").bits(candidate) / candidate.weights
    raise InputError(
        f"Nothing that {reader} reads holds {fit.describe(candidate)}: '{candidate.given}' would become dense, at 16 "
        f"bits a weight where it takes {own:.3g}.",
        hint=f"{way} asks for that.{tied}",
    )


def _write_beside(into: Target, job: Conversion, written: Written, writer: ArtifactWriter, progress: Progress) -> None:
    """The card of what other tools load, and a word on its adapter."""
    if adapter_folder(job.source) and not job.merge_adapter:
        more = "" if into.name != "dense" else "; `merge_adapter` makes it part of them"
        progress.note(f"The adapter lies beside the weights, {into.adapter_place}{more}.")
    near = {DEFAULT_ROOT, writer.out.parent, job.source.path.parent}
    text = card.converted_card(
        job.source,
        job.candidate,
        into,
        stored=written.stored,
        bits=_bits_per_weight(job, written),
        merged=job.merge_adapter,
        scores_in=sorted(near) if job.source.manifest is not None else (),
    )
    with writing(writer.path):
        (writer.path / card.NAME).write_text(text, encoding="utf-8")
    writer.plan(card.NAME)


def _bits_per_weight(job: Conversion, written: Written) -> float:
    """What a weight takes that was packed, or any where none was."""
    weights = job.candidate.weights
    return written.bits / weights if written.bits is not None and weights else 8 * DTYPES[job.dtype].itemsize


def _manifest(
    request: ConvertRequest,
    into: Target,
    job: Conversion,
    name: str,
    saved: Mapping[str, int],
    watch: runtime.Stopwatch,
) -> Manifest:
    source, before = job.source, job.source.manifest
    if not into.is_artifact or not isinstance(before, QuantizedManifest):
        return ConvertedManifest(
            name=name,
            request=request.model_dump(mode="json"),
            seed=0,
            device="cpu",
            parents=(source.record(),),
            phases=tuple(watch.records),
            target=into.name,
            dtype=job.dtype,
        )
    parts = {part: bits - saved.get(part, 0) for part, bits in before.bits.parts.items()}
    bits = BitsReport(parts=parts, weights=before.bits.weights)
    kept = before.model_dump(exclude={"files", "fingerprint", "digest", "created", "ulbq_version", "versions"})
    return QuantizedManifest.model_validate(
        kept
        | {
            "name": name,
            "parents": (*before.parents, source.record()),
            "phases": (*before.phases, *watch.records),
            "bits": bits,
            "coverage": None if before.coverage is None else bits.of_all(before.coverage),
        }
    )
