"""The page of a quantized artifact: what it cost and lost, one self-contained HTML page, without the network."""

from typing import Any

from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.told import losses
from ulbq.config.options import COMPUTE, RUN, SECTIONS, Option, options, typed, words
from ulbq.config.quantize import QuantizeRequest
from ulbq.evaluation.evaluated import format_label
from ulbq.evaluation.page import render
from ulbq.evaluation.report import weights
from ulbq.evaluation.table import size

REPORT = "report.html"


def page(manifest: QuantizedManifest) -> str:
    """The page, as HTML."""
    parent = f" of {manifest.parents[0].name}" if manifest.parents else ""
    return render(
        "quantize",
        title=manifest.name,
        told=f"{manifest.method} {format_label(manifest)}{parent}",
        created=f"{manifest.created[:16].replace('T', ' ')} UTC",
        values=_values(manifest),
        settings=_settings(manifest),
        device=manifest.device,
        phases=_phases(manifest),
        **weights({manifest.name: manifest}, {manifest.name: "s0"}),
    )


def _values(manifest: QuantizedManifest) -> list[tuple[str, str]]:
    bits, whole = manifest.bits, manifest.coverage
    stored = size(sum(bits.parts.values()) / 8)
    values = [(stored, "of weights" + (f"; {size(2 * whole.total)} in 16 bits" if whole else ""))]
    adapter = bits.parts.get("adapter", 0) / bits.weights
    alone = f"; {bits.bits_per_weight - adapter:.3f} without its adapter" if adapter else ""
    values.append((f"{bits.bits_per_weight:.3f}", f"bits per weight, scales and all{alone}"))
    if whole is not None:
        share = f"{whole.quantized / whole.total:.1%} quantized"
        values.append((f"{whole.bits:.2f}", f"bits a parameter over all, {share}"))
    return values


def _settings(manifest: QuantizedManifest) -> list[tuple[str, str]]:
    """Options as they are typed, what the samples were, and how the whole model trained."""
    asked = manifest.request
    rows = [
        (typed(name, option, switch=False)[0].partition("/")[0], _word(name, option, asked[name]))
        for name, _, option in sorted(options(QuantizeRequest), key=lambda one: SECTIONS.index(one[2].section))
        if option.section not in (COMPUTE, RUN) and asked.get(name) not in (None, [], "")
    ]
    if data := manifest.calibration:
        rows.append(("samples", f"{data.get('name')}, {data.get('samples')} × {data.get('sequence_length')} tokens"))
    return [*rows, *losses(manifest).items()]


def _word(name: str, option: Option, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return words(name, option, tuple(value) if isinstance(value, list) else value)


def _phases(manifest: QuantizedManifest) -> list[tuple[str, str, str]]:
    rows = [(phase.name, f"{phase.seconds:,.1f} s", size(phase.peak_memory)) for phase in manifest.phases]
    most = max((phase.peak_memory for phase in manifest.phases), default=0)
    return [*rows, ("all", f"{sum(phase.seconds for phase in manifest.phases):,.1f} s", size(most))]
