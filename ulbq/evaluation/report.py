"""The report: one self-contained HTML page, readable in any browser, light or dark, without the network."""

import math
from collections.abc import Mapping
from itertools import groupby

from markupsafe import Markup

from ulbq import __version__
from ulbq.artifacts import BitsReport, QuantizedManifest
from ulbq.artifacts.records import sinks_sentence
from ulbq.evaluation import figures
from ulbq.evaluation.markup import element, footer, header, legend, page, table, table_row, together
from ulbq.evaluation.results import ModelScores, Results
from ulbq.evaluation.table import describe, footnotes, parents, rows, size
from ulbq.evaluation.theme import PARTS, SERIES, STYLE, section, tiles
from ulbq.evaluation.words import words_section

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
    body = [
        _header(title, results),
        _tiles(results),
        words_section(results),
        _scores(results),
        _perplexity(results),
        _tasks(results),
        _blocks(results, quantized),
        _layers(quantized),
        _bits(quantized),
        _warnings(quantized),
        footer(__version__, created),
    ]
    return page(title, f"{STYLE}{SERIES}{PARTS}", body)


def _header(title: str, results: Results) -> Markup:
    originals = parents(results)
    measured = [scores.subject for scores in results.models if scores.subject.name not in originals]
    if len(measured) == 1:
        origin = f" of {measured[0].parent}" if measured[0].parent else ""
        told = f"{describe(measured[0])}{origin}"
    else:
        told = f"{len(measured)} models compared"
    return header(title, told)


def _tiles(results: Results) -> Markup:
    """The few numbers that matter most, of a single model."""
    originals = parents(results)
    measured = [scores for scores in results.models if scores.subject.name not in originals]
    if len(measured) != 1:
        return Markup("")
    scores = measured[0]
    original = next((other for other in results.models if other.subject.name == scores.subject.parent), None)
    values = []
    if scores.subject.bits_per_weight is not None:
        values.append((f"{scores.subject.bits_per_weight:.3f}", "bits per weight, scales and all"))
    values += _weight_tiles(scores, original)
    for name, found in scores.perplexity.items():
        base = original.perplexity.get(name) if original else None
        beside = f"; parent {base.value:,.2f}" if base else ""
        values.append((f"{found.value:,.2f}", f"perplexity on {name}{beside}"))
    if scores.fidelity:
        values.append((f"{scores.fidelity.mean_kl:.3f}", "mean KL from its parent, nats a token"))
        values.append((f"{scores.fidelity.top1_agreement:.1%}", "same top token as its parent"))
    return tiles(values)


def _weight_tiles(scores: ModelScores, original: ModelScores | None) -> list[tuple[str, str]]:
    """Size and speed, each beside the parent's."""
    values = []
    if (own := scores.weights) is not None:
        theirs = original.weights if original else None
        values.append((size(own.on_disk), "on disk" + (f"; parent {size(theirs.on_disk)}" if theirs else "")))
        values.append(
            (size(own.in_memory), "weights in memory" + (f"; parent {size(theirs.in_memory)}" if theirs else ""))
        )
    if (pace := scores.tokens_per_second) is not None:
        theirs_pace = original.tokens_per_second if original else None
        beside = f"; parent {theirs_pace:.1f}" if theirs_pace else ""
        values.append((f"{pace:.1f}", f"tokens per second{beside}"))
    return values


def _scores(results: Results) -> Markup:
    lines = []
    for title, members in groupby(rows(results), key=lambda row: row.section):
        lines.append(element("tr", element("th", title, colspan=len(results.models) + 1), class_="group"))
        for row in members:
            cells = (
                element("td", cell or "\N{EN DASH}", class_="best" if index in row.best else None)
                for index, cell in enumerate(row.cells)
            )
            lines.append(element("tr", element("th", row.label), *cells))
    drawn = table(["", *(scores.subject.name for scores in results.models)], lines)
    notes = element("ul", *(element("li", note) for note in footnotes(results)), class_="notes")
    return element("section", element("h2", "Scores"), element("div", drawn, class_="scroll"), notes)


