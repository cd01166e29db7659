"""What an evaluation found, as values: the one shape that the manifest, ``results.json`` and the report share."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ulbq.artifacts import EvaluationManifest
from ulbq.errors import InputError

WITHOUT_ADAPTER = "without adapter"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Perplexity(_Value):
    """Perplexity over the windows of one text.

    Attributes:
        value: ``exp`` of the mean negative log-likelihood, in nats, of every predicted token.
        windows: non-overlapping windows scored.
        context: tokens a window.
        tokens: predicted tokens, ``windows * (context - 1)``.
    """

    value: float
    windows: int
    context: int
    tokens: int


class Fidelity(_Value):
    """How far a model's next-token distributions lie from its parent's.

    Attributes:
        text: what was read: a text set's name, or ``self`` for text that the parent wrote itself.
        tokens: positions compared.
        mean_kl: mean of ``KL(parent || model)``, nats per token.
        p99_kl: its 99th percentile, nats.
        top1_agreement: share of positions at which both rank the same token first.
    """

    text: str
    tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float


class Measured(_Value):
    """One number, as a task's accuracy.

    Attributes:
        stderr: its standard error, where it has one.
        chance: what guessing would give, where a task names the answers to choose from.
    """

    value: float
    stderr: float | None = None
    chance: float | None = None
    higher_is_better: bool

    @property
    def text(self) -> str:
        """As people read it: ``0.6120 ± 0.0114``."""
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")

    @property
    def better(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.higher_is_better else -1


class Writing(_Value):
    """How the answers of a task that is not lm-eval's came about; all are greedy.

    Attributes:
        template: how the questions were laid out, see :mod:`ulbq.data.prompts`.
        new_tokens: longest answer, in tokens.
        unanswered: texts in which the task's rule found no answer at all; they count as wrong.
    """

    template: str
    new_tokens: int
    unanswered: int


class TaskScore(_Value):
    """Scores of one task or group.

    Attributes:
        metrics: by name, in the task's own order; ``exact_match,strict`` where a filter other than ``none`` made it.
        samples: documents scored.
        fewshot: examples in the prompt.
        version: the task's version, as lm-eval records it; scores of different versions do not compare.
        member_of: the group whose aggregate already tells this score.
        writing: how the answers came about; None for lm-eval's tasks.
    """

    metrics: dict[str, Measured]
    samples: int
    fewshot: int
    version: str
    member_of: str | None = None
    writing: Writing | None = None


class Subject(_Value):
    """A model that was measured.

    Attributes:
        name: short name, unique within one evaluation.
        path: where it was read from, as the user gave it.
        kind: ``model``, ``quantized`` or ``converted``.
        method: the quantization method, such as ``db-llm``.
        scheme: the format's short name, such as ``w2g64``; else what a quantized source is, such as
            ``GGUF Q4_1``.
        bits_per_weight: exact stored bits per quantized weight, those of the adapter too where it was scored; of a
            GGUF file, per weight of all matrices; of folders that others quantized, of the packed ones.
        adapter: such as ``LoRA rank 16``; :data:`WITHOUT_ADAPTER` where the base was scored without the adapter that
            it has; None where it has none.
        parent: name of the full-precision parent, where it was measured too or compared with.
    """

    name: str
    path: str
    kind: Literal["model", "quantized", "converted"]
    method: str | None = None
    scheme: str | None = None
    bits_per_weight: float | None = None
    adapter: str | None = None
    parent: str | None = None


class WeightSize(_Value):
    """The room that a model's weights take, those of its adapter too where it was measured with it.

    Attributes:
        on_disk: bytes of the files that hold them.
        in_memory: bytes of the loaded model's parameters and buffers, packed ones in the layout that products take.
        gguf_types: of the tensors in a GGUF file, such as ``Q4_1``, those that take the most bytes first; else empty.
    """

    on_disk: int
    in_memory: int
    gguf_types: tuple[str, ...] = ()


class Continuation(_Value):
    """What a model wrote on from a prompt, greedily, and how fast it decodes.

    Attributes:
        prompt: what it went on from.
        template: how that was laid out, see :mod:`ulbq.data.prompts`; None: as bare text.
        text: what was written, without the prompt.
        new_tokens: how many tokens that took; one that ended the text counts.
        timed_tokens: tokens decoded one after the other in a second go, ends of text passed over.
        tokens_per_second: of these, those after the first; None where there was one only.
        device: its name, and the number of threads on a CPU.
    """

    prompt: str
    template: str | None
    text: str
    new_tokens: int
    timed_tokens: int
    tokens_per_second: float | None
    device: str


class ModelScores(_Value):
    """Everything measured of one model: a field for each of :data:`ulbq.evaluation.metrics.METRICS` by its name.

    Metrics that have no field here keep numbers by their labels.

    Attributes:
        weights: None in results of before they were measured.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, dict[str, Measured]] = Field(init=False)

    subject: Subject
    weights: WeightSize | None = None
    perplexity: dict[str, Perplexity] = {}
    fidelity: Fidelity | None = None
    tasks: dict[str, TaskScore] = {}
    continuations: tuple[Continuation, ...] = ()

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding after all prompts together; None where nothing was timed."""
        timed = [one for one in self.continuations if one.tokens_per_second is not None]
        seconds = sum((one.timed_tokens - 1) / one.tokens_per_second for one in timed if one.tokens_per_second)
        return sum(one.timed_tokens - 1 for one in timed) / seconds if seconds else None

    @property
    def scored(self) -> bool:
        """Whether any metric was taken."""
        return any(value for name, value in self if name not in ("subject", "weights"))

    @property
    def task_metrics(self) -> Iterator[tuple[str, str, TaskScore, Measured]]:
        """Task, metric and their scores, but for members of lm-eval's groups, which the group's own sums up.

        The few members of a group with written answers are among them, as published tables show them.
        """
        for task, score in self.tasks.items():
            if score.member_of is None or score.writing is not None:
                for metric, found in score.metrics.items():
                    yield task, metric, score, found


class Protocol(_Value):
    """The settings that scores depend on; scores taken under different ones do not compare.

    Attributes:
        context: tokens a window of text.
        limit: windows a text and documents a task; None: all.
        fewshot: examples in a task's prompt; None: as the task says.
        dtype: what the models computed in.
        seed: of text that a parent wrote itself.
        template: how the questions of tasks with written answers, and prompts, are laid out; None: questions as each
            model was taught, prompts as bare text.
        max_new_tokens: longest written text; None: of an answer as each task says, after a prompt 32.
    """

    context: int
    limit: int | None
    fewshot: int | None
    dtype: str
    seed: int
    template: str | None = None
    max_new_tokens: int | None = None


class Results(_Value):
    """The scores of one or more models under one protocol; full-precision parents come first."""

    protocol: Protocol
    models: tuple[ModelScores, ...]

    @property
    def parents(self) -> set[str]:
        """Names of the models that others were made from."""
        return {scores.subject.parent for scores in self.models if scores.subject.parent is not None}


def read_results(path: str, manifest: EvaluationManifest) -> Results:
    """The results of a finished evaluation. Raises InputError for those of another version; ``path`` names it."""
    try:
        return Results.model_validate(manifest.results)
    except ValidationError as error:
        raise InputError(
            f"The scores in '{path}' have another shape than this version of ulbq writes.",
            hint="Evaluate the model again.",
        ) from error
