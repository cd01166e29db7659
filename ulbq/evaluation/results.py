"""What an evaluation found, as values: the one shape that the manifest, ``results.json`` and the report share."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

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


class Metric(_Value):
    """One metric of one task; ``stderr`` is its standard error, where it has one."""

    value: float
    stderr: float | None
    higher_is_better: bool


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

    metrics: dict[str, Metric]
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
        scheme: the format's short name, such as ``w2g64``; of a GGUF file that is no full-precision model, the type of
            most of its weights, such as ``Q4_1``.
        bits_per_weight: exact stored bits per quantized weight, those of the adapter too where it was scored; of a
            GGUF file, per weight of all matrices.
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


class ModelScores(_Value):
    """Everything measured of one model."""

    subject: Subject
    perplexity: dict[str, Perplexity] = {}
    fidelity: Fidelity | None = None
    tasks: dict[str, TaskScore] = {}


class Protocol(_Value):
    """The settings that scores depend on; scores taken under different ones do not compare.

    Attributes:
        context: tokens a window of text.
        limit: windows a text and documents a task; None: all.
        fewshot: examples in a task's prompt; None: as the task says.
        dtype: what the models computed in.
        seed: of text that a parent wrote itself.
        template: how the questions of tasks with written answers are laid out; None: as each model was taught.
        max_new_tokens: longest written answer; None: as each task says.
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
