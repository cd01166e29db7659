"""An inspection as tables for people."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ulbq.artifacts import (
    AnyManifest,
    BitsReport,
    BlockRecord,
    ConvertedManifest,
    EvaluationManifest,
    LayerRecord,
    QuantizedManifest,
    SaliencyManifest,
    SweepManifest,
)
from ulbq.artifacts.records import ExpertsRecord, experts_sentence
from ulbq.artifacts.told import losses
from ulbq.evaluation.figures import weight_parts
from ulbq.evaluation.results import Results
from ulbq.evaluation.table import size
from ulbq.pipeline.inspect import Ancestor, Inspection, State

from . import scores
from .fields import as_typed
from .progress import duration
from .saliency_table import each, summary
from .sweep_table import settings_table
from .tables import add, columns, grid

_OUTSIDE_PARTS = ("embeddings", "other")
_STATES: dict[State, tuple[str, str]] = {
    "same": ("as recorded", "green"),
    "changed": ("changed since", "bold red"),
    "damaged": ("damaged", "bold red"),
    "missing": ("missing", "yellow"),
    "unchecked": ("not checked", "dim"),
}


def show(console: Console, inspection: Inspection, *, layers: bool = False) -> None:
    """Print everything known of an artifact; its layers one by one only with ``layers``."""
    manifest = inspection.manifest
    sections: list[tuple[str, RenderableType]] = [("", _facts(inspection))]
    if isinstance(manifest, QuantizedManifest):
        sections.append(("Bits", _bits(manifest.bits, inspection.total_size)))
        if manifest.blocks:
            sections.append(("Blocks", _blocks(manifest.blocks)))
        if manifest.experts:
            sections.append(("Experts", Text(_experts(manifest.experts))))
        sections.append(("Layers", _layers(manifest.layers) if layers else _layer_summary(manifest.layers)))
        if manifest.skipped:
            kept = None if manifest.coverage is None else "\n".join(one.words for one in manifest.coverage.kept)
            sections.append(("In full precision", Text(kept or ", ".join(manifest.skipped))))
    elif isinstance(manifest, EvaluationManifest):
        sections.append(("Results", _results(manifest)))
    elif isinstance(manifest, SweepManifest):
        sections.append(("Settings", settings_table(manifest)))
    elif isinstance(manifest, SaliencyManifest):
        sections.append(("Scores", summary(manifest)))
        if layers:
            sections.append(("Layers", each(manifest.layers)))
    if manifest.warnings:
        sections.append(("Warnings", Text(as_typed("\n".join(manifest.warnings), {}), style="yellow")))
    if manifest.phases:
        sections.append(("Work", _phases(manifest)))
    if inspection.ancestry:
        sections.append(("Ancestry", _ancestry(manifest.name, inspection.ancestry)))
    for title, body in sections:
        console.print(Group(Text(title, style="bold underline"), body) if title else body)
        console.print()


def scheme(parameters: Mapping[str, Any]) -> str:
    """A scheme's JSON object in words: ``affine, bits 2, group size 64``."""
    words = [str(parameters.get("format", ""))]
    for name, value in parameters.items():
        # Counts that a format's default scheme leaves to each layer are no facts.
        if name == "format" or value is False or value == {} or (name == "outliers" and not value):
            continue
        word = name.replace("_", " ")
        words.append(word if value is True else f"{word} {_widths(value) if isinstance(value, dict) else value}")
    return ", ".join(words)


def _widths(widths: Mapping[Any, int]) -> str:
    """Columns by bit width: ``2×541 4×35``."""
    return " ".join(f"{width}×{count}" for width, count in widths.items())


def _results(manifest: EvaluationManifest) -> RenderableType:
    """The scores as 'ulbq eval' shows them; those of another version's shape number by number."""
    try:
        results = Results.model_validate(manifest.results)
    except ValidationError:
        return grid(dict(_scalars(manifest.results)))
    return Group(scores.table(results), Text(), *scores.lines(results))


