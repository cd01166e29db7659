"""The page of a sweep: one self-contained HTML page, light or dark, without the network."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from markupsafe import Markup

from ulbq.artifacts import LayerRecord, SweepManifest
from ulbq.evaluation.figures import SERIES, heat_map, layer_figure, place
from ulbq.evaluation.page import render
from ulbq.evaluation.results import Results
from ulbq.evaluation.svg import Drawing, Scale, number
from ulbq.evaluation.table import footnotes, size
from ulbq.pipeline.sweep_points import MEAN_ACCURACY, Point, by_setting, front, measured

_WIDTH, _RIGHT = 800.0, 24.0
_LEFT, _TOP, _BOTTOM = 76.0, 36.0, 320.0


class Cell(NamedTuple):
    """A cell of the table: what it shows, what it is sorted by, and whether it stands on the front."""

    text: str
    key: float
    best: bool = False


def page(manifest: SweepManifest, results: Results, layers: Mapping[str, Sequence[LayerRecord]]) -> str:
    """The page, as HTML.

    Args:
        layers: of every run's manifest, by the run's name.
    """
    points = by_setting(manifest.runs, results)
    original = results.models[0]
    better = {name: sign for name, (_, sign) in measured(original).items()}
    # The original has no fidelity to itself.
    better |= {name: -1 for point in points for name in point.values if name not in better}
    fronts = {name: front(points, name, sign) for name, sign in better.items()} if points else {}
    methods = list(dict.fromkeys(run.method for run in manifest.runs))
    styles = {method: f"s{index % SERIES}" for index, method in enumerate(methods)}
    shown = [name for name in better if name == MEAN_ACCURACY or name.startswith(("perplexity", "mean KL"))]
    if MEAN_ACCURACY not in better:
        shown = list(better)
    parent = {name: value for name, (value, _) in measured(original).items()}
    return render(
        "sweep",
        title=f"{original.subject.name}: {len(points)} settings",
        told=f"{len(manifest.runs)} runs, {manifest.device}",
        created=f"{manifest.created[:16].replace('T', ' ')} UTC",
        drawings=[
            (
                f"{name[0].upper()}{name[1:]} over bits",
                _told(name in parent),
                _figure(points, better[name], name, parent.get(name), styles),
            )
            for name in shown
            if points
        ],
        legend=list(styles.items()),
        heads=["setting", "bits", "size", *better, "time", "peak memory"],
        rows=[_row(point, fronts) for point in points],
        footnotes=footnotes(results),
        blocks=_blocks(points),
        sensitive=_sensitive([layers[run.name] for run in manifest.runs]),
        left_out=[f"{name}: {why}" for name, why in manifest.left_out.items()],
        warnings=manifest.warnings,
    )


def _told(full: bool) -> str:
    told = (
        "A dot is a setting, its line reaches over its seeds. Large dots, named and joined, are the Pareto front: no "
    )
    return f"{told}other setting is better with as few bits.{' Dashed: the model in full precision.' * full}"


def _figure(points: Sequence[Point], better: int, name: str, parent: float | None, styles: Mapping[str, str]) -> Markup:
    """A number over true bits: a dot a setting, a line from the least to the most of its seeds, the front joined."""
    best = front(points, name, better)
    ends = [end for point in points for end in point.spread(name)] + ([] if parent is None else [parent])
    log = min(ends) > 0 and max(ends) / min(ends) > 2
    low, high = min(ends), max(ends)
    margin = (high / low) ** 0.06 if log else 0.06 * (high - low)
    up = Scale(low / margin if log else low - margin, high * margin if log else high + margin, (_BOTTOM, _TOP), log=log)
    widths = [point.bits for point in points]
    room = 0.06 * (max(widths) - min(widths)) or 0.5
    across = Scale(min(widths) - room, max(widths) + room, (_LEFT, _WIDTH - _RIGHT))
    drawing = Drawing(_WIDTH, _BOTTOM + 52, f"{name} over true bits a weight")
    drawing.axes(across, up, "true bits a weight", upward=f"{name}{', logarithmic' if log else ''}", whole=False)
    if parent is not None:
        drawing.path([(_LEFT, up(parent)), (_WIDTH - _RIGHT, up(parent))], "curve dashed parent")
    drawing.path([(across(point.bits), up(point.value(name))) for point in best], "curve parent")
    for point in points:
        style = styles[point.runs[0].method]
        x, (least, most) = across(point.bits), point.spread(name)
        drawing.line((x, up(least)), (x, up(most)), f"whisker {style}")
        drawing.dot(
            x, up(point.value(name)), f"fill {style}", hint=_hint(point, name), radius=6 if point in best else 4
        )
    for point in best:
        # On the side where nothing is better.
        y = up(point.value(name)) + (20 if better < 0 else -12)
        drawing.text(across(point.bits), y, point.setting, style="strong", anchor="middle")
    return drawing.markup()


def _hint(point: Point, name: str) -> str:
    """What shows when the pointer rests on a setting."""
    values = ", ".join(f"{value:.4g}" for value in point.values[name])
    told = ", ".join(f"{option} {value}" for option, value in point.runs[0].options.items())
    seeds = f" (seeds {', '.join(str(run.seed) for run in point.runs)})" if len(point.runs) > 1 else ""
    return f"{point.setting}: {point.bits:.3f} bits, {name} {values}{seeds}; {told}"


def _row(point: Point, fronts: Mapping[str, Sequence[Point]]) -> list[Cell]:
    stored = mean(run.size for run in point.runs)
    seconds = mean(run.seconds for run in point.runs)
    memory = max(run.peak_memory for run in point.runs)
    parts = any(run.resumed for run in point.runs)
    cells = [Cell(point.setting, 0.0), Cell(f"{point.bits:.3f}", point.bits), Cell(size(stored), stored)]
    for name, best in fronts.items():
        if name not in point.values:
            cells.append(Cell("", math.inf))
            continue
        least, most = point.spread(name)
        spread = f" ({number(least)} to {number(most)})" if most > least else ""
        cells.append(Cell(f"{number(point.value(name))}{spread}", point.value(name), point in best))
    return [*cells, Cell(f"{'over ' * parts}{seconds:,.0f} s", seconds), Cell(size(memory), memory)]


def layers_by_block(layers: Sequence[LayerRecord]) -> dict[int, list[float]]:
    """Errors of the layers of each block; those without a block's number, and what nobody knows, left out."""
    found: dict[int, list[float]] = {}
    for layer in layers:
        if (where := place(layer.name)) is not None and math.isfinite(layer.error):
            found.setdefault(where[1], []).append(layer.error)
    return found


