"""What ``quantize`` is asked to do, and what that means in full."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ulbq import limits, runtime
from ulbq.data.prompts import Template
from ulbq.errors import UsageError
from ulbq.formats.binary_mos import Zeros
from ulbq.methods import METHODS
from ulbq.methods.base import Method
from ulbq.methods.efficientqat import BlockApStart, BlockTrained, RateUnit
from ulbq.methods.options import AffineBits, Allocation, EndToEnd, MethodOptions
from ulbq.methods.switches import typed
from ulbq.training.end_to_end import Trained
from ulbq.training.losses import TokenWeighting
from ulbq.training.penalty import Penalized
from ulbq.training.settings import OptimizerKind
from ulbq.training.stages import Stage

PresetName = Literal["quick", "balanced", "best"]

# No machine holds more samples, or longer ones: a slip of the finger, and better said than tried.
_MOST = 1_000_000
_Count = Annotated[int, Field(ge=1, le=_MOST)]
_Number = Annotated[float, Field(ge=0, le=limits.OPTION, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


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
    "quick": Preset(samples=96, sequence_length=256, epochs=2),
    "balanced": Preset(samples=128, sequence_length=1024, epochs=10),
    "best": Preset(samples=512, sequence_length=2048, epochs=20),
}


class RecipeRecord(BaseModel):
    """The recipe that a request was read from.

    Attributes:
        name: as it was asked for: a shipped recipe's name, or the file's.
        sha256: of its content.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str


class QuantizeRequest(BaseModel):
    """A quantization run. None means: as the preset, the method or the machine has it, or that it has no meaning here.

    Every option of every method stands here; what it does is told by the method's ``Options``
    (:mod:`ulbq.methods.options`), where its default stands too.

    Attributes:
        source: as given; None for the default model. An artifact is gone on from; a saliency artifact stands for the
            model that it was computed from, weighted by it.
        method: name in ``METHODS``.
        recipe: where these values come from, for the record.
        group_size: columns that share a scale; -1 for whole rows.
        calibration: data set name, file, ``mix`` or ``self``.
        samples, sequence_length: size of the calibration set.
        rotate: rotate the weights first, the model's function left as it is; of an artifact, as it was made.
        fit_temperature: fit the temperature of the predictions, after the blocks, into the last norm.
        activation_memory: bytes of activations that may stay in memory.
        precision: dtype of the matrix products.
        out: folder of the artifact; None for a telling name under ``./artifacts``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = None
    method: str
    recipe: RecipeRecord | None = None
    bits: AffineBits | None = None
    group_size: int | None = None
    rotate: bool | None = None
    symmetric: bool | None = None
    search: bool | None = None
    damping: _Share | None = None
    act_order: bool | None = None
    true_sequential: bool | None = None
    column_block: _Count | None = None
    target_bits: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    allocation: Allocation | None = None
    outlier_bits: _Number | None = None
    refit: bool | None = None
    as_published: bool | None = None
    start: BlockApStart | None = None
    train: BlockTrained | None = None
    experts: _Count | None = None
    zeros: Zeros | None = None

    preset: PresetName | None = None
    calibration: str | None = None
    samples: _Count | None = None
    sequence_length: int | None = Field(default=None, ge=2, le=_MOST)
    seed: int = Field(default=0, ge=0, le=runtime.MAX_SEED)

    epochs: int | None = Field(default=None, ge=0, le=_MOST)
    batch_size: _Count | None = None
    micro_batch: _Count | None = None
    train_weights: bool | None = None
    weight_rate: _Number | None = None
    scale_rate: _Number | None = None
    norm_rate: _Number | None = None
    adapter_rate: _Number | None = None
    router_rate: _Number | None = None
    scale_decay: _Number | None = None
    adapter_decay: _Number | None = None
    schedule: Literal["cosine", "constant"] | None = None
    optimizer: OptimizerKind | None = None
    rate_unit: RateUnit | None = None
    warmup: _Share | None = None
    final_rate: _Share | None = None
    clip: _Number | None = None
    token_weighting: TokenWeighting | None = None
    augmented_loss: bool | None = None
    sliced_wasserstein: _Number | None = None
    patience: int | None = Field(default=None, ge=1)
    retries: int | None = Field(default=None, ge=0, le=_MOST)
    granularity: Literal["block", "layer"] | None = None

    adapter: bool | None = None
    rank: _Count | None = None
    alpha: _Number | None = None
    dropout: _Share | None = None
    dora: bool | None = None
    targets: tuple[str, ...] | None = None
    base_share: _Share | None = None

    stages: tuple[Stage, ...] | None = None
    penalty: _Number | None = None
    block_multiplier: _Number | None = None
    penalize: Penalized | None = None
    saliency: str | None = None
    saliency_power: _Number | None = None

    fit_temperature: bool | None = None
    end_to_end: EndToEnd | None = None
    end_to_end_data: str | None = None
    end_to_end_samples: _Count | None = None
    end_to_end_template: Template | None = None
    end_to_end_epochs: _Count | None = None
    end_to_end_rate: _Number | None = None
    end_to_end_train: Trained | None = None
    end_to_end_zero_rate: _Number | None = None
    accumulation: _Count | None = None
    checkpointing: bool | None = None
    teacher: Literal["streamed", "cached"] | None = None
    teacher_top_k: _Count | None = None
    end_to_end_gamma: _Number | None = None
    end_to_end_hidden_weight: _Number | None = None

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
        *("source", "out", "force", "data_dir", "offline", "activation_memory", "preset", "recipe"),
        *("calibration", "end_to_end_data", "device", "precision", "saliency"),
    }
)

_ALL_TAKE = frozenset({"source", "method", "recipe", "rotate", "seed", "device", "data_dir", "offline", "out", "force"})
_CALIBRATION = frozenset({"preset", "calibration", "samples", "sequence_length"})
_COMPUTE = frozenset({"activation_memory", "precision", "fit_temperature"})


def method_class(name: str) -> type[Method]:
    """The method of that name. Raises UsageError where there is none."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"There is no method '{name}'.", hint=f"{meant}Methods: {', '.join(METHODS)}.")
    return METHODS[name]