def _scalars(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """The numbers and words in a tree of results, by dotted name."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _scalars(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _scalars(part, f"{name}[{index}]")
    elif value is not None:
        yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _facts(inspection: Inspection) -> Table:
    manifest = inspection.manifest
    checked = "every file hashed and intact" if inspection.verified else "sizes right; --verify hashes every file"
    rows = {"artifact": inspection.path, "kind": manifest.kind, **_particulars(manifest)}
    if manifest.parents:
        rows["source"] = ", ".join(f"{parent.name} ({parent.kind})" for parent in manifest.parents)
    rows["created"] = (
        f"{manifest.created[:19].replace('T', ' ')} UTC by ulbq {manifest.ulbq_version}, {manifest.device}"
    )
    rows["files"] = f"{len(manifest.files) + 1}, {size(inspection.total_size)}; {checked}"
    rows["digest"] = manifest.digest
    return grid(rows)


def _particulars(manifest: AnyManifest) -> dict[str, str]:
    """The facts that only one kind has."""
    if isinstance(manifest, ConvertedManifest):
        return {"target": f"{manifest.target}, {manifest.dtype}"}
    if isinstance(manifest, SaliencyManifest):
        loss = f"; loss of the samples {manifest.loss:.3f}" if manifest.loss is not None else ""
        rows = {"scores": f"{manifest.score}, {manifest.dtype}, at most {manifest.rounding:.2%} lost in storage{loss}"}
    elif isinstance(manifest, QuantizedManifest):
        rows = {"method": manifest.method, "format": scheme(manifest.scheme)}
        if manifest.coverage is not None:
            rows["weights"] = manifest.coverage.words
        for table in manifest.tables:
            told = f"{scheme(table.scheme)}, {_layer_bits(table):.2f} bits, squared error {_error(table)}"
            rows[table.name.rpartition(".")[2]] = told
        if manifest.rotation is not None:
            rows["rotation"] = manifest.rotation.label
        rows |= losses(manifest)
    else:
        return {}
    if data := manifest.calibration:
        rows["calibration"] = (
            f"{data.get('name')}, {data.get('samples')} × {data.get('sequence_length')} tokens, seed {manifest.seed}"
        )
    return rows


def _bits(report: BitsReport, total_size: int) -> Table:
    table = columns("part", "bits per weight", "size")

    def tell(name: str, bits: int, style: str = "") -> None:
        add(table, name, f"{bits / report.weights:.4f}", size(bits / 8), style=style)

    counted = weight_parts(report)
    for part, bits in counted.items():
        tell(part, bits)
    tell(f"{report.weights:,} quantized weights", sum(counted.values()), "bold")
    for part in _OUTSIDE_PARTS:
        tell(part, report.parts.get(part, 0), "dim")
    add(table, "all files", "", size(total_size), style="bold")
    return table


def _blocks(blocks: Iterable[BlockRecord]) -> Table:
    table = columns("block", "error at start", "at end", "change", "steps", "retries", "time", "")
    for block in blocks:
        change = f"{block.end_error / block.start_error - 1:+.1%}" if block.start_error else ""
        add(
            table,
            str(block.index),
            f"{block.start_error:.4g}",
            f"{block.end_error:.4g}",
            change,
            str(block.steps),
            str(block.retries),
            duration(block.seconds),
            _remarks(block),
            style="yellow" if block.fallback else "",
        )
    return table


def _remarks(block: BlockRecord) -> str:
    remarks = ["kept the closed-form start"] if block.fallback else []
    if block.spurious_sinks:
        remarks.append(f"{block.spurious_sinks} spurious sinks")
    return ", ".join(remarks)


def _experts(mixtures: tuple[ExpertsRecord, ...]) -> str:
    """How many there are, and what they saw of the calibration."""
    counts = [count for mixture in mixtures for count in mixture.tokens]
    said = (
        f"{max(len(mixture.tokens) for mixture in mixtures)} in each of {len(mixtures)} mixtures; {min(counts):,} to "
        f"{max(counts):,} tokens of the calibration went to one, {sum(counts) / len(counts):,.0f} on average. "
    )
    return said + experts_sentence(mixtures)


def _layers(layers: Iterable[LayerRecord]) -> Table:
    layers = tuple(layers)
    sparse = any(layer.sparsity for layer in layers)
    mixed = any(layer.scheme.get("widths") for layer in layers)
    extra = ["zeros in planes"] * sparse + ["bits×columns", "outliers"] * mixed
    table = columns("layer", "shape", "bits per weight", "squared error", *extra)
    for layer in layers:
        cells = [layer.name, f"{layer.shape[0]} × {layer.shape[1]}", f"{_layer_bits(layer):.4f}", _error(layer)]
        if sparse:
            cells.append(", ".join(f"{share:.0%}" for share in layer.sparsity or ()))
        if mixed:
            cells += [_widths(layer.scheme.get("widths", {})), f"{layer.scheme.get('outliers', 0):,}"]
        add(table, *cells)
    return table


def _error(layer: LayerRecord) -> str:
    return f"{layer.error:.3%}" if isfinite(layer.error) else "not known"


def _layer_bits(layer: LayerRecord) -> float:
    return sum(layer.bits.values()) / (layer.shape[0] * layer.shape[1])


def _layer_summary(layers: tuple[LayerRecord, ...]) -> RenderableType:
    if not layers:
        return Text("none")
    if not all(isfinite(layer.error) for layer in layers):
        rows = {
            "layers": f"{len(layers)}; --layers lists them",
            "squared error": "not known: scales have trained since, away from the original weights",
        }
        return grid(rows | _column_summary(layers))
    best, worst = (pick(layers, key=lambda layer: layer.error) for pick in (min, max))
    mean = sum(layer.error for layer in layers) / len(layers)
    rows = {
        "layers": f"{len(layers)}; --layers lists them",
        "squared error": f"{mean:.3%} of the weights' squares on average",
        "least": f"{best.error:.3%} {best.name}",
        "most": f"{worst.error:.3%} {worst.name}",
    }
    return grid(rows | _column_summary(layers))


def _column_summary(layers: Iterable[LayerRecord]) -> dict[str, str]:
    """Widths and outliers of all layers whose columns differ; nothing of others."""
    counted: Counter[str] = Counter()
    outliers = weights = 0
    for layer in layers:
        # As JSON, which knows no numbers as keys.
        counted.update({str(width): count for width, count in layer.scheme.get("widths", {}).items()})
        if "widths" in layer.scheme:
            outliers += layer.scheme.get("outliers", 0)
            weights += layer.shape[0] * layer.shape[1]
    if not counted:
        return {}
    shares = (f"{counted[width] / counted.total():.2%} at {width} bits" for width in sorted(counted))
    return {"columns": ", ".join(shares), "outliers": f"{outliers:,}, {outliers / weights:.3%} of the weights"}


def _phases(manifest: AnyManifest) -> Table:
    table = columns("phase", "time", "peak memory so far")
    for phase in manifest.phases:
        add(table, phase.name, duration(phase.seconds), size(phase.peak_memory))
    return table


def _ancestry(name: str, ancestry: Iterable[Ancestor]) -> Tree:
    root = Tree(Text(name, style="bold"), guide_style="dim")
    branches = [root]
    for one in ancestry:
        words, style = _STATES[one.state]
        when = f", {one.created[:16].replace('T', ' ')}" if one.created else ""
        label = Text.assemble(
            (one.parent.name, "bold"), f" ({one.parent.kind}{when}) ", (one.parent.path, "dim"), "  ", (words, style)
        )
        del branches[one.depth :]
        branches.append(branches[-1].add(label))
    return root