def _perplexity(results: Results) -> Markup:
    drawn = figures.perplexity_figure(results)
    return _figure("Perplexity", "Lower is better; the axis is logarithmic.", drawn)


def _tasks(results: Results) -> Markup:
    drawn = figures.task_figure(results)
    styles = figures.series_styles(results)
    told = "Higher is better; the lines are one standard error to either side."
    return _figure("Tasks", told, drawn, legend(styles.items()))


def _blocks(results: Results, quantized: Mapping[str, QuantizedManifest]) -> Markup:
    styles = figures.series_styles(results)
    trained = {name: manifest.blocks for name, manifest in quantized.items() if manifest.blocks}
    drawn = figures.block_figure(trained, styles)
    told = "Loss of each block's output on held-out samples: dashed where its training started, solid where it ended."
    for name, blocks in trained.items():
        if sinks := sinks_sentence(blocks):
            told += f" {name}: {sinks}"
    return _figure("Error by block", told, drawn, legend((name, styles[name]) for name in trained))


def _layers(quantized: Mapping[str, QuantizedManifest]) -> Markup:
    # Where scales were fine-tuned, nobody looked at the original weights again.
    known = {name: m for name, m in quantized.items() if all(math.isfinite(layer.error) for layer in m.layers)}
    errors = [layer.error for manifest in known.values() for layer in manifest.layers]
    drawn: list[Markup] = []
    for name, manifest in known.items():
        figure = figures.layer_figure(manifest.layers, (min(errors, default=0.0), max(errors, default=0.0)))
        if figure:
            drawn += [element("h3", name), figure] if len(quantized) > 1 else [figure]
    told = "Squared difference between the stored and the original weights, relative to the original's."
    if any(manifest.blocks for manifest in quantized.values()):
        told += " Training moves weights away on purpose where that mends an output: read it beside the error by block."
    return _figure("Error by layer", told, together(drawn) or None)


def _bits(quantized: Mapping[str, QuantizedManifest]) -> Markup:
    reports = {name: manifest.bits for name, manifest in quantized.items()}
    parts = list(dict.fromkeys(part for report in reports.values() for part in figures.weight_parts(report)))
    drawn = figures.bits_figure(reports)
    tables = together(_bits_table(name, report, titled=len(reports) > 1) for name, report in reports.items())
    told = "Everything that is stored to decode the quantized weights, over the number of these weights."
    shown = legend((part, part) for part in parts)
    return _figure("Bits by part", told, together([drawn, tables]) if drawn else None, shown)


def _bits_table(name: str, report: BitsReport, *, titled: bool) -> Markup:
    counted = figures.weight_parts(report)
    rest = {part: bits for part, bits in report.parts.items() if part not in counted and bits}
    lines = [_bits_row(part, bits, report.weights) for part, bits in counted.items()]
    lines.append(_bits_row("quantized weights", sum(counted.values()), report.weights, style="total"))
    lines += [_bits_row(part, bits, None) for part, bits in rest.items()]
    lines.append(_bits_row("all tensors", sum(report.parts.values()), None, style="total"))
    drawn = element("div", table(["", "bits per weight", "MB"], lines), class_="scroll")
    return together([element("h3", name), drawn] if titled else [drawn])


def _bits_row(label: str, bits: int, weights: int | None, *, style: str | None = None) -> Markup:
    share = "" if weights is None else f"{bits / weights:.3f}"
    return table_row(label, share, f"{bits / _MB:,.2f}", style=style)


def _warnings(quantized: Mapping[str, QuantizedManifest]) -> Markup:
    """What the runs warned of that made the models."""
    several = len(quantized) > 1
    said = [f"{name}: {text}" if several else text for name, one in quantized.items() for text in one.warnings]
    if not said:
        return Markup("")
    listed = element("ul", *(element("li", text) for text in said), class_="notes")
    return element("section", element("h2", "Warnings when it was made"), listed)


def _figure(title: str, caption: str, drawn: Markup | None, shown: Markup = Markup("")) -> Markup:  # noqa: B008
    """A section with one figure and its legend; nothing where there is nothing to draw."""
    return Markup("") if drawn is None else section(title, caption, drawn, shown)
