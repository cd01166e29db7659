"""What ``quantize`` is asked to do, and what that means in full."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ulbq import runtime
from ulbq.errors import UsageError
from ulbq.formats import AffineScheme, DualBinaryScheme
from ulbq.methods import METHODS, DbLlm, Rtn
from ulbq.methods.base import Method
from ulbq.training.losses import TokenWeighting
from ulbq.training.settings import TrainSettings

PresetName = Literal["quick", "balanced", "best"]

# No machine holds more samples, or longer ones: a slip of the finger, and better said than tried.
_MOST = 1_000_000


class Preset(BaseModel):
    """How much data and work; an explicit option wins over its preset value.

    Attributes:
        samples: calibration samples that train.
        sequence_length: tokens a sample.
        epochs: passes over them, for every block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    sequence_length: int
    epochs: int


PRESETS: dict[PresetName, Preset] = {
    "quick": Preset(samples=32, sequence_length=256, epochs=5),
    "balanced": Preset(samples=128, sequence_length=1024, epochs=10),
    "best": Preset(samples=512, sequence_length=2048, epochs=20),
}


class QuantizeRequest(BaseModel):
    """A quantization run. None means: as the preset, the method or the machine has it.

    Attributes:
        source: as given; None for the default model.
        method: name in ``METHODS``.
        bits, group_size, symmetric: of the format; ``group_size`` -1 for whole rows.
        search: shrink each group's range where that lowers its error (rtn).
        calibration: data set name, file, ``mix`` or ``self``.
        samples, sequence_length: size of the calibration set.
        epochs … augmented_loss: as :class:`~ulbq.training.settings.TrainSettings` has them.
        train_weights: let the weights move, not only scales and norms.
        activation_memory: bytes of activations that may stay in memory.
        precision: dtype of the matrix products.
        out: folder of the artifact; None for a telling name under ``./artifacts``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    method: str
    bits: Literal[1, 2, 3, 4, 8] | None = None
    group_size: int = 64
    symmetric: bool | None = None
    search: bool | None = None
    preset: PresetName | None = None
    calibration: str | None = None
    samples: int | None = Field(default=None, ge=1, le=_MOST)
    sequence_length: int | None = Field(default=None, ge=2, le=_MOST)
    seed: int = Field(default=0, ge=0, le=runtime.MAX_SEED)
    epochs: int | None = Field(default=None, ge=0, le=_MOST)
    batch_size: int | None = Field(default=None, ge=1, le=_MOST)
    weight_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    scale_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    norm_rate: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    clip: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    patience: int | None = Field(default=None, ge=1)
    token_weighting: TokenWeighting | None = None
    augmented_loss: bool | None = None
    train_weights: bool | None = None
    activation_memory: int | None = Field(default=None, ge=0)
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] | None = None
    data_dir: Path | None = None
    offline: bool = False
    out: Path | None = None
    force: bool = False


# What does not change the weights and so is no part of a run's identity, or stands there as what it came to.
NOT_IN_FINGERPRINT = frozenset(
    {
        *("source", "out", "force", "data_dir", "offline", "activation_memory", "preset"),
        *("calibration", "device", "precision"),
    }
)

_CALIBRATION = frozenset({"preset", "calibration", "samples", "sequence_length"})
_TRAINING = frozenset(
    {
        *("epochs", "batch_size", "weight_rate", "scale_rate", "norm_rate", "clip", "patience"),
        *("token_weighting", "augmented_loss"),
    }
)
_COMPUTE = frozenset({"activation_memory", "precision"})
_TAKES: dict[str, frozenset[str]] = {
    "rtn": frozenset({"bits", "symmetric", "search"}),
    "db-llm": _CALIBRATION | _TRAINING | _COMPUTE | {"bits", "train_weights"},
}
"""Options that mean something to each method, beyond those that all take. The others are refused, not ignored."""


def check_options(request: QuantizeRequest) -> None:
    """Refuse an unknown method, and options that would do nothing with the method asked for. Raises UsageError."""
    if request.method not in METHODS:
        raise UsageError(f"There is no method '{request.method}'.", hint=f"Methods: {', '.join(METHODS)}.")
    optional = frozenset[str]().union(*_TAKES.values())
    for name in sorted(optional - _TAKES[request.method]):
        if getattr(request, name) is not None:
            takers = ", ".join(method for method, names in _TAKES.items() if name in names)
            raise UsageError(
                f"--{name.replace('_', '-')} means nothing to --method {request.method}.",
                hint=f"It belongs to: {takers}. Leave it out.",
            )
    if request.method == "db-llm" and request.bits not in (None, 2):
        raise UsageError(
            f"db-llm stores two bit planes, which is 2 bits and not {request.bits}.", hint="Leave out --bits."
        )


def complete(request: QuantizeRequest, preset: PresetName) -> QuantizeRequest:
    """Fill in everything that was left open, so that the manifest says what was done.

    Args:
        preset: the one to take where the request names none.
    """
    defaults: dict[str, Any] = {"bits": 2 if request.method == "db-llm" else 4}
    if request.method == "rtn":
        # Rounding multiplies nothing, and looks at no activations.
        defaults |= {"symmetric": False, "search": True, "precision": "fp32"}
    else:
        name = request.preset or preset
        defaults |= {"preset": name, **PRESETS[name].model_dump(), "train_weights": True}
        defaults |= {"precision": "auto", "activation_memory": 4 * 2**30}
        defaults |= TrainSettings().model_dump(include=set(_TRAINING - {"epochs"}))
    return request.model_copy(
        update={name: value for name, value in defaults.items() if getattr(request, name) is None}
    )


def build_method(request: QuantizeRequest) -> Method:
    """The method of a completed request."""
    if request.method == "rtn":
        scheme = AffineScheme(bits=request.bits or 4, group_size=request.group_size, symmetric=bool(request.symmetric))
        return Rtn(scheme, search=bool(request.search))
    settings = TrainSettings.model_validate(request.model_dump(include=set(_TRAINING)))
    scheme_2 = DualBinaryScheme(group_size=request.group_size)
    return DbLlm(scheme_2, settings, train_weights=bool(request.train_weights))
