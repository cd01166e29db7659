"""The values that manifests are made of."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ulbq import limits

Count = Annotated[int, Field(ge=0, le=limits.COUNT)]
"""Of bits, bytes, weights, steps and the like."""

Size = Annotated[int, Field(ge=1, le=limits.COUNT)]
"""Of one side of a matrix."""

Seconds = Annotated[float, Field(ge=0, le=limits.LONGEST)]

_LARGEST_EXPONENT = 700.0  # of e in a float

_NOT_WEIGHTS = frozenset({"embeddings", "other"})


class Record(BaseModel):
    """A frozen value whose JSON says ``"NaN"`` and ``"Infinity"`` where JSON itself has no word."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class FileEntry(Record):
    """One file of an artifact.

    Attributes:
        size: bytes.
        sha256: hex digest of the bytes.
    """

    size: Count
    sha256: str


class Parent(Record):
    """What an artifact was made from.

    Attributes:
        kind: ``folder``, ``gguf`` or ``hub`` for a model source, else the kind of the parent artifact.
        name: short name for people.
        path: as the user gave it.
        sha256: the manifest digest of an artifact, the content hash of a model source.
        absolute: where that was; empty for a model of the Hub, and in older artifacts.
        relative: the same, seen from the artifact.
    """

    kind: str
    name: str
    path: str
    sha256: str
    absolute: str = ""
    relative: str = ""


class BlockRecord(Record):
    """How one block trained.

    Attributes:
        start_error: loss of the closed-form start on held-out samples.
        end_error: the same loss of what was stored.
        steps: optimiser steps of the run that was kept.
        retries: how often the block was rolled back and tried again at a lower rate.
        fallback: whether the closed-form start was stored because no training improved on it.
        spurious_sinks: held-out tokens that the stored block turns into attention sinks, which they are not in full
            precision.
        seconds: wall time.
    """

    index: Count
    start_error: float
    end_error: float
    steps: Count
    retries: Count = 0
    fallback: bool = False
    spurious_sinks: Count = 0
    seconds: Seconds


def sinks_sentence(blocks: Sequence[BlockRecord]) -> str:
    """What to say of spurious attention sinks; empty where there are none."""
    found = [block for block in blocks if block.spurious_sinks]
    if not found:
        return ""
    most = max(block.spurious_sinks for block in found)
    where = f"block {found[0].index}" if len(found) == 1 else f"blocks {found[0].index} to {found[-1].index}"
    what = "1 held-out token turns" if most == 1 else f"up to {most} held-out tokens turn"
    return f"In {where} {what} into attention sinks, which they are not in full precision."


class SweepRun(Record):
    """One run of a sweep; its scores are in the sweep's results, by its name.

    Attributes:
        name: of its folder below ``runs``, and of its model in the results.
        setting: what all runs are called that differ in their seeds alone.
        options: what was asked of it, by the names that recipes have for it.
        scheme: short name of its format, such as ``w2g64``.
        bits: true bits a quantized weight, those of an adapter too.
        weights: how many are quantized.
        size: bytes of all stored weights.
        seconds: wall time of all phases; of the last part alone where ``resumed``.
        peak_memory: bytes of resident memory.
        resumed: whether it was stopped and went on.
        errors: of each block's layers, the mean squared difference from the original weights, relative to these; 0 for
            a block none of which is quantized.
    """

    name: str
    setting: str
    seed: int
    options: dict[str, Any]
    method: str
    scheme: str
    bits: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    weights: Count
    size: Count
    seconds: Seconds
    peak_memory: Count
    resumed: bool = False
    errors: tuple[float, ...] = ()


class ExpertsRecord(Record):
    """How many tokens of the calibration went to each expert of a mixture.

    Attributes:
        name: full name of the module.
        tokens: by the expert's number.
    """

    name: str
    tokens: tuple[Count, ...] = Field(min_length=1)

    @property
    def unseen(self) -> int:
        """Experts that saw none."""
        return self.tokens.count(0)


def experts_sentence(mixtures: Sequence[ExpertsRecord]) -> str:
    """What to say of experts that no token went to; empty where there are none."""
    found = [mixture for mixture in mixtures if mixture.unseen]
    if not found:
        return ""
    worst = max(found, key=lambda mixture: mixture.unseen)
    where = f"In '{worst.name}'" if len(found) == 1 else f"In {len(found)} of {len(mixtures)} mixtures up to"
    return (
        f"{where} {worst.unseen} of {len(worst.tokens)} experts saw no token of the calibration: what the others saw "
        "stands in for it."
    )


class EndToEndRecord(Record):
    """How the whole model trained after its blocks.

    Attributes:
        loss: ``ce``, ``kl``, ``ce-kl``, ``kl-hidden`` or ``dad``.
        data: of the text, as the calibration's; empty where it was the calibration's.
        start_error: loss of the blocks' result on held-out samples.
        end_error: the same loss of what was stored.
        epochs: number of the epoch that was stored; 0 where none improved on the start.
        steps: optimiser steps of all epochs.
        finite: whether losses and gradients always were.
        seconds: wall time of the epochs.
    """

    loss: str
    data: dict[str, Any] = {}
    start_error: float
    end_error: float
    epochs: Count
    steps: Count
    finite: bool = True
    seconds: Seconds


