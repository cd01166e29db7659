"""Saliency scores as tables for people."""

from collections.abc import Iterable

from rich.table import Table

from ulbq.artifacts import SaliencyLayer, SaliencyManifest

from .tables import add, columns


def summary(manifest: SaliencyManifest) -> Table:
    """One row a projection, over its layers in all blocks, and one for all weights together."""
    table = columns("projection", "mean score", "highest in", *_heads(manifest.top))
    members: dict[str, list[SaliencyLayer]] = {}
    for layer in manifest.layers:
        members.setdefault(layer.projection, []).append(layer)
    for projection, layers in members.items():
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        highest = max(layers, key=lambda layer: layer.mean)
        mean = sum(layer.total for layer in layers) / weights
        shares = [sum(layer.top[name] for layer in layers) / len(layers) for name in manifest.top]
        add(table, projection, f"{mean:.3g}", f"block {highest.block}", *_shares(shares))
    add(table, "all weights together", "", "", *_shares(manifest.top.values()), style="bold")
    return table


def each(layers: Iterable[SaliencyLayer]) -> Table:
    """One row a layer."""
    layers = tuple(layers)
    table = columns("layer", "mean score", "highest column", *_heads(layers[0].top if layers else ()))
    for layer in layers:
        best = f"{layer.top_columns[0][0]} ({layer.top_columns[0][1]:.1%})" if layer.top_columns else ""
        add(table, layer.name, f"{layer.mean:.3g}", best, *_shares(layer.top.values()))
    return table


def _heads(top: Iterable[str]) -> list[str]:
    return [f"top {name} %" for name in top]


def _shares(shares: Iterable[float]) -> list[str]:
    return [f"{share:.1%}" for share in shares]
