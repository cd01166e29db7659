"""Perplexity on held-out text."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ulbq.evaluation import figures
from ulbq.evaluation.metrics.base import Figure, Metric, Published, Shown
from ulbq.evaluation.results import ModelScores, Perplexity, Results

if TYPE_CHECKING:
    import torch

    from ulbq.blockwise.streamed import AnyModel
    from ulbq.evaluation.evaluated import EvaluatedModel
    from ulbq.evaluation.measurer import Measurer

ENDLESS_WINDOWS = 256  # of a set too large to read whole, where no limit is given; GPTQ's number for C4


class PerplexityMetric(Metric):
    """Of every text set that was asked for."""

    name = "perplexity"
    section = "Perplexity"

    def measure(
        self, measurer: "Measurer", candidate: "EvaluatedModel", model: "Callable[[], AnyModel]"
    ) -> dict[str, Perplexity]:
        from ulbq.data.registry import TEXT_SETS
        from ulbq.evaluation.perplexity import perplexity

        def read(text: str) -> Perplexity:
            endless = ENDLESS_WINDOWS if TEXT_SETS[text].endless else None

            @cache
            def windows() -> "torch.Tensor":
                return measurer.windows(candidate, text, measurer.measures.limit or endless)

            def take() -> Perplexity:
                return perplexity(
                    model(),
                    windows(),
                    batch_size=measurer.request.batch_size,
                    progress=measurer.progress,
                    label=f"Perplexity of {candidate.name} on {text}",
                )

            return measurer.score(candidate, f"perplexity on {text}", Perplexity, take, of=lambda: _digest(windows()))

        return {text: read(text) for text in measurer.measures.perplexity}

    def numbers(self, scores: ModelScores) -> Sequence[Shown]:
        return [_shown(text, value) for text, value in scores.perplexity.items()]

    def notes(self, results: Results) -> list[str]:
        found = {name: value for scores in results.models for name, value in scores.perplexity.items()}
        return [
            f"Perplexity on {name}: text joined with blank lines, {value.windows:,} non-overlapping "
            f"windows of {value.context:,} tokens."
            for name, value in found.items()
        ]

    def figure(self, results: Results) -> Figure | None:
        drawing = figures.perplexity_figure(results)
        return Figure("Perplexity", "Lower is better; the axis is logarithmic.", drawing) if drawing else None


def _digest(windows: "torch.Tensor") -> list[object]:
    """Shape and SHA-256 of tokens."""
    return [*windows.shape, hashlib.sha256(windows.numpy().tobytes()).hexdigest()]


def _shown(text: str, value: Perplexity) -> Shown:
    extent = f"{value.windows:,} window{'s' * (value.windows != 1)} of {value.context:,} tokens"
    published = Published(f"perplexity, {text}", text, "perplexity", extent)
    return Shown(text, value.value, f"{value.value:,.2f}", -1, f"perplexity on {text}", published)
