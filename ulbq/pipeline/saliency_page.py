"""The summary of a saliency artifact: one self-contained HTML page, light or dark, without the network."""

import math
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from ulbq.artifacts import SaliencyLayer, SaliencyManifest
from ulbq.evaluation.figures import heat_map
from ulbq.evaluation.page import render
from ulbq.evaluation.svg import Drawing, Scale, number
from ulbq.sensitivity import KINDS

_WIDTH = 800.0
_RIGHT = 24.0
_LEVELS = 16
_TOPS = {"10": "s0", "1": "s1", "0.1": "s2"}


def page(manifest: SaliencyManifest) -> str:
    """The page, as HTML."""
    return render(
        "saliency",
        title=f"{manifest.parents[0].name if manifest.parents else manifest.name}: {manifest.score}",
        told=_told(manifest),
        created=manifest.created,
        values=_values(manifest),
        means=_map(manifest.layers),
        concentration=_concentration(manifest.layers),
        tops=[(f"top {name} %", style) for name, style in _TOPS.items()],
        colours=_colours(),
        columns=list(_columns(manifest.layers)),
        heads=["layer", "mean", *(f"top {name} %" for name in manifest.top), "highest column"],
        rows=_rows(manifest),
    )


def _told(manifest: SaliencyManifest) -> str:
    words = [next((words for kind, words in KINDS.items() if kind == manifest.score), manifest.score)]
    if data := manifest.calibration:
        words.append(f"{data.get('name')}, {data.get('samples')} × {data.get('sequence_length')} tokens")
    if manifest.loss is not None:
        words.append(f"loss {manifest.loss:.3f} nats a token")
    return "; ".join(words)


def _values(manifest: SaliencyManifest) -> list[tuple[str, str]]:
    values = [(f"{share:.1%}", f"of the total in the top {name} % of weights") for name, share in manifest.top.items()]
    values.append((f"{manifest.rounding:.2%}", f"largest loss of a layer to {manifest.dtype} storage"))
    return values


def _map(layers: Sequence[SaliencyLayer]) -> Markup:
    """Mean score of every layer, projections by blocks."""
    means = [layer.mean for layer in layers if layer.mean > 0]
    low, high = (math.log(min(means)), math.log(max(means))) if means else (0.0, 0.0)
    cells = {
        (layer.projection, layer.block): (
            (math.log(layer.mean) - low) / (high - low) if layer.mean > 0 and high > low else 0.0,
            f"{layer.name}: mean {layer.mean:.3g}",
        )
        for layer in layers
    }
    ends = (f"{min(means):.2g}", f"{max(means):.2g}") if means else ("0", "0")
    return heat_map(cells, "Mean score of each layer's weights", ends, "mean of a weight's score, logarithmic")


def _concentration(layers: Sequence[SaliencyLayer]) -> Markup:
    """Curves over the blocks of the shares that the top weights hold."""
    blocks = sorted({layer.block for layer in layers})
    rows = {block: [layer.top for layer in layers if layer.block == block] for block in blocks}
    across = Scale(0, max(blocks[-1], 1), (56, _WIDTH - _RIGHT), ticks=min(max(blocks[-1], 1), 15))
    up = Scale(0, 1, (216, 32))
    drawing = Drawing(_WIDTH, 262, "Share of the total held by the top weights, by block")
    drawing.axes(across, up, "block", upward="share of the layer's total", told="{:.0%}".format)
    for name, style in _TOPS.items():
        points = [(across(b), up(sum(top[name] for top in tops) / len(tops))) for b, tops in rows.items()]
        drawing.path(points, f"curve {style}")
    return drawing.markup()


def _columns(layers: Sequence[SaliencyLayer]) -> Iterator[tuple[str, Markup]]:
    """A map for each projection, with its name: blocks by slices of columns."""
    for kind in projections(layers):
        members = sorted((layer for layer in layers if layer.projection == kind), key=lambda layer: layer.block)
        yield kind, _raster(members, kind)


def _raster(layers: Sequence[SaliencyLayer], title: str) -> Markup:
    """Shares of columns as a picture: one path a level of colour, which is a tenth of the size of one box a share."""
    height, left, right = min(max(96 / len(layers), 6.0), 16.0), 56.0, _WIDTH - _RIGHT
    paths: dict[int, list[str]] = {}
    for row, layer in enumerate(layers):
        width = (right - left) / len(layer.columns)
        for column, share in enumerate(layer.columns):
            excess = math.log10(max(share * len(layer.columns), 1.0))  # 0 at an even share, 1 at ten times
            if level := round(min(excess, 1.0) * _LEVELS):
                corner = f"M{left + column * width:.1f} {row * height:g}"
                paths.setdefault(level, []).append(f"{corner}h{width:.1f}v{height:g}h-{width:.1f}z")
    tall = len(layers) * height
    drawing = Drawing(_WIDTH, tall + 44, title)
    for level, parts in sorted(paths.items()):
        drawing.shape("".join(parts), "heat", opacity=level / _LEVELS)
    drawing.box((left, 0.5), (right - left, tall - 1), "grid", radius=0, fill="none")
    across = Scale(0, layers[0].shape[1], (left, right), ticks=8)
    for tick in across.ticks:
        drawing.text(across(tick), tall + 16, number(tick), style="muted", anchor="middle")
    drawing.text((left + right) / 2, tall + 36, "column", style="muted", anchor="middle")
    for row in dict.fromkeys((0, len(layers) - 1)):
        drawing.text(left - 8, (row + 0.5) * height + 4, str(layers[row].block), style="muted", anchor="end")
    if len(layers) > 5:
        drawing.text(left - 8, tall / 2 + 4, "block", style="muted", anchor="end")
    return drawing.markup()


def _colours() -> Markup:
    """What the colours of columns stand for."""
    drawing = Drawing(_WIDTH, 20, "Colours of columns")
    drawing.colours(136, 2, float, "an even share", "ten times as much", "or more, logarithmic")
    return drawing.markup()


def _rows(manifest: SaliencyManifest) -> list[tuple[str, ...]]:
    lines = [(layer.name, f"{layer.mean:.3g}", layer.top, _best(layer)) for layer in manifest.layers]
    return [
        (name, mean, *(f"{share:.1%}" for share in top.values()), best)
        for name, mean, top, best in [*lines, ("all", "", manifest.top, "")]
    ]


def _best(layer: SaliencyLayer) -> str:
    return f"{layer.top_columns[0][0]} ({layer.top_columns[0][1]:.1%})" if layer.top_columns else ""


def projections(layers: Sequence[SaliencyLayer]) -> list[str]:
    """Names of the layers inside their blocks, each once, in the model's order."""
    return list(dict.fromkeys(layer.projection for layer in layers))
