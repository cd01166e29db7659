"""The measurements of an evaluation, each a step that an interrupted run need not repeat."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from ulbq import distributed, runtime
from ulbq.artifacts import ArtifactWriter
from ulbq.config.run import Template
from ulbq.data.generate import self_samples
from ulbq.data.registry import TEXT_SETS, texts
from ulbq.evaluation.continuations import NEW_TOKENS, continue_prompts
from ulbq.evaluation.fidelity import fidelity
from ulbq.evaluation.harness import Tasks, run_tasks
from ulbq.evaluation.perplexity import perplexity
from ulbq.evaluation.results import Continuation, Fidelity, ModelScores, Perplexity, TaskScore, WeightSize
from ulbq.evaluation.sizes import weight_size
from ulbq.evaluation.subjects import Candidate
from ulbq.evaluation.text import text_windows
from ulbq.evaluation.written import Answered, Sample, run_written, with_groups
from ulbq.evaluation.written_tasks import LoadedTask, Written
from ulbq.models.load import load_model, model_memory
from ulbq.progress import Progress

FIDELITY_WINDOWS = 8  # eight thousand positions at the usual context: the mean KL is then known to a few per cent
ENDLESS_WINDOWS = 256  # of a set too large to read whole, where no limit is given; GPTQ's number for C4
_OWN_WINDOWS, _OWN_LENGTH = 16, 128  # of text that the parent writes itself, a forward pass a token for all at once

T = TypeVar("T")


@dataclass(frozen=True)
class Measures:
    """What is measured, and how.

    Attributes:
        perplexity: names of text sets.
        tasks: loaded tasks of lm-eval's, None for none.
        written: loaded tasks whose answers models write, None for none.
        prompts: texts to go on from.
        template: how questions and prompts are laid out; None: questions as each model was taught, prompts bare.
        max_new_tokens: longest written text; None: of an answer as each task says, after a prompt 32.
        fidelity: text set to compare with the parent on, ``self`` for text that the parent writes, None not to compare.
        context: tokens a window.
        limit: windows a text and documents a task; None: all.
        batch_size: sequences a batch; None: as many as memory takes.
        dtype: what the models compute in.
        prefill_cache: keep dense copies of packed weights.
        device: where.
        seed: of text that the parent writes.
        data_dir, offline: where text comes from.
    """

    perplexity: tuple[str, ...]
    tasks: Tasks | None
    written: Written | None
    prompts: tuple[str, ...]
    template: Template | None
    max_new_tokens: int | None
    fidelity: str | None
    context: int
    limit: int | None
    batch_size: int | None
    dtype: torch.dtype
    prefill_cache: bool
    device: torch.device
    seed: int
    data_dir: Path | None
    offline: bool


class Measurer:
    """Measures models one after the other. Two are in memory together only while their predictions are compared.

    Attributes:
        samples: written answers so far, each with the name of its model.
    """

    def __init__(
        self, measures: Measures, writer: ArtifactWriter, watch: runtime.Stopwatch, progress: Progress
    ) -> None:
        self._measures = measures
        self._writer = writer
        self._watch = watch
        self._progress = progress
        self.samples: list[tuple[str, Sample]] = []

    def measure(self, candidate: Candidate, *, with_perplexity: bool = True, with_tasks: bool = True) -> ModelScores:
        """Take the scores of one model; fidelity too where it has a parent. It is loaded only if a step is missing.

        Prompts are continued whatever else is measured: a child's text says little without its parent's.
        """
        measures, name = self._measures, candidate.name

        @cache
        def model() -> PreTrainedModel:
            with self._progress.phase(f"Loading {name}"):
                return self._load(candidate)

        def on_text(text: str) -> Perplexity:
            key = f"{name}: perplexity on {text}"
            return self._step(key, Perplexity, lambda: self._perplexity(candidate, model(), text))

        perplexities = {text: on_text(text) for text in measures.perplexity} if with_perplexity else {}
        scores: dict[str, TaskScore] = {}
        if measures.tasks is not None and with_tasks:
            tasks = measures.tasks
            scores = self._step(f"{name}: tasks", dict[str, TaskScore], lambda: self._tasks(candidate, model(), tasks))
        if measures.written is not None and with_tasks:
            answered = {one.task.name: self._answered(candidate, model, one) for one in measures.written.tasks}
            scores |= with_groups(answered, measures.written.groups)
        compared: Fidelity | None = None
        if measures.fidelity is not None and candidate.parent is not None:
            parent, text = candidate.parent, measures.fidelity
            compared = self._step(
                f"{name}: fidelity on {text}", Fidelity, lambda: self._fidelity(candidate, model(), parent, text)
            )
        words: tuple[Continuation, ...] = ()
        if measures.prompts:
            words = self._step(
                f"{name}: prompts", tuple[Continuation, ...], lambda: self._continuations(candidate, model())
            )
        measured = bool(perplexities or scores or compared or words)
        weights = self._weights(candidate, model) if measured else None
        if measures.prefill_cache and model.cache_info().currsize and (held := model_memory(model()).cache):
            self._progress.note(f"The prefill cache of {name} takes {held / 1e6:,.0f} MB.")
        model.cache_clear()
        self._forget()
        return ModelScores(
            subject=candidate.subject,
            weights=weights,
            perplexity=perplexities,
            fidelity=compared,
            tasks=scores,
            continuations=words,
        )

    def _step(self, key: str, kind: type[T], work: Callable[[], T]) -> T:
        """The recorded value of a finished step, else do it and record it."""
        if key in self._writer.journal:
            recorded: T = TypeAdapter(kind).validate_python(self._writer.journal[key])
            return recorded
        with self._watch.phase(key):
            value = work()
        self._writer.record(key, value)
        return value

    def _perplexity(self, candidate: Candidate, model: PreTrainedModel, text: str) -> Perplexity:
        measures = self._measures
        endless = ENDLESS_WINDOWS if TEXT_SETS[text].endless else None
        windows = self._windows(candidate, text, measures.limit or endless)
        label = f"Perplexity of {candidate.name} on {text}"
        return perplexity(model, windows, batch_size=measures.batch_size, progress=self._progress, label=label)

    def _tasks(self, candidate: Candidate, model: PreTrainedModel, tasks: Tasks) -> dict[str, TaskScore]:
        measures = self._measures
        return run_tasks(
            model,
            candidate.source.tokenizer(),
            tasks,
            limit=measures.limit,
            batch_size=measures.batch_size,
            progress=self._progress,
            label=candidate.name,
        )

    def _answered(self, candidate: Candidate, model: Callable[[], PreTrainedModel], loaded: LoadedTask) -> TaskScore:
        measures, name = self._measures, candidate.name

        def answer() -> Answered:
            return run_written(
                model(),
                candidate.source.tokenizer(),
                loaded,
                template=measures.template or candidate.template,
                new_tokens=measures.max_new_tokens,
                batch_size=measures.batch_size,
                progress=self._progress,
                label=name,
            )

        found = self._step(f"{name}: {loaded.task.name}", Answered, answer)
        self.samples += [(name, sample) for sample in found.samples]
        return found.score

    def _fidelity(self, candidate: Candidate, model: PreTrainedModel, parent: Candidate, text: str) -> Fidelity:
        measures = self._measures
        original = self._load(parent)
        read = "its parent's text" if text == "self" else text
        most = _OWN_WINDOWS if text == "self" else FIDELITY_WINDOWS
        count = min(measures.limit or most, most)
        if text == "self":
            length = min(measures.context, _OWN_LENGTH)
            # One process writes for all: each word hangs on those before it.
            written = distributed.on_main(
                self_samples,
                original,
                parent.source.tokenizer(),
                samples=count,
                length=length,
                seed=measures.seed,
                # Long texts, as people read them, and the parent's own distribution.
                text_length=None,
                progress=self._progress,
            )
            windows = written.tokens
        else:
            windows = self._windows(parent, text, count, bos=True)
        return fidelity(
            model,
            original,
            windows,
            text=text,
            batch_size=measures.batch_size,
            progress=self._progress,
            label=f"Fidelity of {candidate.name} on {read}",
        )

    def _continuations(self, candidate: Candidate, model: PreTrainedModel) -> tuple[Continuation, ...]:
        measures = self._measures
        # One process writes for all: each word hangs on those before it.
        return distributed.on_main(
            continue_prompts,
            model,
            candidate.source.tokenizer(),
            measures.prompts,
            template=measures.template,
            new_tokens=measures.max_new_tokens or NEW_TOKENS,
            progress=self._progress,
            label=candidate.name,
        )

    def _weights(self, candidate: Candidate, model: Callable[[], PreTrainedModel]) -> WeightSize:
        """Recorded like a step, so that a resumed run need not load the model; no work worth a line of its own."""
        key = f"{candidate.name}: weights"
        if key not in self._writer.journal:
            self._writer.record(key, weight_size(candidate, model()))
        return WeightSize.model_validate(self._writer.journal[key])

    def _windows(self, candidate: Candidate, text: str, limit: int | None, *, bos: bool = False) -> torch.Tensor:
        measures = self._measures
        read = texts(text, "test", data_dir=measures.data_dir, offline=measures.offline)
        return text_windows(
            read, candidate.source.tokenizer(), context=measures.context, limit=limit, bos=bos, name=text
        )

    def _load(self, candidate: Candidate) -> PreTrainedModel:
        measures = self._measures
        return load_model(
            candidate.source,
            dtype=measures.dtype,
            device=measures.device,
            adapter=candidate.adapter,
            prefill_cache=measures.prefill_cache,
        )

    def _forget(self) -> None:
        """Give the memory of models that nobody holds any more back at once; their modules refer to each other."""
        gc.collect()
        if self._measures.device.type == "cuda":
            torch.cuda.empty_cache()
