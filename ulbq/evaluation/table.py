"""Results as rows of text, one column a model: what the terminal and the report show alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ulbq.evaluation.results import Metric, ModelScores, Results, Subject

_T = TypeVar("_T")


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
    """Every quantity that was measured of any model, in a fixed order: size, speed, perplexity, fidelity, tasks."""
    models = results.models
    found = [
        Row("Weights", "method", tuple(describe(scores.subject) for scores in models)),
        _numbers(
            results, "Weights", "bits per weight", [scores.subject.bits_per_weight for scores in models], "{:.3f}"
        ),
        Row("Weights", "size on disk", tuple(size(s.weights.on_disk) if s.weights else "" for s in models)),
        Row("Weights", "weights in memory", tuple(size(s.weights.in_memory) if s.weights else "" for s in models)),
        _numbers(results, "Speed", "tokens per second ↑", [s.tokens_per_second for s in models], "{:.1f}", 1),
    ]
    for name in _union(scores.perplexity for scores in models):
        values = [scores.perplexity[name].value if name in scores.perplexity else None for scores in models]
        found.append(_numbers(results, "Perplexity", f"{name} ↓", values, "{:,.2f}", -1))
    found += _fidelity_rows(results)
    for task, metric in _union(shown_metrics(scores) for scores in models):
        found.append(_task_row(results, task, metric))
    return [row for row in found if any(row.cells)]


def describe(subject: Subject) -> str:
    """A model's method and format in a word or two."""
    if subject.kind == "quantized":
        words = " ".join(part for part in (subject.method, subject.scheme) if part)
    else:
        dense = "full precision" if subject.scheme is None else f"GGUF {subject.scheme}"
        words = "converted" if subject.kind == "converted" else "EXL3" if subject.scheme == "EXL3" else dense
    return words if subject.adapter is None else f"{words}, {subject.adapter}"


def shown_metrics(scores: ModelScores) -> list[tuple[str, str]]:
    """(task, metric) of every score but those of the members of lm-eval's groups, which the group's own sums up.

    The few members of a group with written answers are shown, as published tables show them.
    """
    return [
        (task, metric)
        for task, score in scores.tasks.items()
        if score.member_of is None or score.writing is not None
        for metric in score.metrics
    ]


def metric_of(scores: ModelScores, task: str, metric: str) -> Metric | None:
    """One metric of one task, None where it was not measured."""
    score = scores.tasks.get(task)
    return score.metrics.get(metric) if score else None


def parents(results: Results) -> set[str]:
    """Names of the models that others were made from."""
    return {scores.subject.parent for scores in results.models if scores.subject.parent is not None}


def footnotes(results: Results) -> list[str]:
    """What a reader must know to compare these numbers with others."""
    protocol = results.protocol
    lines = []
    for name, value in {name: value for scores in results.models for name, value in scores.perplexity.items()}.items():
        lines.append(
            f"Perplexity on {name}: text joined with blank lines, {value.windows:,} non-overlapping "
            f"windows of {value.context:,} tokens."
        )
    fidelity = next((scores.fidelity for scores in results.models if scores.fidelity), None)
    if fidelity:
        text = "text that the full-precision model wrote" if fidelity.text == "self" else fidelity.text
        lines.append(
            f"Fidelity: next-token distributions at {fidelity.tokens:,} positions of {text}; "
            "the full-precision model itself would have 0 nats and 100 %."
        )
    tasks = [score for scores in results.models for score in scores.tasks.values()]
    if tasks:
        documents = "all documents" if protocol.limit is None else f"the first {protocol.limit:,} documents"
        examples = "as many examples as each task says" if protocol.fewshot is None else f"{protocol.fewshot} examples"
        if any(score.writing is None for score in tasks):
            lines.append(f"Tasks: lm-eval, {documents}, {examples} in the prompt; ± is the standard error.")
        lines += _writing_notes(results, documents)
    lines += _prompt_notes(results)
    return [*lines, f"Computed in {protocol.dtype}.", *_weight_notes(results)]


def _prompt_notes(results: Results) -> list[str]:
    """How texts after prompts came about, and what was timed where."""
    written = [one for scores in results.models for one in scores.continuations]
    if not written:
        return []
    layouts = _union([f"laid out as {one.template}" if one.template else "as bare text"] for one in written)
    devices = _union([one.device] for one in written)
    longest = max(one.timed_tokens for one in written)
    return [
        f"Prompts: {', '.join(layouts)}, continued greedily by at most {longest:,} tokens.",
        f"Tokens per second: {longest:,} tokens after each prompt, one at a time, after a warm-up, past any end of the "
        f"text ({'; '.join(devices)}).",
    ]


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


def _fidelity_rows(results: Results) -> list[Row]:
    section = "Fidelity to full precision"
    found = [scores.fidelity for scores in results.models]
    mean = [value.mean_kl if value else None for value in found]
    tail = [value.p99_kl if value else None for value in found]
    same = [value.top1_agreement if value else None for value in found]
    return [
        _numbers(results, section, "mean KL, nats a token ↓", mean, "{:.4f}", -1),
        _numbers(results, section, "99th percentile of KL ↓", tail, "{:.3f}", -1),
        _numbers(results, section, "same top token ↑", same, "{:.1%}", 1),
    ]


def _task_row(results: Results, task: str, metric: str) -> Row:
    found = [metric_of(scores, task, metric) for scores in results.models]
    rising = all(value.higher_is_better for value in found if value)
    cells = tuple("" if value is None else _with_error(value) for value in found)
    best = _best(results, [value.value if value else None for value in found], 1 if rising else -1)
    return Row("Tasks", f"{task} {metric} {'↑' if rising else '↓'}", cells, best)


def _with_error(metric: Metric) -> str:
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.4f}")


def _numbers(
    results: Results, section: str, label: str, values: Sequence[float | None], form: str, better: int = 0
) -> Row:
    """A row of numbers; ``better`` is 1 where more is better, -1 where less is, 0 where neither."""
    cells = tuple("" if value is None else form.format(value) for value in values)
    return Row(section, label, cells, _best(results, values, better))


def _best(results: Results, values: Sequence[float | None], better: int) -> frozenset[int]:
    originals = parents(results)
    ranked = {
        index: value * better
        for index, value in enumerate(values)
        if value is not None and results.models[index].subject.name not in originals
    }
    if not better or len(set(ranked.values())) < 2:
        return frozenset()
    top = max(ranked.values())
    return frozenset(index for index, value in ranked.items() if value == top)


def _union(several: Iterable[Iterable[_T]]) -> list[_T]:
    """Every element once, in the order of first appearance."""
    return list(dict.fromkeys(element for elements in several for element in elements))
