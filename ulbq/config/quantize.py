"""What ``quantize`` is asked to do, and what that means in full."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ulbq.config.groups import MethodOptions, TrainOptions
from ulbq.config.methods import METHOD_OPTIONS, method_options
from ulbq.config.options import (
    CALIBRATION,
    END_TO_END,
    FORMAT,
    MOST,
    Count,
    Option,
    Settings,
    TableBits,
    Texts,
    left_open,
    options,
    words,
)
from ulbq.config.run import (
    TEXTS,
    ActivationMemory,
    DataDir,
    Deterministic,
    Device,
    Force,
    LogTo,
    Offline,
    Out,
    Precision,
    PrecisionName,
    RecipeRecord,
    Seed,
    Shard,
    Stream,
)
from ulbq.config.trained import EndToEndOptions
from ulbq.errors import UsageError

PresetName = Literal["quick", "balanced", "best"]
Calibration = Annotated[
    str,
    Option(
        "wikitext2, c4, ptb, pile, redpajama, alpaca, mix, self; text, JSONL, Parquet, safetensors; a.jsonl:2,c4:1.",
        CALIBRATION,
        "NAME|FILE,…",
        default="wikitext2, else self",
        offers=TEXTS,
        primary=True,
    ),
]
PresetChoice = Annotated[
    PresetName,
    Option(
        "quick, balanced or best: samples, length and epochs at once.",
        CALIBRATION,
        "NAME",
        default="quick on a CPU, balanced on a GPU",
        primary=True,
    ),
]
Samples = Annotated[Count, Option("Training samples.", CALIBRATION, "N", default="preset", primary=True)]
SequenceLength = Annotated[int, Field(ge=2, le=MOST), Option("Tokens a sample.", CALIBRATION, "N", default="preset")]


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


class _OfAll(Settings):
    """What every method takes."""

    source: str | None = None
    method: Annotated[
        str,
        Option(
            "db-llm, rtn, gptq, claq, efficientqat, apiq, ulb-sapr or binary-mos. The published recipe to follow. "
            "db-llm: two bit planes; rtn: affine rounding, in seconds; gptq: the same with errors made good, in "
            "minutes; claq: a codebook for every column, wider where it pays; efficientqat: affine codes, all of a "
            "block trained; apiq: affine codes and an adapter; ulb-sapr: the same with salient weights held in place; "
            "binary-mos: signs and mixed scales, 1 bit.",
            metavar="NAME",
            flag="--method -m",
            default="the recipe's, else db-llm",
            offers=tuple(METHOD_OPTIONS),
            primary=True,
        ),
    ]
    recipe: RecipeRecord | None = None
    rotate: Annotated[
        bool | None,
        Option(
            "Spread outliers first, by rotations that leave the model's function as it is.",
            FORMAT,
            default="no-rotate",
        ),
    ] = None
    skip: Annotated[
        Texts,
        Option(
            "Leave out layers, by a part of their names: mlp.down_proj, layers.0, *_proj; repeat for more.",
            FORMAT,
            "PATTERN",
            repeated=True,
        ),
    ] = ()
    only: Annotated[
        Texts,
        Option("Quantize no other layers than those; repeat for more.", FORMAT, "PATTERN", repeated=True),
    ] = ()
    plan: Annotated[
        str | None,
        Option(
            "Settings of single layers, by patterns as --skip has them: bits, group_size, skip; a YAML file.",
            FORMAT,
            "FILE",
        ),
    ] = None
    embedding_bits: Annotated[
        TableBits | None,
        Option(
            "Of the table of tokens: 8, 6 or 4, rounded in groups. Where the head is that table it counts for both.",
            FORMAT,
            "N",
            default="none, half precision",
        ),
    ] = None
    head_bits: Annotated[
        TableBits | None, Option("The same of the head.", FORMAT, "N", default="none, half precision")
    ] = None
    allow_partial: Annotated[
        bool, Option("Go on though more than half of the blocks' weights stay in full precision.", FORMAT)
    ] = False
    seed: Seed = 0
    device: Device = "auto"
    data_dir: DataDir = None
    offline: Offline = False
    log_to: LogTo = None
    out: Out = None
    force: Force = False


class _OfGroups(BaseModel):
    """What methods take whose format has groups."""

    group_size: Annotated[
        int | None, Option("Columns that share a scale; -1 for rows.", FORMAT, "N", default="64", primary=True)
    ] = None


class _OfCalibrated(BaseModel):
    """What methods take that look at activations."""

    preset: PresetChoice | None = None
    calibration: Calibration | None = None
    samples: Samples | None = None
    sequence_length: SequenceLength | None = None
    fit_temperature: Annotated[
        bool | None,
        Option(
            "Fit how sure the model is to its full-precision self, on the held-out samples; goes into the last norm.",
            END_TO_END,
            default="no-fit-temperature",
        ),
    ] = None
    activation_memory: ActivationMemory | None = None
    stream: Stream = None
    shard: Shard = None
    precision: Precision | None = None
    deterministic: Deterministic | None = None


_DECLARED = {name: field for one in METHOD_OPTIONS.values() for name, field, _ in options(one)}
"""Every option of every method, as it was first declared."""
if TYPE_CHECKING:

    class _Asked(_OfAll, _OfGroups, _OfCalibrated):
        def __getattr__(self, name: str) -> Any: ...
else:
    _FIELDS = {name: left_open(field) for name, field in _DECLARED.items()}
    _Asked = create_model("_Asked", __base__=(_OfAll, _OfGroups, _OfCalibrated), **_FIELDS)


class QuantizeRequest(_Asked):
    """A quantization run. None means: as the preset, the method or the machine has it, or that it has no meaning here.

    Every option of every method is a field; :mod:`ulbq.config.methods` has them, with their defaults.

    Attributes:
        source: as given; None for the default model. An artifact is gone on from; a saliency artifact stands for the
            model that it was computed from, weighted by it.
        recipe: where these values come from, for the record.
    """


# What does not change the weights and so is no part of a run's identity, or stands there as what it came to.
NOT_IN_FINGERPRINT = frozenset(
    {
        *("source", "out", "force", "allow_partial", "data_dir", "offline", "activation_memory", "preset", "recipe"),
        *("stream", "shard", "deterministic"),
        *("calibration", "end_to_end_data", "device", "precision", "saliency", "log_to", "plan"),
    }
)


def takes(name: str) -> frozenset[str]:
    """Fields of a request that mean something to a method, beyond those that mean something to all."""
    method = method_options(name)
    calibrated = _OfCalibrated.model_fields if method.calibrated else {}
    grouped = _OfGroups.model_fields if method.grouped else {}
    return method.taken() | calibrated.keys() | grouped.keys()


def for_method(name: str) -> frozenset[str]:
    """All fields of a request that mean something to a method."""
    return takes(name) | _OfAll.model_fields.keys()


def check_options(request: QuantizeRequest) -> None:
    """Refuse an unknown method, and options that would do nothing or do not go together. Raises UsageError."""
    taken = for_method(request.method)
    for name in sorted(QuantizeRequest.model_fields.keys() - taken):
        if getattr(request, name) is not None:
            takers = ", ".join(method for method in METHOD_OPTIONS if name in takes(method))
            raise UsageError(
                f"`{name}` means nothing to `method={request.method}`.",
                hint=f"It belongs to: {takers}. Leave it out.",
            )
    groups = options_of(request).own_groups
    if groups is not None and request.group_size not in {None, groups}:
        raise UsageError(
            f"`group_size={request.group_size}` means nothing to `k_quant`, whose groups have {groups} columns.",
            hint="Leave out `group_size`.",
        )


class Quantization(_OfAll):
    """A quantization run in full, for one model on one machine: nothing in it is left open.

    Attributes:
        record: the same in the words of a request, for plan and manifest; None is what has no meaning beside the rest.
        options: the method's.
        calibration: what samples are drawn of; None where none are.
        samples, sequence_length, activation_memory: 0 for a method that looks at no activations.
    """

    record: QuantizeRequest
    options: MethodOptions
    rotate: bool
    group_size: int
    precision: PrecisionName
    calibration: str | None = None
    samples: int = 0
    sequence_length: int = 0
    activation_memory: int = 0
    stream: bool | None = None
    shard: bool | None = None
    fit_temperature: bool = False

    @property
    def phase(self) -> EndToEndOptions | None:
        """How the whole model trains after its blocks; None where it does not."""
        options = self.options
        return options if isinstance(options, EndToEndOptions) and options.end_to_end != "none" else None

    @property
    def text(self) -> str | None:
        """What the whole model trains on, if not on the calibration samples."""
        return None if self.phase is None else self.phase.end_to_end_data

    @property
    def text_samples(self) -> int:
        """Samples that train end to end, those held out not counted."""
        return (self.phase is not None and self.phase.end_to_end_samples) or self.samples

    @property
    def drawn_samples(self) -> int:
        """Calibration samples for whoever trains on most of them, those held out not counted."""
        shared = self.phase is not None and self.text is None
        return max(self.samples, self.text_samples if shared else 0)

    @property
    def batch_size(self) -> int:
        """Samples of a step of block-wise training."""
        return self.options.batch_size if isinstance(self.options, TrainOptions) else 1

    @property
    def at_once(self) -> int:
        """Samples of such a step that run at once."""
        most = self.options.micro_batch if isinstance(self.options, TrainOptions) else None
        return min(most or self.batch_size, self.batch_size)


def preset_values(request: QuantizeRequest, preset: PresetName) -> dict[str, Any]:
    """Samples, length and epochs of the preset that a request names, or of ``preset``, where its method has them."""
    method = method_options(request.method)
    # Stages have a count of their own.
    own = request.stages or not method.preset_epochs
    wanted = takes(request.method) - ({"epochs"} if own else set())
    return {field: value for field, value in PRESETS[request.preset or preset] if field in wanted}


def resolve(
    request: QuantizeRequest, preset: PresetName, *, rotate: bool = False, calibration: str | None = None
) -> Quantization:
    """Settle everything that was left open.

    Args:
        preset: the one to take where the request names none.
        rotate: whether the model is rotated.
        calibration: what samples are drawn of where the request does not say; None for nothing.

    Raises:
        UsageError: values that do not go together.
    """
    method = method_options(request.method)
    amount = preset_values(request, preset)
    options = options_of(request, amount)
    values: dict[str, Any] = {"group_size": options.own_groups or 64, "calibration": calibration, **amount}
    if any(getattr(request, field) is None for field in amount):
        values["preset"] = request.preset or preset
    if method.calibrated:
        values |= {"precision": "auto", "activation_memory": 4 * 2**30, "fit_temperature": False}
    else:
        values["precision"] = "fp32"  # multiplies nothing, looks at no activations
    values |= options.in_effect()
    values = {name: value for name, value in values.items() if getattr(request, name) is None}
    record = request.model_copy(update=values | {"rotate": rotate})
    settled = {name: value for name, value in record if name in Quantization.model_fields and value is not None}
    return Quantization.model_validate(settled | {"record": record, "options": options})


def idle(request: QuantizeRequest) -> frozenset[str]:
    """Options that the others of a request leave without a meaning, whether they were asked for or not."""
    method = method_options(request.method)
    given = {name: value for name, value in request if name in method.model_fields and value is not None}
    return frozenset(method.model_construct(**given).idle())


def usual(name: str) -> Any:
    """What an option is with most methods: the default that it was declared with; False for what is left open."""
    if name in _DECLARED:
        return _DECLARED[name].default
    default = QuantizeRequest.model_fields[name].default
    return False if default is None else default


def default_words(name: str, option: Option) -> str:
    """What an option is where nobody says, of each method that takes it: ``4; 2 for apiq and ulb-sapr``."""
    methods: dict[str, list[str]] = {}
    for method, taken in METHOD_OPTIONS.items():
        if name in taken.taken():
            preset = taken.preset_epochs and name in Preset.model_fields
            default = taken.model_fields[name].default
            told = "preset" if preset else option.default or words(name, option, default)
            methods.setdefault(told, []).append(method)
    usual = max(methods, key=lambda told: len(methods[told]), default=option.default)
    others = [f"{told} for {' and '.join(takers)}" for told, takers in methods.items() if told != usual]
    return "; ".join([usual, *others])


def options_of(request: QuantizeRequest, preset: dict[str, Any] | None = None) -> MethodOptions:
    """The method's options as the request has them, the preset's values and the method's defaults filled in.

    Raises:
        UsageError: values that the method does not take, or that do not go together.
    """
    method = method_options(request.method)
    asked = {name: getattr(request, name) for name in method.taken()}
    given = {name: value for name, value in (preset or {}).items() if name in method.taken()}
    given |= {name: value for name, value in asked.items() if value is not None}
    try:
        return method.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "options"
        help_text = next((option.help for known, _, option in options(method) if known == name), "")
        raise UsageError(
            f"`method={request.method}` cannot take `{name}={problem['input']}`: {problem['msg'][0].lower()}"
            f"{problem['msg'][1:]}.",
            hint=f"`{name}`: {help_text}" if help_text else "",
        ) from error