def method_options(name: str) -> type[MethodOptions]:
    """What the method of that name takes. Raises UsageError where there is none."""
    return cast(type[MethodOptions], method_class(name).Options)


def takes(name: str) -> frozenset[str]:
    """Fields of a request that mean something to a method, beyond those that mean something to all."""
    options = method_options(name)
    calibrated = _CALIBRATION | _COMPUTE if METHODS[name].calibrated else frozenset[str]()
    return options.taken() | calibrated | ({"group_size"} if options.grouped else frozenset())


def check_options(request: QuantizeRequest) -> None:
    """Refuse an unknown method, and options that would do nothing or do not go together. Raises UsageError."""
    taken = takes(request.method)
    for name in sorted(QuantizeRequest.model_fields.keys() - _ALL_TAKE - taken):
        if getattr(request, name) is not None:
            takers = ", ".join(method for method in METHODS if name in takes(method))
            raise UsageError(
                f"{typed(name)} means nothing to --method {request.method}.",
                hint=f"It belongs to: {takers}. Leave it out." if takers else "Leave it out.",
            )
    _options(request, {})


def complete(request: QuantizeRequest, preset: PresetName) -> QuantizeRequest:
    """Fill in everything that was left open, so that the manifest says what was done.

    What has no meaning beside the other values (the rank of no adapter) stays None.

    Args:
        preset: the one to take where the request names none.

    Raises:
        UsageError: values that do not go together.
    """
    method = method_class(request.method)
    values: dict[str, Any] = {} if method_options(request.method).grouped else {"group_size": -1}
    values["group_size"] = values.get("group_size", 64)
    amount: dict[str, Any] = {}
    if method.calibrated:
        name = request.preset or preset
        # Stages have a count of their own.
        own = request.stages or not method_options(request.method).preset_epochs
        wanted = takes(request.method) - ({"epochs"} if own else set())
        amount = {field: value for field, value in PRESETS[name] if field in wanted}
        if any(getattr(request, field) is None for field in amount):
            values["preset"] = name
        values |= {"precision": "auto", "activation_memory": 4 * 2**30, "fit_temperature": False, **amount}
    else:
        values["precision"] = "fp32"  # multiplies nothing, looks at no activations
    values |= _options(request, amount).in_effect()
    return request.model_copy(update={name: value for name, value in values.items() if getattr(request, name) is None})


def build_method(request: QuantizeRequest) -> Method:
    """The method of a completed request. Raises UsageError where its values do not go together."""
    if request.group_size is None:
        raise ValueError("complete the request first")
    return method_class(request.method).from_options(_options(request, {}), request.group_size)


def text_samples(request: QuantizeRequest) -> int:
    """Samples of a completed request that train end to end, those held out not counted."""
    return request.end_to_end_samples or request.samples or 0


def drawn_samples(request: QuantizeRequest) -> int:
    """Calibration samples of a completed request for whoever trains on most of them, those held out not counted."""
    shared = request.end_to_end not in (None, "none") and request.end_to_end_data is None
    return max(request.samples or 0, text_samples(request) if shared else 0)


def _options(request: QuantizeRequest, preset: dict[str, Any]) -> MethodOptions:
    """The method's options as the request has them, the preset's values and the method's defaults filled in."""
    options = method_options(request.method)
    asked = {name: getattr(request, name) for name in options.taken() if name in QuantizeRequest.model_fields}
    given = {name: value for name, value in preset.items() if name in options.taken()}
    given |= {name: value for name, value in asked.items() if value is not None}
    try:
        return options.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = typed(str(problem["loc"][0])) if problem["loc"] else "the options"
        raise UsageError(
            f"--method {request.method} cannot take {name} {problem['input']}: {problem['msg'][0].lower()}"
            f"{problem['msg'][1:]}.",
            hint=f"See 'ulbq quantize --help' for what {name} takes.",
        ) from error
