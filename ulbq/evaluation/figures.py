"""The report's figures: scores beside the parent's, error by block and layer, bits by part."""

import re
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from ulbq.artifacts import BitsReport, BlockRecord, LayerRecord
from ulbq.evaluation.results import Measured, ModelScores, Results
from ulbq.evaluation.svg import Drawing, Scale, number

_WIDTH = 800.0
_RIGHT = 24.0
_ROW = 26.0
_CHARACTER = 6.6  # pixels, of the labels' 12-pixel type; errs on the wide side
SERIES = 9  # colours in the theme
_BLOCK = re.compile(r"\.(\d+)\.")


def series_styles(results: Results) -> dict[str, str]:
    """CSS class of every model by name: grey for full-precision parents, a colour for each of the others."""
    originals = results.parents
    styles, used = {}, 0
    for scores in results.models:
        if scores.subject.name in originals:
            styles[scores.subject.name] = "parent"
        else:
            styles[scores.subject.name] = f"s{used % SERIES}"
            used += 1
    return styles


def perplexity_figure(results: Results) -> Markup | None:
    """Perplexities on a logarithmic axis, one line a text and model; None unless two models have one."""
    styles = series_styles(results)
    texts = list(dict.fromkeys(name for scores in results.models for name in scores.perplexity))
    points = [
        (text, scores.subject.name, scores.perplexity[text].value)
        for text in texts
        for scores in results.models
        if text in scores.perplexity
    ]
    if len({name for _, name, _ in points}) < 2:
        return None
    labels = [name if len(texts) == 1 else f"{text} · {name}" for text, name, _ in points]
    drawing, scale, left = _rows_chart(
        labels, [value for *_, value in points], "Perplexity, logarithmic axis", log=True
    )
    for index, ((_, name, value), label) in enumerate(zip(points, labels, strict=True)):
        y = _row_y(index)
        drawing.text(left - 12, y + 4, _short(label), anchor="end")
        drawing.line((left, y), (_WIDTH - _RIGHT, y), "grid")
        drawing.dot(scale(value), y, f"fill {styles[name]}", hint=f"{label}: {value:,.2f}")
        drawing.text(scale(value) + 10, y + 4, f"{value:,.2f}", style="strong")
    return drawing.markup()


def tradeoff_figure(results: Results) -> Markup | None:
    """Perplexity over bits a weight, or over size where not all tell bits; None unless two compressed models have both.

    The text is the first that all of them have; full-precision parents are lines.
    """
    styles, originals = series_styles(results), results.parents
    models = [scores for scores in results.models if scores.subject.name not in originals]
    by_bits = all(scores.subject.bits_per_weight is not None for scores in models)
    places = [place for scores in models if (place := _bits_or_size(scores, by_bits)) is not None]
    shared = (
        text for one in models[:1] for text in one.perplexity if all(text in other.perplexity for other in models)
    )
    text = next(shared, None)
    if len(models) < 2 or len(places) < len(models) or text is None:
        return None
    measured = [scores for scores in results.models if text in scores.perplexity]
    values = {scores.subject.name: scores.perplexity[text].value for scores in measured}
    label, room = "bits per weight" if by_bits else "MB on disk", 0.06 * (max(places) - min(places))
    drawing = Drawing(_WIDTH, 356, f"Perplexity on {text} over {label}")
    across = Scale(min(places) - room, max(places) + room, (64, _WIDTH - _RIGHT), ticks=8)
    up = Scale(min(values.values()) / 1.05, max(values.values()) * 1.05, (308, 36), log=True)
    drawing.axes(across, up, label, upward=f"perplexity on {text}, logarithmic", whole=False)
    for name in originals & values.keys():
        y = up(values[name])
        drawing.line((64, y), (_WIDTH - _RIGHT, y), "chance")
        drawing.text(_WIDTH - _RIGHT, y - 6, f"{_short(name)}: {values[name]:,.2f}", style="muted", anchor="end")
    for scores, place in zip(models, places, strict=True):
        name, x, y = scores.subject.name, across(place), up(values[scores.subject.name])
        drawing.dot(x, y, f"fill {styles[name]}", hint=f"{name}: {values[name]:,.2f} at {place:,.3f} {label}")
        away, anchor = (-10, "end") if x > _WIDTH * 0.85 else (10, "start")
        drawing.text(x + away, y + 4, f"{values[name]:,.2f}", style="strong", anchor=anchor)
    return drawing.markup()


