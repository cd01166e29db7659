"""The report: one self-contained HTML page, readable in any browser, light or dark, without the network."""

import math
from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby

from ulbq import __version__
from ulbq.artifacts import BitsReport, QuantizedManifest
from ulbq.evaluation import figures
from ulbq.evaluation.results import ModelScores, Results
from ulbq.evaluation.table import describe, footnotes, parents, rows, size
from ulbq.evaluation.theme import PARTS, SERIES, STYLE, tiles
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
        f"<footer>ulbq {escape(__version__)} · {escape(created)}</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · ulbq</title>\n<style>{STYLE}{SERIES}{PARTS}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _header(title: str, results: Results) -> str:
    originals = parents(results)
    measured = [scores.subject for scores in results.models if scores.subject.name not in originals]
    if len(measured) == 1:
        origin = f" of {measured[0].parent}" if measured[0].parent else ""
        told = f"{describe(measured[0])}{origin}"
    else:
        told = f"{len(measured)} models compared"
    return f'<header><h1>{escape(title)}</h1><p class="sub">{escape(told)}</p></header>'


def _tiles(results: Results) -> str:
    """The few numbers that matter most, of a single model."""
    originals = parents(results)
    measured = [scores for scores in results.models if scores.subject.name not in originals]
    if len(measured) != 1:
        return ""
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


def _scores(results: Results) -> str:
    heads = "".join(f"<th>{escape(scores.subject.name)}</th>" for scores in results.models)
    width = len(results.models) + 1
    lines = []
    for section, members in groupby(rows(results), key=lambda row: row.section):
        lines.append(f'<tr class="group"><th colspan="{width}">{escape(section)}</th></tr>')
        for row in members:
            cells = "".join(
                f'<td class="best">{escape(cell)}</td>'
                if index in row.best
                else f"<td>{escape(cell) or '&ndash;'}</td>"
                for index, cell in enumerate(row.cells)
            )
            lines.append(f"<tr><th>{escape(row.label)}</th>{cells}</tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(results))
    return (
        f'<section><h2>Scores</h2><div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><ul class="notes">{notes}</ul></section>'
    )


def _perplexity(results: Results) -> str:
    drawn = figures.perplexity_figure(results)
    return _figure("Perplexity", "Lower is better; the axis is logarithmic.", drawn)


def _tasks(results: Results) -> str:
    drawn = figures.task_figure(results)
    styles = figures.series_styles(results)
    legend = _legend((name, style) for name, style in styles.items())
    return _figure("Tasks", "Higher is better; the lines are one standard error to either side.", drawn, legend)


def _blocks(results: Results, quantized: Mapping[str, QuantizedManifest]) -> str:
    styles = figures.series_styles(results)
    trained = {name: manifest.blocks for name, manifest in quantized.items() if manifest.blocks}
    drawn = figures.block_figure(trained, styles)
    told = "Loss of each block's output on held-out samples: dashed where its training started, solid where it ended."
    return _figure("Error by block", told, drawn, _legend((name, styles[name]) for name in trained))


def _layers(quantized: Mapping[str, QuantizedManifest]) -> str:
    # Where scales were fine-tuned, nobody looked at the original weights again.
    known = {name: m for name, m in quantized.items() if all(math.isfinite(layer.error) for layer in m.layers)}
    errors = [layer.error for manifest in known.values() for layer in manifest.layers]
    drawn = []
    for name, manifest in known.items():
        figure = figures.layer_figure(manifest.layers, (min(errors, default=0.0), max(errors, default=0.0)))
        if figure:
            drawn.append((f"<h3>{escape(name)}</h3>" if len(quantized) > 1 else "") + figure)
    told = "Squared difference between the stored and the original weights, relative to the original's."
    if any(manifest.blocks for manifest in quantized.values()):
        told += " Training moves weights away on purpose where that mends an output: read it beside the error by block."
    return _figure("Error by layer", told, "".join(drawn) or None)


def _bits(quantized: Mapping[str, QuantizedManifest]) -> str:
    reports = {name: manifest.bits for name, manifest in quantized.items()}
    parts = list(dict.fromkeys(part for report in reports.values() for part in figures.weight_parts(report)))
    legend = _legend((part, part) for part in parts)
    drawn = figures.bits_figure(reports)
    tables = "".join(_bits_table(name, report, titled=len(reports) > 1) for name, report in reports.items())
    told = "Everything that is stored to decode the quantized weights, over the number of these weights."
    return _figure("Bits by part", told, drawn + tables if drawn else None, legend)


def _bits_table(name: str, report: BitsReport, *, titled: bool) -> str:
    counted = figures.weight_parts(report)
    rest = {part: bits for part, bits in report.parts.items() if part not in counted and bits}
    lines = [_bits_row(part, bits, report.weights) for part, bits in counted.items()]
    lines.append(_bits_row("quantized weights", sum(counted.values()), report.weights, style="total"))
    lines += [_bits_row(part, bits, None) for part, bits in rest.items()]
    lines.append(_bits_row("all tensors", sum(report.parts.values()), None, style="total"))
    head = f"<h3>{escape(name)}</h3>" if titled else ""
    return (
        f'{head}<div class="scroll"><table><thead><tr><th></th><th>bits per weight</th><th>MB</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _bits_row(label: str, bits: int, weights: int | None, *, style: str = "") -> str:
    share = "" if weights is None else f"{bits / weights:.3f}"
    attribute = f' class="{style}"' if style else ""
    return f"<tr{attribute}><th>{escape(label)}</th><td>{share}</td><td>{bits / _MB:,.2f}</td></tr>"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    """Labels, each beside the colour of its CSS class."""
    items = "".join(f'<span><i class="{style}"></i>{escape(label)}</span>' for label, style in entries)
    return f'<div class="legend">{items}</div>'


def _figure(title: str, caption: str, drawn: str | None, legend: str = "") -> str:
    """A section with one figure; nothing where there is nothing to draw."""
    if drawn is None:
        return ""
    return (
        f"<section><figure><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>"
        f'{legend}<div class="scroll">{drawn}</div></figure></section>'
    )
