"""Results as rows of text, one column a model: what the terminal and the report show alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ulbq.evaluation.metrics import METRICS
from ulbq.evaluation.metrics.base import Metric, Shown
from ulbq.evaluation.results import Results, Subject

_ARROWS = {1: "↑", -1: "↓", 0: ""}  # towards the better side


@dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
        section: the heading that it stands under.
        label: its name, with an arrow towards the better side.
        cells: one text a model; empty where it was not measured.
        best: places of the best of several compressed models; empty where all are equally good.
    """

    section: str
    label: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


def size(count: float) -> str:
    """Bytes as people write them, in powers of ten as file managers do: ``512 B``, ``88.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rows(results: Results) -> list[Row]:
    """Every quantity that was measured of any model: size, then metric by metric."""
    models = results.models
    bits = [scores.subject.bits_per_weight for scores in models]
    found = [
        Row("Weights", "method", tuple(describe(scores.subject) for scores in models)),
        Row("Weights", "bits per weight", tuple("" if value is None else f"{value:.3f}" for value in bits)),
        Row("Weights", "size on disk", tuple(size(s.weights.on_disk) if s.weights else "" for s in models)),
        Row("Weights", "weights in memory", tuple(size(s.weights.in_memory) if s.weights else "" for s in models)),
    ]
    for metric in METRICS.values():
        found += _metric_rows(results, metric)
    return [row for row in found if any(row.cells)]


def describe(subject: Subject) -> str:
    """A model's method and format in a word or two."""
    if subject.kind == "quantized":
        words = " ".join(part for part in (subject.method, subject.scheme) if part)
    else:
        words = subject.scheme or ("converted" if subject.kind == "converted" else "full precision")
    return words if subject.adapter is None else f"{words}, {subject.adapter}"


def footnotes(results: Results) -> list[str]:
    """What a reader must know to compare these numbers with others."""
    notes = [note for metric in METRICS.values() for note in metric.notes(results)]
    return [*notes, f"Computed in {results.protocol.dtype}.", *_weight_notes(results)]


def _weight_notes(results: Results) -> list[str]:
    """What stands behind the sizes, which are those of different things."""
    known = {scores.subject.name: scores.weights for scores in results.models if scores.weights is not None}
    if not known:
        return []
    files = [f"{name} is a GGUF file of {', '.join(w.gguf_types)}" for name, w in known.items() if w.gguf_types]
    stored = f" ({'; '.join(files)})" if files else ""
    return [
        f"Size on disk: the files that hold the weights{stored}. In memory: the weights as loaded, dense ones in "
        f"{results.protocol.dtype}, packed ones packed."
    ]


def _metric_rows(results: Results, metric: Metric) -> list[Row]:
    """One row for each of a metric's numbers, in order of first appearance."""
    models = [{one.label: one for one in metric.numbers(scores)} for scores in results.models]
    found = []
    for label in dict.fromkeys(label for numbers in models for label in numbers):
        cells = [numbers.get(label) for numbers in models]
        better = min(one.better for one in cells if one)
        best = _best(results, [one.value if one else None for one in cells], better)
        chance = next((f", chance {one.chance:.3f}" for one in cells if one and one.chance is not None), "")
        name = f"{label} {_ARROWS[better]}".rstrip()
        found.append(Row(metric.section, name + chance, tuple(_beside_parent(results, cells)), best))
    return found


def _beside_parent(results: Results, cells: Sequence[Shown | None]) -> Iterator[str]:
    """The numbers as text, some with their difference from the parent's."""
    known = {scores.subject.name: cell for scores, cell in zip(results.models, cells, strict=True)}
    for scores, cell in zip(results.models, cells, strict=True):
        original = known.get(scores.subject.parent or "")
        beside = f" ({cell.value - original.value:{cell.delta}})" if cell and original and cell.delta else ""
        yield (cell.text if cell else "") + beside.replace("-", "\N{MINUS SIGN}")


def _best(results: Results, values: Sequence[float | None], better: int) -> frozenset[int]:
    originals = results.parents
    ranked = {
        index: value * better
        for index, value in enumerate(values)
        if value is not None and results.models[index].subject.name not in originals
    }
    if not better or len(set(ranked.values())) < 2:
        return frozenset()
    top = max(ranked.values())
    return frozenset(index for index, value in ranked.items() if value == top)
