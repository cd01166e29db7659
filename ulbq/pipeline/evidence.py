"""What settings were measured to give: a table in the package, and the sweeps on this machine."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ulbq.artifacts import SweepManifest
from ulbq.artifacts.manifest import MANIFEST_NAME, load_manifest
from ulbq.artifacts.records import Record
from ulbq.errors import InputError
from ulbq.evaluation.results import Results
from ulbq.pipeline.recipes import OPTIONS
from ulbq.pipeline.sweep_points import by_setting, measured

_TEXT = "perplexity, wikitext2"


class Evidence(Record):
    """What a setting gave on one model.

    Attributes:
        name: of the setting.
        options: of its quantization run, by their names in recipes.
        model: that it was measured on.
        sha256: of that model; empty in the package's table.
        weights: how many of it are quantized.
        ratios: perplexity on WikiText-2 over that of the model in full precision, one a seed.
        seconds: of quantizing it; None where nobody knows.
        device: on which that took so long.
    """

    name: str
    options: dict[str, Any]
    model: str
    sha256: str = ""
    weights: int
    ratios: tuple[float, ...]
    seconds: float | None = None
    device: str = ""

    @property
    def ratio(self) -> float:
        """The mean over the seeds."""
        return mean(self.ratios)


_TABLE: TypeAdapter[list[Evidence]] = TypeAdapter(list[Evidence])


@cache
def shipped() -> Sequence[Evidence]:
    """The package's table, which ``benchmarks/measured.py`` writes."""
    text = (resources.files("ulbq") / "pipeline" / "measured.json").read_text(encoding="utf-8")
    return tuple(_TABLE.validate_python(json.loads(text)))


def swept(folder: Path) -> Iterator[Evidence]:
    """The settings of every finished sweep directly below a folder; what cannot be read is passed over."""
    for path in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        try:
            manifest = load_manifest(path.parent)
            if isinstance(manifest, SweepManifest):
                yield from of_sweep(manifest)
        except (InputError, ValidationError, LookupError):
            continue


def of_sweep(manifest: SweepManifest) -> Iterator[Evidence]:
    """The settings of a sweep that were measured on WikiText-2."""
    results = Results.model_validate(manifest.results)
    full = measured(results.models[0]).get(_TEXT)
    for point in by_setting(manifest.runs, results):
        run = point.runs[0]
        # A recipe may have changed since.
        if full is None or _TEXT not in point.values or not run.options.keys() <= OPTIONS:
            continue
        yield Evidence(
            name=point.setting,
            options=run.options,
            model=manifest.parents[0].name,
            sha256=manifest.parents[0].sha256,
            weights=run.weights,
            ratios=tuple(value / full[0] for value in point.values[_TEXT]),
            seconds=None if any(one.resumed for one in point.runs) else mean(one.seconds for one in point.runs),
            device=manifest.device,
        )
