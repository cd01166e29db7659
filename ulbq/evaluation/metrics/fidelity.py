"""Fidelity to the full-precision parent."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ulbq.evaluation.metrics.base import Metric, Shown
from ulbq.evaluation.results import Fidelity, ModelScores, Results

if TYPE_CHECKING:
    import torch

    from ulbq.blockwise.streamed import AnyModel
    from ulbq.evaluation.evaluated import EvaluatedModel
    from ulbq.evaluation.measurer import Measurer

FIDELITY_WINDOWS = 8  # eight thousand positions at the usual context: the mean KL is then known to a few per cent
_OWN_WINDOWS, _OWN_LENGTH = 16, 128  # of text that the parent writes itself, a forward pass a token for all at once


class FidelityMetric(Metric):
    """Of every model that has a parent; the two are in memory together only while they are compared."""

    name = "fidelity"
    section = "Fidelity to full precision"

    def measure(
        self, measurer: "Measurer", candidate: "EvaluatedModel", model: "Callable[[], AnyModel]"
    ) -> Fidelity | None:
        from ulbq.evaluation.fidelity import KeptLogits, fidelity

        text, parent = measurer.measures.fidelity, candidate.parent
        if text is None or parent is None:
            return None

        def compare() -> Fidelity:
            compressed = model()
            read = "its parent's text" if text == "self" else text
            original: AnyModel | KeptLogits
            if measurer.kept is None:
                original = measurer.load(parent)
                windows = _windows(measurer, parent, original, text)
            else:
                original = KeptLogits(
                    lambda: measurer.load(parent),
                    lambda loaded: _windows(measurer, parent, loaded, text),
                    measurer.kept,
                )
                windows = original.windows
            return fidelity(
                compressed,
                original,
                windows,
                text=text,
                batch_size=measurer.request.batch_size,
                progress=measurer.progress,
                label=f"Fidelity of {candidate.name} on {read}",
            )

        return measurer.step(f"{candidate.name}: fidelity on {text}", Fidelity, compare)

    def numbers(self, scores: ModelScores) -> Sequence[Shown]:
        if (found := scores.fidelity) is None:
            return []
        mean, tail, same = found.mean_kl, found.p99_kl, found.top1_agreement
        return [
            Shown("mean KL, nats a token", mean, f"{mean:.4f}", -1, "mean KL from its parent, nats a token"),
            Shown("99th percentile of KL", tail, f"{tail:.3f}", -1),
            Shown("same top token", same, f"{same:.1%}", 1, "same top token as its parent"),
        ]

    def notes(self, results: Results) -> list[str]:
        fidelity = next((scores.fidelity for scores in results.models if scores.fidelity), None)
        if fidelity is None:
            return []
        text = "text that the full-precision model wrote" if fidelity.text == "self" else fidelity.text
        return [
            f"Fidelity: next-token distributions at {fidelity.tokens:,} positions of {text}; "
            "the full-precision model itself would have 0 nats and 100 %."
        ]


def _windows(measurer: "Measurer", parent: "EvaluatedModel", original: "AnyModel", text: str) -> "torch.Tensor":
    """What both read, int64 ``[n, t]``."""
    from ulbq import distributed
    from ulbq.blockwise.streamed import whole_model
    from ulbq.data.generate import self_samples

    most = _OWN_WINDOWS if text == "self" else FIDELITY_WINDOWS
    count = min(measurer.measures.limit or most, most)
    if text != "self":
        return measurer.windows(parent, text, count, bos=True)
    # One process writes for all: each word hangs on those before it.
    written = distributed.on_main(
        self_samples,
        whole_model(original),
        parent.source.tokenizer(),
        samples=count,
        length=min(measurer.measures.context, _OWN_LENGTH),
        seed=measurer.request.seed,
        # Long texts, as people read them, and the parent's own distribution.
        text_length=None,
        progress=measurer.progress,
    )
    return written.tokens