def _blocks(points: Sequence[Point]) -> Markup | None:
    """A map of the mean error of each block's layers, settings by blocks: logarithmic."""
    rows = {point.setting: point.runs[0].errors for point in points}
    errors = [error for row in rows.values() for error in row if error > 0]
    if not errors:
        return None
    low, high = math.log(min(errors)), math.log(max(errors))
    cells = {
        (setting, block): (
            (math.log(error) - low) / (high - low) if high > low else 0.0,
            f"{setting}, block {block}: {error:.4f}",
        )
        for setting, row in rows.items()
        for block, error in enumerate(row)
        if error > 0
    }
    ends, label = (number(min(errors)), number(max(errors))), "of the weights' squared norm, logarithmic"
    return heat_map(cells, "Mean relative squared error of each block's layers", ends, label)


def _sensitive(runs: Sequence[Sequence[LayerRecord]]) -> Markup | None:
    """A map of layers by how much more they lose than the mean layer of the same run, over all runs."""
    shares: dict[str, list[float]] = {}
    first: dict[str, LayerRecord] = {}
    for name, share, layer in (one for layers in runs for one in _shares(layers)):
        shares.setdefault(name, []).append(share)
        first.setdefault(name, layer)
    found = [first[name].model_copy(update={"error": mean(values)}) for name, values in shares.items()]
    errors = [layer.error for layer in found]
    return layer_figure(found, (min(errors), max(errors)), "times the mean layer's error") if found else None


def _shares(layers: Sequence[LayerRecord]) -> Iterator[tuple[str, float, LayerRecord]]:
    known = [layer for layer in layers if math.isfinite(layer.error)]
    usual = mean(layer.error for layer in known) if known else 0.0
    if usual > 0:
        yield from ((layer.name, layer.error / usual, layer) for layer in known)
