"""The kinds of scores, and how they are computed and stored."""

from dataclasses import dataclass

from ulbq.config.saliency import SaliencyDtype, SaliencyKind
from ulbq.training.precision import Precision

KINDS: dict[SaliencyKind, str] = {
    "fisher": "sum over sequences of the squared gradient of a sequence's mean cross-entropy",
    "gradient": "mean over sequences of the absolute gradient of a sequence's mean cross-entropy",
    "hessian": "diagonal of XᵀX: the summed squares of each column's input",
    "wanda": "|W| · ‖x‖₂, the norm of each column's input over all tokens",
    "magnitude": "|W|",
}
"""What the scores of each kind are, in words."""

BACKWARD = frozenset({"fisher", "gradient"})
"""Kinds that need the gradient of the loss."""


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """How samples pass the blocks.

    Attributes:
        precision: of the matrix products; everything that is summed is float32 or wider.
        batch_size: sequences at once on the way forward. Backward, each goes by itself, as its gradient is squared.
        activation_memory: bytes of activations that may stay in memory.
    """

    precision: Precision
    batch_size: int = 4
    activation_memory: int = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class SaliencySettings(PassSettings):
    """How scores are computed and stored.

    Attributes:
        kind: see :data:`KINDS`; ``hessian`` has one score a column, ``magnitude`` needs no data.
        dtype: of the stored values.
    """

    kind: SaliencyKind
    dtype: SaliencyDtype = "bf16"