def _bits_or_size(scores: ModelScores, by_bits: bool) -> float | None:
    if by_bits or scores.weights is None:
        return scores.subject.bits_per_weight if by_bits else None
    return scores.weights.on_disk / 1e6


def task_figure(results: Results) -> Markup | None:
    """One row a task: a dot a model with its standard error; None where no task was run."""
    styles = series_styles(results)
    everything: dict[str, dict[str, Measured]] = {}
    for scores in results.models:
        for task, metric, _, value in scores.task_metrics:
            everything.setdefault(f"{task} {metric}", {})[scores.subject.name] = value
    # Bounded metrics only: a task's perplexity would flatten everything else.
    found = {
        label: row for label, row in everything.items() if all(0.0 <= value.value <= 1.0 for value in row.values())
    }
    if not found:
        return None
    every = [value for row in found.values() for value in row.values()]
    ends = [end for value in every for end in _interval(value)] + [one.chance for one in every if one.chance]
    height = max(_ROW, 12.0 + 8 * max(map(len, found.values())))
    drawing, scale, left = _rows_chart(list(found), ends, "Score of each task, with its standard error", height=height)
    for index, (label, row) in enumerate(found.items()):
        drawing.text(left - 12, _row_y(index, height) + 4, _short(label), anchor="end")
        if index:
            drawing.line((16, _row_y(index - 0.5, height)), (_WIDTH - _RIGHT, _row_y(index - 0.5, height)), "grid")
        if (chance := next(iter(row.values())).chance) is not None:
            top, bottom = _row_y(index - 0.4, height), _row_y(index + 0.4, height)
            drawing.line((scale(chance), top), (scale(chance), bottom), "chance")
        for place, (name, value) in enumerate(row.items()):
            y = _row_y(index, height) + (place - (len(row) - 1) / 2) * 8
            low, high = _interval(value)
            drawing.line((scale(low), y), (scale(high), y), f"whisker {styles[name]}")
            drawing.dot(scale(value.value), y, f"fill {styles[name]}", hint=f"{name}: {value.value:.4f}", radius=4)
    return drawing.markup()


def block_figure(blocks: Mapping[str, Sequence[BlockRecord]], styles: Mapping[str, str]) -> Markup | None:
    """Each block's output error: where training started (dashed) and ended; None where no block was trained."""
    trained = {name: records for name, records in blocks.items() if records}
    errors = [error for records in trained.values() for record in records for error in _errors(record)]
    if not errors:
        return None
    last = max(record.index for records in trained.values() for record in records)
    drawing = Drawing(_WIDTH, 296, "Output error of each block before and after training")
    across = Scale(0, max(last, 1), (64, _WIDTH - _RIGHT), ticks=min(max(last, 1), 15))
    up = Scale(min(errors), max(errors), (248, 36), log=True)
    drawing.axes(across, up, "block", upward="loss of the output, logarithmic")
    for name, records in trained.items():
        usable = [record for record in records if len(_errors(record)) == 2]
        drawing.path([(across(r.index), up(r.start_error)) for r in usable], f"curve dashed {styles[name]}")
        drawing.path([(across(r.index), up(r.end_error)) for r in usable], f"curve {styles[name]}")
        for record in usable:
            what = "kept its start" if record.fallback else f"{record.steps} steps"
            hint = f"{name}, block {record.index}: {record.start_error:.4g} → {record.end_error:.4g} ({what})"
            drawing.dot(across(record.index), up(record.end_error), f"fill {styles[name]}", hint=hint, radius=3.5)
    return drawing.markup()


def layer_figure(
    layers: Sequence[LayerRecord], span: tuple[float, float], unit: str = "of the weights' squared norm"
) -> Markup | None:
    """A map of relative weight errors, kinds of layers by blocks; None where no layer's name tells its block.

    Args:
        layers: of one model.
        span: the errors shown in the faintest and the fullest colour; the same for all models of a report.
        unit: what the errors are.
    """
    cells = {where: layer for layer in layers if (where := place(layer.name))}
    if not cells:
        return None
    low, high = span
    shares = {place: (layer.error - low) / (high - low) if high > low else 1.0 for place, layer in cells.items()}
    return heat_map(
        {place: (shares[place], f"{layer.name}: {layer.error:.4f}") for place, layer in cells.items()},
        "Relative squared error of each layer's weights",
        (number(low), number(high)),
        unit,
    )


