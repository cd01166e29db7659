"""The measurements of an evaluation, each a step that an interrupted run need not repeat."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter

from ulbq import distributed, runtime
from ulbq.artifacts import ArtifactWriter
from ulbq.blockwise.streamed import AnyModel, StreamedModel
from ulbq.config.evaluate import EvaluateRequest
from ulbq.data.registry import texts
from ulbq.evaluation import kept
from ulbq.evaluation.evaluated import EvaluatedModel
from ulbq.evaluation.generative import Sample
from ulbq.evaluation.generative_tasks import GenerativeTasks
from ulbq.evaluation.harness import Tasks
from ulbq.evaluation.metrics import METRICS
from ulbq.evaluation.results import ModelScores, WeightSize
from ulbq.evaluation.sizes import weight_size
from ulbq.evaluation.text import text_windows
from ulbq.models.load import loading_memory, model_memory
from ulbq.models.spread import load_spread, room_of
from ulbq.progress import Progress

T = TypeVar("T")

_BESIDE = 1 << 30  # bytes beside a model's weights: a batch's activations and logits


@dataclass(frozen=True)
class Measures:
    """What a request comes to, once its models and data are known.

    Attributes:
        perplexity: names of text sets.
        tasks: loaded tasks of lm-eval's, None for none.
        generative: loaded tasks whose answers models write, None for none.
        prompts: texts to go on from, each once.
        fidelity: text set to compare with the parent on, ``self`` for text that the parent writes, None not to compare.
        context: tokens a window.
        limit: windows a text and documents a task; None: all.
        dtype: what the models compute in.
        device: where.
    """

    perplexity: tuple[str, ...]
    tasks: Tasks | None
    generative: GenerativeTasks | None
    prompts: tuple[str, ...]
    fidelity: str | None
    context: int
    limit: int | None
    dtype: torch.dtype
    device: torch.device


class Measurer:
    """Measures models one after the other.

    Attributes:
        request: what was asked.
        measures: what that comes to.
        progress: told how it goes.
        kept: a folder for what the parent of all models says of the text, so that it is asked once; None for none.
        samples: written answers so far, each with the name of its model.
    """

    def __init__(
        self,
        request: EvaluateRequest,
        measures: Measures,
        writer: ArtifactWriter,
        watch: runtime.Stopwatch,
        progress: Progress,
        kept: Path | None = None,
    ) -> None:
        self.request = request
        self.kept = kept
        self.measures = measures
        self.progress = progress
        self.samples: list[tuple[str, Sample]] = []
        self._writer = writer
        self._watch = watch
        self._said: set[str] = set()

    def measure(self, candidate: EvaluatedModel, *, parent: bool = False) -> ModelScores:
        """Take the metrics of one model. It is loaded only if a step is missing.

        Args:
            candidate: the model.
            parent: whether it is here only because another was made from it.
        """

        @cache
        def model() -> AnyModel:
            with self.progress.phase(f"Loading {candidate.name}"):
                return self.load(candidate)

        every = not parent or self.request.parent_scores
        values: dict[str, Any] = {
            name: value
            for name, metric in METRICS.items()
            if (every or metric.always) and (value := metric.measure(self, candidate, model))
        }
        weights = self._weights(candidate, model) if values else None
        if self.request.prefill_cache and model.cache_info().currsize:
            loaded = model()
            if not isinstance(loaded, StreamedModel) and (held := model_memory(loaded).cache):
                self.progress.note(f"The prefill cache of {candidate.name} takes {held / 1e6:,.0f} MB.")
            del loaded
        model.cache_clear()
        self._forget()
        return ModelScores(subject=candidate.subject, weights=weights, **values)

    def step(self, key: str, kind: type[T], work: Callable[[], T]) -> T:
        """The recorded value of a finished step, else do it and record it."""
        if key in self._writer.journal:
            recorded: T = TypeAdapter(kind).validate_python(self._writer.journal[key])
            return recorded
        with self._watch.phase(key):
            value = work()
        self._writer.record(key, value)
        return value

    def score(
        self, candidate: EvaluatedModel, what: str, kind: type[T], work: Callable[[], T], *, of: Callable[[], Any]
    ) -> T:
        """A step, whose value is kept for later runs where ulbq did not make the model.

        Args:
            candidate: the model.
            what: is measured of it.
            kind: type of the value.
            work: measures it.
            of: all that the value follows from besides the model, its dtype and the kind of device; for JSON.
        """
        return self.step(f"{candidate.name}: {what}", kind, lambda: self._kept(candidate, what, kind, work, of))

    def windows(self, candidate: EvaluatedModel, text: str, limit: int | None, *, bos: bool = False) -> torch.Tensor:
        """A text set in a model's tokens, int64 ``[n, context]``; see :func:`ulbq.evaluation.text.text_windows`."""
        read = texts(text, "test", data_dir=self.request.data_dir, offline=self.request.offline)
        tokenizer = candidate.source.tokenizer()
        return text_windows(read, tokenizer, context=self.measures.context, limit=limit, bos=bos, name=text)

    def load(self, candidate: EvaluatedModel) -> AnyModel:
        """A model as it is measured: whole, or one block at a time where memory has no room for it."""
        options: dict[str, Any] = {
            "dtype": self.measures.dtype,
            "adapter": candidate.adapter,
            "prefill_cache": self.request.prefill_cache,
        }
        if not self._streams(candidate):
            return load_spread(candidate.source, runtime.resolve_devices(self.request.device), **options)
        options |= {"device": self.measures.device, "directory": self._writer.scratch, "progress": self.progress}
        return StreamedModel(candidate.source, **options)

    def _streams(self, candidate: EvaluatedModel) -> bool:
        """Whether a model is streamed, by what was asked or by its size."""
        if self.request.stream is not None:
            return self.request.stream
        needed = loading_memory(candidate.source, self.measures.dtype) + _BESIDE
        free = room_of(runtime.resolve_devices(self.request.device))
        if needed <= free:
            return False
        self.progress.note(
            f"{candidate.name} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free: it is read block by "
            "block (`stream`)."
        )
        return True

    def _weights(self, candidate: EvaluatedModel, model: Callable[[], AnyModel]) -> WeightSize:
        """Recorded like a step, so that a resumed run need not load the model; no work worth a line of its own."""
        key = f"{candidate.name}: weights"
        if key not in self._writer.journal:
            found = self._kept(candidate, "weights", WeightSize, lambda: weight_size(candidate, model()), lambda: None)
            self._writer.record(key, found)
        return WeightSize.model_validate(self._writer.journal[key])

    def _kept(
        self, candidate: EvaluatedModel, what: str, kind: type[T], work: Callable[[], T], of: Callable[[], Any]
    ) -> T:
        if candidate.source.manifest is not None or not self.request.score_cache:
            return work()
        measures = self.measures
        how = {"dtype": str(measures.dtype), "device": measures.device.type, "of": of()}
        name = kept.key({"model": candidate.source.content_hash, "what": what, **how})
        found = distributed.on_main(kept.find, name, kind)
        if found is not None:
            self._note(f"{candidate.name}: scores of an earlier run are taken (`score_cache=False` measures again).")
            return found
        value = work()
        if why := distributed.on_main(kept.keep, name, kind, value):
            self._note(f"Scores of {candidate.name} are not kept for later runs: {why}.")
        return value

    def _note(self, text: str) -> None:
        """Say something once."""
        if text not in self._said:
            self._said.add(text)
            self.progress.note(text)

    def _forget(self) -> None:
        """Give the memory of models that nobody holds any more back at once; their modules refer to each other."""
        gc.collect()
        if self.measures.device.type == "cuda":
            torch.cuda.empty_cache()
