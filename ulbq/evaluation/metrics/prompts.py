"""What models write on from prompts, and how fast."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from ulbq.evaluation.metrics.base import Metric, Shown
from ulbq.evaluation.results import Continuation, ModelScores, Results

if TYPE_CHECKING:
    from ulbq.blockwise.streamed import AnyModel
    from ulbq.evaluation.evaluated import EvaluatedModel
    from ulbq.evaluation.measurer import Measurer


class PromptsMetric(Metric):
    """After every prompt, of parents whatever else is measured of them: a child's text says little without theirs."""

    name = "continuations"
    section = "Speed"
    always: ClassVar = True

    def measure(
        self, measurer: "Measurer", candidate: "EvaluatedModel", model: "Callable[[], AnyModel]"
    ) -> tuple[Continuation, ...]:
        from ulbq import distributed
        from ulbq.evaluation.continuations import NEW_TOKENS, continue_prompts

        if not measurer.measures.prompts:
            return ()

        def write() -> tuple[Continuation, ...]:
            # One process writes for all: each word hangs on those before it.
            return distributed.on_main(
                continue_prompts,
                model(),
                candidate.source.tokenizer(),
                measurer.measures.prompts,
                template=measurer.request.template,
                new_tokens=measurer.request.max_new_tokens or NEW_TOKENS,
                cuda_graphs=measurer.request.cuda_graphs,
                progress=measurer.progress,
                label=candidate.name,
            )

        return measurer.step(f"{candidate.name}: prompts", tuple[Continuation, ...], write)

    def numbers(self, scores: ModelScores) -> Sequence[Shown]:
        pace = scores.tokens_per_second
        return [] if pace is None else [Shown("tokens per second", pace, f"{pace:.1f}", 1, "tokens per second")]

    def notes(self, results: Results) -> list[str]:
        written = [one for scores in results.models for one in scores.continuations]
        if not written:
            return []
        layouts = dict.fromkeys(f"laid out as {one.template}" if one.template else "as bare text" for one in written)
        devices = dict.fromkeys(one.device for one in written)
        longest = max(one.timed_tokens for one in written)
        return [
            f"Prompts: {', '.join(layouts)}, continued greedily by at most {longest:,} tokens.",
            f"Tokens per second: {longest:,} tokens after each prompt, one at a time, after a warm-up, past any end of "
            f"the text ({'; '.join(devices)}).",
        ]
