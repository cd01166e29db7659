"""The values that manifests are made of."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

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

    size: int
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
        seconds: wall time.
    """

    index: int
    start_error: float
    end_error: float
    steps: int
    retries: int = 0
    fallback: bool = False
    seconds: float


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
    epochs: int
    steps: int
    finite: bool = True
    seconds: float


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
    parameters: int
    epochs: int
    steps: int
    start_loss: float
    end_loss: float
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]
    seconds: float

    @property
    def start_perplexity(self) -> float:
        """Of the held-out answers before."""
        return math.exp(self.start_loss)

    @property
    def end_perplexity(self) -> float:
        """Of the held-out answers with what is stored."""
        return math.exp(self.end_loss)


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
    shape: tuple[int, int]
    scheme: dict[str, Any]
    bits: dict[str, int]
    error: float
    sparsity: tuple[float, float] | None = None


class BitsReport(Record):
    """Where the stored bits of a model went.

    Attributes:
        parts: bits by part; ``embeddings`` and ``other`` (norms, biases, …) stand apart from the quantized weights.
        weights: number of weights in the quantized linear layers.
    """

    parts: dict[str, int]
    weights: int = Field(gt=0)

    @property
    def bits_per_weight(self) -> float:
        """True bits per quantized weight: codes, scales, zeros, adapter and whatever else decodes them."""
        return sum(bits for part, bits in self.parts.items() if self.counts(part)) / self.weights

    @staticmethod
    def counts(part: str) -> bool:
        """Whether a part belongs to the quantized weights."""
        return part not in _NOT_WEIGHTS