def heat_map(
    cells: Mapping[tuple[str, int], tuple[float, str]], title: str, ends: tuple[str, str], label: str
) -> Markup:
    """A map of kinds of layers by blocks.

    Args:
        cells: of each kind and block how full its colour is, from 0 to 1, and a hint.
        title: of the drawing.
        ends: what the faintest and the fullest colour stand for.
        label: of what they are.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    left = 16 + max(map(len, kinds)) * _CHARACTER
    width = min((_WIDTH - _RIGHT - left) / len(blocks), 48.0)
    drawing = Drawing(_WIDTH, 66 + len(kinds) * 22, title)
    for (kind, block), (share, hint) in cells.items():
        corner = (left + blocks.index(block) * width + 1, 8 + kinds.index(kind) * 22 + 1)
        drawing.box(corner, (width - 2, 20), "heat", hint=hint, opacity=shade(share))
    for row, kind in enumerate(kinds):
        drawing.text(left - 8, 8 + row * 22 + 15, kind, anchor="end")
    below = 8 + len(kinds) * 22
    every = 1 + len(blocks) // 20
    for column, block in enumerate(blocks[::every]):
        drawing.text(left + (column * every + 0.5) * width, below + 16, str(block), style="muted", anchor="middle")
    drawing.text(left - 8, below + 16, "block", style="muted", anchor="end")
    drawing.colours(left - 8, below + 32, shade, *ends, label)
    return drawing.markup()


def bits_figure(models: Mapping[str, BitsReport]) -> Markup | None:
    """Stored bits per quantized weight, one bar a model, one colour a part; None without a quantized model."""
    if not models:
        return None
    drawing, scale, left = _rows_chart(
        list(models), [0.0, *(report.bits_per_weight for report in models.values())], "Bits per weight by part"
    )
    for index, (name, report) in enumerate(models.items()):
        y, start = _row_y(index), 0.0
        drawing.text(left - 12, y + 4, _short(name), anchor="end")
        for part, bits in weight_parts(report).items():
            share = bits / report.weights
            size = (scale(start + share) - scale(start), 16.0)
            drawing.box((scale(start), y - 8), size, f"part {part}", hint=f"{part}: {share:.3f}", radius=0)
            if size[0] > 12 + 7 * len(number(share)):
                drawing.text(scale(start) + size[0] / 2, y + 4, number(share), style="on-part", anchor="middle")
            start += share
        drawing.text(scale(start) + 8, y + 4, f"{start:.3f}", style="strong")
    return drawing.markup()


def weight_parts(report: BitsReport) -> dict[str, int]:
    """Bits that count towards the quantized weights, by part."""
    return {part: bits for part, bits in report.parts.items() if report.counts(part) and bits}


def _rows_chart(
    labels: Sequence[str], values: Sequence[float], title: str, *, log: bool = False, height: float = _ROW
) -> tuple[Drawing, Scale, float]:
    """An empty chart with a row for each label and an axis below that holds all values: drawing, axis, left edge."""
    left = 28 + max(len(_short(label)) for label in labels) * _CHARACTER
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
    bottom = 8 + len(labels) * height
    drawing = Drawing(_WIDTH, bottom + 26, title)
    scale = Scale(low, high, (left, _WIDTH - _RIGHT - 56), log=log)
    for tick in scale.ticks:
        drawing.line((scale(tick), 4), (scale(tick), bottom + 4), "grid")
        drawing.text(scale(tick), bottom + 20, number(tick), style="muted", anchor="middle")
    return drawing, scale, left


def _row_y(index: float, height: float = _ROW) -> float:
    return 8 + (index + 0.5) * height


def _short(label: str) -> str:
    return label if len(label) <= 44 else f"{label[:20]}…{label[-22:]}"


def _interval(metric: Measured) -> tuple[float, float]:
    error = metric.stderr or 0.0
    return metric.value - error, metric.value + error


def _errors(record: BlockRecord) -> list[float]:
    """The errors that a logarithmic axis can show."""
    return [error for error in (record.start_error, record.end_error) if 0 < error < float("inf")]


def place(name: str) -> tuple[str, int] | None:
    """Kind and block of a layer: ``("self_attn.q_proj", 3)`` of ``model.layers.3.self_attn.q_proj``."""
    found = _BLOCK.search(name)
    return (name[found.end() :], int(found.group(1))) if found else None


def shade(share: float) -> float:
    """Opacity of a map's colour for a place between the least (0) and the largest value (1)."""
    return 0.08 + 0.92 * share
