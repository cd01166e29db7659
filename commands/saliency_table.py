"""Saliency scores as tables for people."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from ulbq.artifacts import SaliencyLayer, SaliencyManifest


def summary(manifest: SaliencyManifest) -> Table:
    """One row a projection, over its layers in all blocks, and one for all weights together."""
    table = _columns("projection", "mean score", "highest in", *_heads(manifest.top))
    members: dict[str, list[SaliencyLayer]] = {}
    for layer in manifest.layers:
        members.setdefault(layer.projection, []).append(layer)
    for projection, layers in members.items():
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        highest = max(layers, key=lambda layer: layer.mean)
        mean = sum(layer.total for layer in layers) / weights
        shares = [sum(layer.top[name] for layer in layers) / len(layers) for name in manifest.top]
        _add(table, projection, f"{mean:.3g}", f"block {highest.block}", shares)
    _add(table, "all weights together", "", "", manifest.top.values(), style="bold")
    return table


def each(layers: Iterable[SaliencyLayer]) -> Table:
    """One row a layer."""
    layers = tuple(layers)
    table = _columns("layer", "mean score", "highest column", *_heads(layers[0].top if layers else ()))
    for layer in layers:
        best = f"{layer.top_columns[0][0]} ({layer.top_columns[0][1]:.1%})" if layer.top_columns else ""
        _add(table, layer.name, f"{layer.mean:.3g}", best, layer.top.values())
    return table


def _heads(top: Iterable[str]) -> list[str]:
    return [f"top {name} %" for name in top]


def _columns(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _add(table: Table, name: str, mean: str, where: str, shares: Iterable[float], style: str = "") -> None:
    # As Text, not as markup: a module may be called experts[a].
    table.add_row(*map(Text, [name, mean, where, *(f"{share:.1%}" for share in shares)]), style=style)
