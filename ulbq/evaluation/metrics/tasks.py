"""Tasks: those of lm-eval, and those whose answers models write."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ulbq.evaluation import figures
from ulbq.evaluation.metrics.base import Figure, Metric, Published, Shown
from ulbq.evaluation.results import Measured, ModelScores, Results, TaskScore

if TYPE_CHECKING:
    from ulbq.blockwise.streamed import AnyModel
    from ulbq.evaluation.evaluated import EvaluatedModel
    from ulbq.evaluation.generative_tasks import LoadedTask
    from ulbq.evaluation.measurer import Measurer


class TasksMetric(Metric):
    """Every metric of every task."""

    name = "tasks"
    section = "Tasks"

    def measure(
        self, measurer: "Measurer", candidate: "EvaluatedModel", model: "Callable[[], AnyModel]"
    ) -> dict[str, TaskScore]:
        from ulbq.evaluation.generative import with_groups
        from ulbq.evaluation.harness import run_tasks, told_apart

        measures, scores = measurer.measures, dict[str, TaskScore]()
        if (tasks := measures.tasks) is not None:

            def run() -> dict[str, TaskScore]:
                return run_tasks(
                    model(),
                    candidate.source.tokenizer(),
                    tasks,
                    limit=measures.limit,
                    batch_size=measurer.request.batch_size,
                    progress=measurer.progress,
                    label=candidate.name,
                )

            scores = measurer.score(
                candidate, "tasks", dict[str, TaskScore], run, of=lambda: told_apart(tasks, measures.limit)
            )
        if measures.generative is not None:
            answered = {one.task.name: _answered(measurer, candidate, model, one) for one in measures.generative.tasks}
            scores |= with_groups(answered, measures.generative.groups)
        return scores

    def numbers(self, scores: ModelScores) -> Sequence[Shown]:
        return [_shown(*one) for one in scores.task_metrics]

    def notes(self, results: Results) -> list[str]:
        tasks = [score for scores in results.models for score in scores.tasks.values()]
        if not tasks:
            return []
        limit, fewshot = results.protocol.limit, results.protocol.fewshot
        documents = "all documents" if limit is None else f"the first {limit:,} documents"
        examples = "as many examples as each task says" if fewshot is None else f"{fewshot} examples"
        of_lm_eval = f"Tasks: lm-eval, {documents}, {examples} in the prompt; ± is the standard error."
        notes = [of_lm_eval] * any(score.writing is None for score in tasks) + _writing_notes(results, documents)
        scored = {scores.subject.name for scores in results.models if scores.tasks}
        beside = ["In brackets: the difference from the full-precision parent."] * bool(scored & results.parents)
        known = any(one.chance is not None for score in tasks for one in score.metrics.values())
        return [*notes, *beside, *["Chance: what guessing scores."] * known]

    def figure(self, results: Results) -> Figure | None:
        drawing = figures.task_figure(results)
        caption = "Higher is better; the lines are one standard error to either side, dashed ones what guessing scores."
        return Figure("Tasks", caption, drawing, legend=True) if drawing else None


def _answered(
    measurer: "Measurer", candidate: "EvaluatedModel", model: "Callable[[], AnyModel]", loaded: "LoadedTask"
) -> TaskScore:
    from ulbq.evaluation.generative import Answered, run_generative

    template = measurer.request.template or candidate.template
    new_tokens = measurer.request.max_new_tokens or loaded.task.new_tokens

    def answer() -> Answered:
        return run_generative(
            model(),
            candidate.source.tokenizer(),
            loaded,
            template=template,
            new_tokens=new_tokens,
            batch_size=measurer.request.batch_size,
            progress=measurer.progress,
            label=candidate.name,
        )

    asked = [template, new_tokens, *([one.question, one.expected] for one in loaded.documents)]
    found = measurer.score(candidate, loaded.task.name, Answered, answer, of=lambda: asked)
    measurer.samples += [(candidate.name, sample) for sample in found.samples]
    return found.score


def _shown(task: str, metric: str, score: TaskScore, found: Measured) -> Shown:
    extent = f"{score.samples:,} document{'s' * (score.samples != 1)}"
    published = Published(f"{task}, {metric}", task, metric, extent)
    name, better = f"{task} {metric}", found.better
    return Shown(name, found.value, found.text, better, published=published, chance=found.chance, delta="+.4f")


def _writing_notes(results: Results, documents: str) -> list[str]:
    """How answers were written and read, and how many count as wrong because none was found in the text."""
    written = [
        (scores.subject.name, task, score, score.writing)
        for scores in results.models
        for task, score in scores.tasks.items()
        if score.writing is not None
    ]
    if not written:
        return []
    names = list(dict.fromkeys(task for _, task, score, _ in written if score.member_of is None))
    layouts = {model: writing.template for model, _, _, writing in written}
    told = ", ".join(f"{template} for {model}" for model, template in layouts.items())
    if len(set(layouts.values())) == 1:
        told = next(iter(layouts.values()))
    notes = [
        f"{', '.join(names)}: answers written greedily to {documents}, laid out as {told}, read by the published "
        "rules; ± is the standard error."
    ]
    sums = {score.member_of for _, _, score, _ in written}
    for model in layouts:
        missed = [
            f"{writing.unanswered:,} of {score.samples:,} ({task})"
            for name, task, score, writing in written
            if name == model and task not in sums and writing.unanswered
        ]
        if missed:
            notes.append(f"{model}: no answer was found, which counts as wrong, in {', '.join(missed)}.")
    return notes
