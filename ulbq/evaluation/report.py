"""The report: one self-contained HTML page, readable in any browser, light or dark, without the network."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from ulbq.artifacts import BitsReport, BlockRecord, QuantizedManifest
from ulbq.artifacts.records import sinks_sentence
from ulbq.evaluation import figures
from ulbq.evaluation.metrics import METRICS
from ulbq.evaluation.metrics.base import Figure
from ulbq.evaluation.page import render
from ulbq.evaluation.results import ModelScores, Results
from ulbq.evaluation.table import describe, footnotes, rows, size
from ulbq.evaluation.words import by_prompt, silence

_MB = 8e6  # bits


def report(title: str, results: Results, quantized: Mapping[str, QuantizedManifest], *, created: str) -> str:
    """The page, as HTML.

    Args:
        title: what was evaluated.
        results: the scores.
        quantized: manifests of the quantized models among them, by their name in ``results``; they know the errors by
            block and layer and the bits by part.
        created: when, for the foot of the page.
    """
    measured = _measured(results)
    styles = figures.series_styles(results)
    return render(
        "report",
        title=title,
        told=_told(measured),
        created=created,
        single=len(measured) == 1,
        values=_values(measured[0], results) if len(measured) == 1 else [],
        words=by_prompt(results),
        silence=silence,
        names=[scores.subject.name for scores in results.models],
        scores=[(section, list(members)) for section, members in groupby(rows(results), lambda row: row.section)],
        footnotes=footnotes(results),
        styles=styles,
        figures=_figures(results),
        **weights(quantized, styles),
    )


def weights(quantized: Mapping[str, QuantizedManifest], styles: Mapping[str, str]) -> dict[str, Any]:
    """What the template ``weights`` shows of quantized models: errors by block and layer, bits by part, warnings.

    Args:
        quantized: manifests by name.
        styles: CSS classes by name.
    """
    trained = {name: manifest.blocks for name, manifest in quantized.items() if manifest.blocks}
    bits = {name: manifest.bits for name, manifest in quantized.items()}
    several = len(quantized) > 1
    return {
        "several": several,
        "trained": [(name, styles[name]) for name in trained],
        "blocks": figures.block_figure(trained, styles),
        "blocks_told": _blocks_told(trained),
        "layers": _layers(quantized),
        "bits": figures.bits_figure(bits),
        "parts": list(dict.fromkeys((part, part) for report in bits.values() for part in figures.weight_parts(report))),
        "stored": {name: _stored(report) for name, report in bits.items()},
        "warnings": [
            f"{name}: {text}" if several else text for name, one in quantized.items() for text in one.warnings
        ],
    }


def _figures(results: Results) -> list[Figure]:
    """What models cost against how good they are, then metric by metric."""
    drawing = figures.tradeoff_figure(results)
    caption = "Lower and further to the left is better; the lines are full-precision parents."
    first = [Figure("What it costs", caption, drawing, legend=True)] if drawing else []
    return first + [figure for metric in METRICS.values() if (figure := metric.figure(results))]


def _measured(results: Results) -> list[ModelScores]:
    """The models that are no other's parent."""
    originals = results.parents
    return [scores for scores in results.models if scores.subject.name not in originals]


def _told(measured: Sequence[ModelScores]) -> str:
    if len(measured) != 1:
        return f"{len(measured)} models compared"
    subject = measured[0].subject
    return describe(subject) + (f" of {subject.parent}" if subject.parent else "")


def _values(scores: ModelScores, results: Results) -> list[tuple[str, str]]:
    """The few numbers that matter most, of a single model."""
    original = next((other for other in results.models if other.subject.name == scores.subject.parent), None)
    values = []
    if scores.subject.bits_per_weight is not None:
        values.append((f"{scores.subject.bits_per_weight:.3f}", "bits per weight, scales and all"))
    values += _weight_values(scores, original)
    for metric in METRICS.values():
        theirs = {one.label: f"; parent {one.text}" for one in metric.numbers(original)} if original else {}
        values += [(one.text, one.tile + theirs.get(one.label, "")) for one in metric.numbers(scores) if one.tile]
    return values


def _weight_values(scores: ModelScores, original: ModelScores | None) -> list[tuple[str, str]]:
    """Sizes, each beside the parent's."""
    if (own := scores.weights) is None:
        return []
    theirs = original.weights if original else None
    return [
        (size(own.on_disk), "on disk" + (f"; parent {size(theirs.on_disk)}" if theirs else "")),
        (size(own.in_memory), "weights in memory" + (f"; parent {size(theirs.in_memory)}" if theirs else "")),
    ]


def _blocks_told(trained: Mapping[str, Sequence[BlockRecord]]) -> str:
    told = "Loss of each block's output on held-out samples: dashed where its training started, solid where it ended."
    sinks = ((name, sinks_sentence(blocks)) for name, blocks in trained.items())
    return " ".join([told, *(f"{name}: {sentence}" for name, sentence in sinks if sentence)])


def _layers(quantized: Mapping[str, QuantizedManifest]) -> dict[str, Markup]:
    """A map of every model's errors by layer, all in the same colours."""
    # Where scales were fine-tuned, nobody looked at the original weights again.
    known = {name: m for name, m in quantized.items() if all(math.isfinite(layer.error) for layer in m.layers)}
    errors = [layer.error for manifest in known.values() for layer in manifest.layers]
    span = (min(errors, default=0.0), max(errors, default=0.0))
    drawn = {name: figures.layer_figure(manifest.layers, span) for name, manifest in known.items()}
    return {name: figure for name, figure in drawn.items() if figure}


def _stored(report: BitsReport) -> list[tuple[str, str, str]]:
    """Rows of a table: the parts that count towards the quantized weights, and what is stored besides."""
    counted = figures.weight_parts(report)
    rest = {part: bits for part, bits in report.parts.items() if part not in counted and bits}
    weights = counted | {"quantized weights": sum(counted.values())}
    others = rest | {"all tensors": sum(report.parts.values())}
    return [(part, f"{bits / report.weights:.3f}", f"{bits / _MB:,.2f}") for part, bits in weights.items()] + [
        (part, "", f"{bits / _MB:,.2f}") for part, bits in others.items()
    ]
