"""The report of a fine-tuning run: one self-contained HTML page, light or dark, without the network."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.records import FinetuneRecord
from ulbq.evaluation.page import render
from ulbq.evaluation.svg import Drawing, Scale, number

_WIDTH, _HEIGHT = 800.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 24.0, 34.0, 46.0
_SMOOTHED = 0.02  # of the run, the width of the moving mean

Points = Sequence[tuple[float, float]]


def page(manifest: QuantizedManifest, record: FinetuneRecord) -> str:
    """The page, as HTML."""
    return render(
        "finetune",
        title=f"{manifest.name}: {record.task}",
        told=_told(record),
        created=manifest.created,
        values=_values(record),
        curves=_curves(record),
        rows=list(_rows(manifest, record).items()),
    )


def _told(record: FinetuneRecord) -> str:
    data = record.data
    return (
        f"{data['samples']:,} samples of {', '.join(map(str, data['sources']))}, "
        f"{data['taught_tokens']:,} answer tokens; "
        f"{record.epochs} epoch{'s' * (record.epochs > 1)}, {record.steps:,} steps; {data['heldout']} answers held out"
    )


def _values(record: FinetuneRecord) -> list[tuple[str, str]]:
    change = record.end_perplexity / record.start_perplexity - 1
    return [
        (number(record.start_perplexity), "perplexity of the held-out answers before"),
        (number(record.end_perplexity), "after"),
        (f"{change:+.1%}".replace("-", "−"), "change"),
    ]


def _curves(record: FinetuneRecord) -> Markup:
    training, heldout = record.losses, record.evaluations
    values = [loss for _, loss in (*training, *heldout)]
    across = Scale(0, max(record.steps, 1), (_LEFT, _WIDTH - _RIGHT), ticks=8)
    up = Scale(min(values), max(values), (_HEIGHT - _BOTTOM, _TOP))
    drawing = Drawing(_WIDTH, _HEIGHT, "Loss by step")
    drawing.axes(across, up, "step", upward="loss, nats a token")
    placed = [(across(step), up(loss)) for step, loss in training]
    drawing.path(placed, "faded curve")
    drawing.path([(across(step), up(loss)) for step, loss in _smoothed(training)], "s0 curve")
    drawing.path([(across(step), up(loss)) for step, loss in heldout], "s1 curve")
    for step, loss in heldout:
        hint = f"step {step:,}: {loss:.4f} nats a token, perplexity {math.exp(loss):.3f}"
        drawing.dot(across(step), up(loss), "s1 fill", hint=hint, radius=4)
    return drawing.markup()


def _smoothed(points: Points) -> Points:
    """Each point's mean with its neighbours, over a fixed share of the run."""
    reach = math.ceil(len(points) * _SMOOTHED)
    found = []
    for index, (step, _) in enumerate(points):
        near = [loss for _, loss in points[max(0, index - reach) : index + reach + 1]]
        found.append((step, sum(near) / len(near)))
    return found


def _rows(manifest: QuantizedManifest, record: FinetuneRecord) -> dict[str, str]:
    request = manifest.request
    adapter = "the artifact's own adapter went on" if record.start == "trained" else "a new adapter"
    scales = f", scales {request['scale_lr']:g}" if record.train == "adapter-scales" else ""
    return {
        "base": manifest.parents[-1].name,
        "trained": f"{record.train}, {record.parameters:,} parameters; {adapter}",
        "layout": record.template or "plain text",
        "rates": f"adapter {request['adapter_lr']:g}{scales}, {request['schedule']}, warm-up {request['warmup']:g}",
        "samples a step": f"{request['batch_size']}, {request['micro_batch']} at once",
        "bits per weight": f"{manifest.bits.bits_per_weight:.3f}, the adapter included",
        "device": manifest.device,
        "training took": f"{record.seconds:,.0f} s",
        "data, SHA-256": str(record.data["sha256"])[:16],
    }