class FinetuneRecord(Record):
    """How a packed model learnt a task.

    Attributes:
        task: the recipe's name.
        template: how questions were laid out, and are to be asked; None for plain text.
        data: sources, samples, heldout, tokens, taught_tokens, seed and SHA-256 of what it learnt from.
        train: ``adapter`` or ``adapter-scales``.
        start: ``trained`` where the adapter went on from the artifact's own, ``fresh`` where it began as no change.
        parameters: how many trained.
        epochs: passes over the samples.
        steps: optimiser steps.
        start_loss: of the held-out answers before, nats a token.
        end_loss: the same of what is stored.
        losses: training loss by step; where there are many, means of equal runs of steps, at their last.
        evaluations: held-out loss by step, the start (step 0) and the end among them.
        seconds: wall time of the training.
    """

    task: str
    template: str | None
    data: dict[str, Any]
    train: str
    start: str
    parameters: Count
    epochs: Count
    steps: Count
    start_loss: float
    end_loss: float
    losses: tuple[tuple[Count, float], ...]
    evaluations: tuple[tuple[Count, float], ...]
    seconds: Seconds

    @property
    def start_perplexity(self) -> float:
        """Of the held-out answers before."""
        return math.exp(min(self.start_loss, _LARGEST_EXPONENT))

    @property
    def end_perplexity(self) -> float:
        """Of the held-out answers with what is stored."""
        return math.exp(min(self.end_loss, _LARGEST_EXPONENT))


class TemperatureRecord(Record):
    """The factor of the logits that was fitted to the full-precision model's predictions.

    Attributes:
        factor: one over the temperature; 1 where none was better.
        vectors: full names of the tensors that are stored multiplied by it: the last norm's.
        start_error: mean KL divergence from the full-precision model's predictions on held-out samples, nats a token.
        end_error: the same with the factor.
    """

    factor: float
    vectors: tuple[str, ...]
    start_error: float
    end_error: float


class RotationRecord(Record):
    """How a model's weights were rotated before they were quantized; its function is that of the original.

    Attributes:
        seed: of the signs.
        residual: the matrix that the residual stream was rotated by, ``Hadamard 576 = 12·12·4``.
        values: the matrix that the values of every attention head were rotated by.
    """

    seed: int
    residual: str
    values: str

    @property
    def label(self) -> str:
        """In words: ``residual stream (Hadamard 64), values (Hadamard 16 a head), seed 0``."""
        return f"residual stream ({self.residual}), values ({self.values}), seed {self.seed}"


class LayerRecord(Record):
    """One packed linear layer.

    Attributes:
        shape: ``(out_features, in_features)``.
        scheme: the scheme's JSON object.
        bits: stored bits by role (``codes``, ``scales``, ``zeros``, …).
        error: squared error of the weight relative to its squared norm.
        sparsity: share of zeros in each of two planes, where the format has planes that skip zeros.
    """

    name: str
    shape: tuple[Size, Size]
    scheme: dict[str, Any]
    bits: dict[str, Count]
    error: float
    sparsity: tuple[float, float] | None = None


class KeptRecord(Record):
    """Modules that stay in full precision, those that differ in numbers of their names alone together.

    Attributes:
        name: full name, with ``*`` for what counts blocks and experts; of what lies outside the blocks, the part that
            it belongs to.
        modules: how many.
        weights: values of their matrices.
        why: in a few words.
    """

    name: str
    modules: Count
    weights: Count
    why: str

    @property
    def words(self) -> str:
        """``24 × model.layers.*.mlp.gate (0.4 M weights): decides who is called``."""
        times = f"{self.modules} × " if self.modules > 1 else ""
        return f"{times}{self.name} ({self.weights / 1e6:,.1f} M weights): {self.why}"


class Coverage(Record):
    """How much of a model is quantized, in values. Every tied tensor counts once.

    Attributes:
        quantized: weights of the packed layers.
        in_blocks: all values inside the blocks, norms and biases included.
        embeddings: of embeddings and head.
        embedding_bits: of each of these, stored; None where they stay in half precision.
        total: all values that are stored in full precision or packed, what is only carried along included.
        bits: stored bits of all of them, for each of ``total``; in a plan, as foreseen.
        kept: what stays in full precision, the largest first; embeddings, norms and biases are not named.
    """

    quantized: Size
    in_blocks: Size
    embeddings: Count
    embedding_bits: Annotated[float, Field(ge=0)] | None = None
    total: Size
    bits: Annotated[float, Field(ge=0)]
    kept: tuple[KeptRecord, ...] = ()

    @property
    def share_in_blocks(self) -> float:
        """Quantized share of the blocks."""
        return self.quantized / self.in_blocks

    @property
    def words(self) -> str:
        """``Quantized 106.2 of 134.5 M weights (78.9 %), 5.3 bits a parameter over all; …``."""
        packed = "" if self.embedding_bits is None else f", at {self.embedding_bits:.2f} bits"
        return (
            f"Quantized {self.quantized / 1e6:,.1f} of {self.total / 1e6:,.1f} M weights "
            f"({self.quantized / self.total:.1%}), {self.bits:.2f} bits a parameter over all; "
            f"{self.share_in_blocks:.1%} of those in the blocks, embeddings and head are "
            f"{self.embeddings / self.total:.1%} of all{packed}"
        )


class BitsReport(Record):
    """Where the stored bits of a model went.

    Attributes:
        parts: bits by part; ``embeddings`` and ``other`` (norms, biases, …) stand apart from the quantized weights.
        weights: number of weights in the quantized linear layers.
    """

    parts: dict[str, Count]
    weights: Size

    @property
    def bits_per_weight(self) -> float:
        """True bits per quantized weight: codes, scales, zeros, adapter and whatever else decodes them."""
        return sum(bits for part, bits in self.parts.items() if self.counts(part)) / self.weights

    @staticmethod
    def counts(part: str) -> bool:
        """Whether a part belongs to the quantized weights."""
        return part not in _NOT_WEIGHTS

    def of_all(self, coverage: Coverage) -> Coverage:
        """What is told of the whole model, with the bits that are stored."""
        return coverage.model_copy(update={"bits": sum(self.parts.values()) / coverage.total})
