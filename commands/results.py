"""What a command made, in a few rows on standard error: sizes, errors, time, and what to type next."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ulbq.artifacts import ConvertedManifest, QuantizedManifest
from ulbq.artifacts.manifest import Manifest
from ulbq.artifacts.told import losses
from ulbq.evaluation.table import size

from .plan_table import bits_words, show_rows
from .progress import duration

_BARS = "▁▂▃▄▅▆▇█"
_WEIGHTS = (".safetensors", ".gguf")


def show_quantized(path: Path, manifest: QuantizedManifest) -> None:
    """Say what ``quantize`` made."""
    rows = {"size": _sizes(manifest), "errors": _errors(manifest)}
    rows |= losses(manifest) | {"took": _took(manifest), "next": f"ulbq eval {shlex.quote(str(path))}"}
    show_rows({name: text for name, text in rows.items() if text})


def show_finetuned(manifest: QuantizedManifest) -> None:
    """Say what ``finetune`` made."""
    show_rows({"size": _sizes(manifest), **losses(manifest), "took": _took(manifest)})


def show_converted(manifest: Manifest) -> None:
    """Say what ``convert`` made."""
    weights = sum(entry.size for name, entry in manifest.files.items() if name.endswith(_WEIGHTS))
    layout = manifest.target if isinstance(manifest, ConvertedManifest) else "an artifact"
    show_rows({"size": f"{size(weights)} of weights as {layout}"})


def _sizes(manifest: QuantizedManifest) -> str:
    """Stored weights beside those in 16 bits, and the bits."""
    stored = size(sum(manifest.bits.parts.values()) / 8)
    report = manifest.bits
    words = bits_words(report.bits_per_weight, report.parts.get("adapter", 0) / report.weights)
    if (whole := manifest.coverage) is None:
        return f"{stored} of weights, {words}"
    return f"{stored} of weights, {size(2 * whole.total)} in 16 bits; {words}, {whole.bits:.2f} a parameter over all"


def _errors(manifest: QuantizedManifest) -> str:
    """Of the blocks that trained; of those that did not, what rounding their weights lost."""
    if manifest.blocks:
        return _line("output", [block.end_error for block in manifest.blocks])
    by_block: dict[str, list[float]] = {}
    for layer in manifest.layers:
        numbers = [part for part in layer.name.split(".") if part.isdigit()]
        by_block.setdefault(numbers[0] if numbers else "", []).append(layer.error)
    return _line("weights", [mean(errors) for errors in by_block.values()])


def _line(what: str, errors: Sequence[float]) -> str:
    """Errors block by block as bars, and their ends; empty without blocks."""
    if not errors:
        return ""
    most, worst = max(errors), errors.index(max(errors))
    bars = "".join(_BARS[round(error / most * (len(_BARS) - 1)) if most else 0] for error in errors)
    return f"{what}, block by block {bars} {min(errors):.2g} to {most:.2g} (block {worst})"


def _took(manifest: QuantizedManifest) -> str:
    """Time of all phases, and the largest memory."""
    if not manifest.phases:
        return ""
    most = max(phase.peak_memory for phase in manifest.phases)
    return f"{duration(sum(phase.seconds for phase in manifest.phases))}, {size(most)} of memory"
