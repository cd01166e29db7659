"""Runs a model on tasks whose answers it writes, and scores what it wrote."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from ulbq.config.run import Template
from ulbq.data.prompts import next_question, prompt_tokens
from ulbq.evaluation.answers import is_right
from ulbq.evaluation.generative_tasks import LoadedGroup, LoadedTask
from ulbq.evaluation.lm import LanguageModel
from ulbq.evaluation.results import Measured, TaskScore, Writing
from ulbq.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ulbq.blockwise.streamed import AnyModel

METRIC = "exact_match"
KEPT = 20
"""Samples of each task and model that an evaluation keeps for people to look at."""

_VERSION = "1"
# Nothing of a model's own settings for sampling has a say in greedy decoding.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


class Sample(BaseModel):
    """One answer, for people to look at.

    Attributes:
        task: the task's name.
        prompt: what the model was asked, special tokens and all.
        text: what it wrote, up to the next question.
        extracted: the answer that the task's rule found in it; None for none.
        expected: the answer that counts as right.
        right: whether the extracted one does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    prompt: str
    text: str
    extracted: float | str | None
    expected: float | str
    right: bool


class Answered(BaseModel):
    """A task's score, and its first :data:`KEPT` samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: TaskScore
    samples: tuple[Sample, ...]


def run_generative(
    model: "AnyModel",
    tokenizer: "PreTrainedTokenizerBase",
    loaded: LoadedTask,
    *,
    template: Template,
    new_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "the model",
) -> Answered:
    """Score a model on one task: greedy answers, read by the task's rule, right or wrong.

    Args:
        model: in eval mode, on its device.
        tokenizer: the model's own.
        loaded: the task and its questions.
        template: how the questions are laid out.
        new_tokens: longest answer in tokens; None: as the task says.
        batch_size: answers written side by side; None: see :func:`ulbq.evaluation.text.sequences_per_batch`. On what
            it changes, see :meth:`LanguageModel.write_after`.
        progress: told about every batch.
        label: what the progress calls the model.

    Raises:
        UsageError: the tokenizer lacks the chat template, or the model's longest input has no room for the answer.
        InputError: the chat template refuses a question.
        ResourceError: the device has no memory for a single answer.
    """
    task, documents = loaded.task, loaded.documents
    most = new_tokens or task.new_tokens
    rows = [prompt_tokens(template, one.question, tokenizer, where=one.where) for one in documents]
    lm = LanguageModel(model, tokenizer, batch_size=batch_size, progress=progress, label=f"{label} to {task.name}")
    cut = sum(len(row) > lm.max_length - most for row in rows)
    if cut:
        lm.progress.note(
            f"Of {task.name}, {cut} of {len(rows)} prompts lose their beginning: the model holds {lm.max_length:,} "
            f"tokens, the answer's {most} among them."
        )
    stops = next_question(template)
    written = lm.write_after(rows, stops=stops, new_tokens=most, sampling=_GREEDY)
    samples = []
    for document, row, whole in zip(documents, rows, written, strict=True):
        text = _before(whole, stops)
        found = task.rule.find(text)
        samples.append(
            Sample(
                task=task.name,
                prompt=str(tokenizer.decode(row)),
                text=text,
                extracted=found,
                expected=document.expected,
                right=is_right(found, document.expected),
            )
        )
    chances = [task.rule.chance(one.question) for one in documents]
    known = [chance for chance in chances if chance is not None]
    score = _score(samples, template, most, fmean(known) if known else None)
    return Answered(score=score, samples=tuple(samples[:KEPT]))


def with_groups(scores: Mapping[str, TaskScore], groups: Sequence[LoadedGroup]) -> dict[str, TaskScore]:
    """The scores with those of groups before them: the plain mean of the members, large ones and small ones alike.

    A group's standard error is that of a mean of independent scores; its version names how many of its members were
    at hand where some were not, because such means do not compare.
    """
    found: dict[str, TaskScore] = {}
    for group in groups:
        members = [scores[name] for name in group.members]
        found[group.name] = _mean(group, members)
        found |= {
            name: score.model_copy(update={"member_of": group.name})
            for name, score in zip(group.members, members, strict=True)
        }
    return found | {name: score for name, score in scores.items() if name not in found}


def _before(text: str, stops: Sequence[str]) -> str:
    """A text up to where it first holds one of the stop sequences."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _score(samples: Sequence[Sample], template: Template, new_tokens: int, chance: float | None) -> TaskScore:
    count = len(samples)
    share = sum(sample.right for sample in samples) / count
    # The standard error of the mean of count zeros and ones, as lm-eval takes it.
    error = sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return TaskScore(
        metrics={METRIC: Measured(value=share, stderr=error, chance=chance, higher_is_better=True)},
        samples=count,
        fewshot=0,
        version=_VERSION,
        writing=Writing(
            template=template, new_tokens=new_tokens, unanswered=sum(sample.extracted is None for sample in samples)
        ),
    )


def _mean(group: LoadedGroup, members: Sequence[TaskScore]) -> TaskScore:
    metrics, writings = [score.metrics[METRIC] for score in members], [score.writing for score in members]
    errors = [metric.stderr for metric in metrics]
    known = [error for error in errors if error is not None]
    chances = [metric.chance for metric in metrics if metric.chance is not None]
    whole = len(group.members) + len(group.missing)
    return TaskScore(
        metrics={
            METRIC: Measured(
                value=sum(metric.value for metric in metrics) / len(metrics),
                stderr=sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None,
                chance=fmean(chances) if len(chances) == len(metrics) else None,
                higher_is_better=True,
            )
        },
        samples=sum(score.samples for score in members),
        fewshot=0,
        version=_VERSION if not group.missing else f"{_VERSION}, {len(group.members)} of {whole} sets",
        writing=Writing(
            template=next(writing.template for writing in writings if writing),
            new_tokens=max(writing.new_tokens for writing in writings if writing),
            unanswered=sum(writing.unanswered for writing in writings if writing),
        ),
    )
