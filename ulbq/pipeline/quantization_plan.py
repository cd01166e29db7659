"""Everything about a quantization run that is settled before the first tensor is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import Field
from transformers import PreTrainedModel

from ulbq import distributed, runtime
from ulbq.artifacts.records import Coverage, Record, RotationRecord
from ulbq.artifacts.shards import EXPERT
from ulbq.blockwise.walk import check_length
from ulbq.config.options import CODEBOOKS, COLUMNS, options
from ulbq.config.quantize import (
    PresetName,
    Quantization,
    QuantizeRequest,
    check_options,
    options_of,
    preset_values,
    resolve,
)
from ulbq.data.calibration import check_calibration
from ulbq.data.instructions import check_training_text
from ulbq.errors import InputError, UsageError
from ulbq.formats import AffineScheme, AnyScheme
from ulbq.methods import METHODS
from ulbq.methods.base import Method, Needs
from ulbq.models.blocks import Linear, ModelStructure, check_group, skeleton, structure
from ulbq.models.coverage import check_coverage, coverage
from ulbq.models.names import check_complete
from ulbq.models.packed_tables import chosen_tables
from ulbq.models.rotation import rotated
from ulbq.models.selection import ASKED, Selection, fitting, of_artifact, select
from ulbq.models.source import ModelSource
from ulbq.pipeline.layer_plan import planned_schemes, read_plan, skipped_by
from ulbq.pipeline.origins import Start, check_saliency, open_origins, open_saliency, rotation_seed
from ulbq.pipeline.predict import (
    Cost,
    RunSizes,
    planned_bits,
    predict,
    scheme_bits,
    trained_memory,
    whole_memory,
    whole_passes,
)
from ulbq.pipeline.samples import choose_sharded, choose_streamed, default_calibration
from ulbq.progress import Progress, Silent
from ulbq.sensitivity import KINDS, Saliency
from ulbq.tracking import check_tracker
from ulbq.training.precision import Precision


class QuantizePlan(Record):
    """What a run would do and cost.

    Attributes:
        stored_as: what it is, and bits a value, of a model that was quantized before; None in full precision.
        request: completed: presets, defaults and the calibration source filled in.
        experts: of a mixture; 0 without any.
        coverage: how much of the model is quantized, and why the rest is not.
        bits_per_weight: true bits of the linear weights, scales, zeros and adapter included.
        adapter_bits: those of them that are the adapter's.
        rotation: of the weights before they are quantized; None for none.
        reads: how often all of the full-precision model is read, block by block; 0 where it is loaded, or not wanted.
        sharded: whether each process holds a part of what trains.
        schemes: of the layers by full name, as far as they are known; left_out: those that were to be left out.
    """

    request: QuantizeRequest
    model: str
    blocks: int
    layers: int
    experts: int = 0
    weights: int
    skipped: tuple[str, ...]
    coverage: Coverage
    scheme: str
    bits_per_weight: float
    adapter_bits: float = 0.0
    device: str
    precision: str
    rotation: RotationRecord | None = None
    stored_as: tuple[str, float] | None = None
    reads: int = 0
    sharded: bool = False
    cost: Cost
    schemes: Mapping[str, AnyScheme] = Field(default={}, exclude=True)
    left_out: tuple[str, ...] = Field(default=(), exclude=True)


@dataclass(frozen=True)
class Job:
    """Everything that is settled before the first tensor is read.

    Attributes:
        request: in full.
        source: the full-precision model, rotated where that was asked for.
        selected: the layers that are quantized.
        start: the artifact to go on from; None for a fresh start.
        saliency: scores that are read; None where the method wants none, or they are computed first.
        schemes: of the layers that have one of their own, by full name; given out by a look at the model, later.
        tables: of the table of tokens and the head, those that are stored in few bits.
        embedded: ``source`` with these as they are stored; None without any, or before they are.
    """

    request: Quantization
    source: ModelSource
    model: PreTrainedModel
    selected: Selection
    method: Method
    precision: Precision
    plan: QuantizePlan
    start: Start | None = None
    saliency: Saliency | None = None
    schemes: Mapping[str, AnyScheme] = field(default_factory=dict)
    tables: Mapping[Linear, AffineScheme] = field(default_factory=dict)
    embedded: ModelSource | None = None

    @property
    def found(self) -> ModelStructure:
        """The model's structure, with the layers that are quantized."""
        return self.selected.found

    @property
    def blocks_stay(self) -> bool:
        """Whether there is only something to do behind the blocks: the artifact's are taken as they are."""
        return _blocks_stay(self.request.fit_temperature, self.method.needs, self.start)

    @property
    def made_by(self) -> str:
        """The method that found the codes."""
        manifest = self.start.source.quantized if self.start is not None and self.blocks_stay else None
        return self.method.name if manifest is None else manifest.method

    @property
    def calibrated(self) -> bool:
        """Whether calibration samples are wanted: by all but an end-to-end phase with a text of its own."""
        fit = self.request.fit_temperature
        return self.method.Options.calibrated and not _only_text(self.request.text, fit, self.method.needs, self.start)

    @property
    def streamed(self) -> bool:
        """Whether the full-precision model is read block by block where all of it is wanted."""
        return self.plan.reads > 0

    def names(self, index: int) -> tuple[str, tuple[str, ...]]:
        """A block's full name with the dot, and its linear layers' names relative to it."""
        prefix = f"{self.found.blocks_prefix}.{index}."
        return prefix, tuple(linear.name.removeprefix(prefix) for linear in self.found.linears[index])


def plan(request: QuantizeRequest, progress: Progress | None = None) -> QuantizePlan:
    """Check a request and predict its cost; nothing is written. Of a model on the Hub only headers are fetched.

    Raises:
        UsageError: options that do not exist or do not go together.
        InputError: no such model, one that is quantized, incomplete or not to be rotated, or of which less than half
            can be quantized; a group size that does not divide, samples longer than the model takes, or no such file
            of samples.
        ResourceError: no such device, or no such data here and the network is off.
    """
    # Whether scores that lie here are of this model shows in its weights.
    of_this_model = request.saliency not in (None, "none", *KINDS)
    return prepare(request, progress or Silent(), outline=not of_this_model).plan


def build_method(request: QuantizeRequest, preset: PresetName = "quick") -> Method:
    """The method of a request, with a preset where that names none. Raises UsageError as :func:`resolve`."""
    options = options_of(request, preset_values(request, preset))
    group_size = 64 if request.group_size is None else request.group_size
    return METHODS[request.method].from_options(options, group_size)


def prepare(request: QuantizeRequest, progress: Progress, *, outline: bool = False) -> Job:
    """Settle everything that can be settled before the first tensor is read. Raises as :func:`plan`.

    Args:
        request: what is asked for.
        progress: told what is chosen.
        outline: none will be read, as of :func:`~ulbq.models.source.resolve`.
    """
    check_options(request)
    device = runtime.resolve_device(request.device)
    preset: PresetName = "balanced" if device.type == "cuda" else "quick"
    _check_without_model(request, preset)
    origins = open_origins(request.source, offline=request.offline, outline=outline)
    origins.model.tell(progress)
    turn = rotation_seed(request.rotate, request.seed, origins.start)
    source = origins.model if turn is None else rotated(origins.model, turn)
    if origins.saliency is not None and request.saliency is None:
        request = request.model_copy(update={"saliency": origins.saliency})
        check_options(request)
    if origins.start is not None:
        _refuse_what_is_decided(request)
    method = build_method(request, preset)
    start = None
    if origins.start is not None:
        # Typed, not the method's default.
        without_adapter = request.adapter is False
        start = Start(origins.start, method.scheme, method.needs, without_adapter=without_adapter)
    calibration = _calibration(request, method, start, progress)
    run = resolve(request, preset, rotate=turn is not None, calibration=calibration)
    precision = Precision.choose(device, run.precision)
    _check_processes(run, method)
    _check_tracking(run, method)
    model = skeleton(source, packed=None if start is None else start.source.packed)
    selected, schemes, tables, bits, covered = quantized_share(run, method, source, model, start)
    found = selected.found
    _check_model(run, method, source, model, found)
    if method.needs.target_bits is not None:
        _check_target_bits(run, method, found, schemes)
    stay = _blocks_stay(run.fit_temperature, method.needs, start)
    stored: dict[str, Any] = {"gguf_size": source.gguf_size, "halves": source.halves}
    sizes = RunSizes(run, method, found, model, precision, **stored, tables=tables, schemes=schemes)
    trained = trained_memory(sizes, blocks_stay=stay)
    sizes = replace(sizes, sharded=choose_sharded(run.shard, trained, device, progress))
    sizes = replace(sizes, streamed=choose_streamed(run.stream, whole_memory(sizes), device, progress))
    cost = predict(sizes, blocks_stay=stay)
    reads = whole_passes(sizes) if sizes.streamed else 0
    check_coverage(covered, found, progress, allow_partial=run.allow_partial or start is not None)
    described = _described(run, method, source, found, precision, cost, origins.model.stored_as, covered, reads, bits)
    named = {layer.name: schemes.get(layer.name, method.scheme) for layer in found.layers}
    left = tuple(name for name, why in selected.reasons.items() if why == ASKED)
    described = described.model_copy(update={"schemes": named, "left_out": left, "sharded": sizes.sharded})
    saliency = open_saliency(method.needs.saliency, source)
    if method.needs.survey:
        _check_score(method, saliency)
    return Job(run, source, model, selected, method, precision, described, start, saliency, schemes, tables)


class QuantizedShare(NamedTuple):
    """What of a model is quantized, and what is stored for it.

    Attributes:
        selected: the layers.
        schemes: of those that have one of their own, by full name.
        tables: of the table of tokens and the head, those that are stored in few bits.
        bits: true bits a weight of the layers, adapters included.
        coverage: of the model.
    """

    selected: Selection
    schemes: Mapping[str, AnyScheme]
    tables: Mapping[Linear, AffineScheme]
    bits: float
    coverage: Coverage


def quantized_share(
    run: Quantization, method: Method, source: ModelSource, model: PreTrainedModel, start: Start | None = None
) -> QuantizedShare:
    """What of a model a run quantizes; ``model`` is its skeleton.

    Raises:
        UsageError, InputError: a plan, layers, tables or groups that the model has no place for.
    """
    tables = _tables(run, model, start)
    selected, schemes = _selected(run, method, model, start)
    selected = selected.storing(tables)
    bits = _bits_per_weight(method, selected.found, schemes)
    covered = coverage(model, selected, bits=bits, carried=source.carried_values, tables=tables)
    return QuantizedShare(selected, schemes, tables, bits, covered)


def _tables(run: Quantization, model: PreTrainedModel, start: Start | None) -> dict[Linear, AffineScheme]:
    """Of the table of tokens and the head, those that are stored in few bits: the artifact's own, if it has any.

    Raises:
        UsageError, InputError: as :func:`chosen_tables`; or the artifact has some and others are asked for.
    """
    own = {} if start is None else start.source.tables
    if not own:
        return chosen_tables(model, run.embedding_bits, run.head_bits)
    for name in ("embedding_bits", "head_bits"):
        if getattr(run, name) is not None:
            raise UsageError(
                f"`{name}` means nothing to an artifact whose table of tokens or head is packed already.",
                hint="Leave it out, or start from the full-precision model.",
            )
    return {Linear(record.name, *record.shape): AffineScheme.model_validate(record.scheme) for record in own.values()}


def _selected(
    run: Quantization, method: Method, model: PreTrainedModel, start: Start | None
) -> tuple[Selection, dict[str, AnyScheme]]:
    """The layers that are quantized, and the schemes of those that have one of their own.

    Raises:
        UsageError, InputError: as :func:`select`, :func:`planned_schemes` and :func:`fitting`.
    """
    found = structure(model)
    if start is not None:
        own = {name: scheme for name, scheme in start.source.packed.items() if scheme != method.scheme}
        return of_artifact(found, start.source.packed), own
    plan = read_plan(run.plan)
    if method.needs.target_bits is not None and any(settings.bits is not None for settings in plan.values()):
        raise UsageError("`target_bits` gives out the bits that the plan gives.", hint="Leave one of them out.")
    reasons = dict.fromkeys(skipped_by(plan, found), ASKED)
    selected = select(found, run.skip, run.only).without(reasons)
    schemes = planned_schemes(plan, selected.found.layers, method.scheme)
    return fitting(selected, method.scheme, run.group_size, schemes), schemes


def _check_model(
    run: Quantization, method: Method, source: ModelSource, model: PreTrainedModel, found: ModelStructure
) -> None:
    """Refuse what this model has no place for. Raises UsageError, InputError."""
    check_complete(source, model)
    if method.Options.calibrated:
        check_length(model, run.sequence_length)
    _check_targets(method, found.layers)
    _check_outputs(method, found)


def _described(
    run: Quantization,
    method: Method,
    source: ModelSource,
    found: ModelStructure,
    precision: Precision,
    cost: Cost,
    stored_as: tuple[str, float] | None,
    covered: Coverage,
    reads: int,
    bits: float,
) -> QuantizePlan:
    layers = found.layers
    return QuantizePlan(
        request=run.record,
        model=source.name,
        blocks=found.n_blocks,
        layers=len(layers),
        experts=_experts(layers),
        weights=covered.quantized,
        skipped=found.skipped,
        coverage=covered,
        scheme=f"{method.scheme.format} {method.scheme.label}",
        bits_per_weight=bits,
        adapter_bits=_adapter_bits(method, found),
        device=runtime.describe_device(precision.device),
        precision=str(precision.dtype).removeprefix("torch."),
        rotation=source.rotation,
        stored_as=stored_as,
        reads=reads,
        cost=cost,
    )


def _experts(layers: Sequence[Linear]) -> int:
    """How many experts the largest mixture has whose layers are among these."""
    found = (EXPERT.search(layer.name) for layer in layers)
    return max((int(one[1] or one[2]) + 1 for one in found if one is not None), default=0)


def replanned(job: Job, selected: Selection) -> QuantizePlan:
    """The plan of a run that quantizes fewer layers than it was to."""
    bits = _bits_per_weight(job.method, selected.found, job.schemes)
    covered = coverage(job.model, selected, bits=bits, carried=job.source.carried_values, tables=job.tables)
    return job.plan.model_copy(
        update={"coverage": covered, "weights": covered.quantized, "skipped": selected.found.skipped}
    )


def _check_without_model(request: QuantizeRequest, preset: PresetName) -> None:
    """Refuse what no model could make right, before one is opened. Raises UsageError, InputError, ResourceError."""
    if request.group_size is not None:
        check_group(request.group_size)
    build_method(request, preset)
    if request.calibration is not None:
        check_calibration(request.calibration, data_dir=request.data_dir, offline=request.offline)
    if request.end_to_end_data is not None:
        check_training_text(request.end_to_end_data, data_dir=request.data_dir, offline=request.offline)
    if request.saliency is not None:
        check_saliency(request.saliency)


def _check_tracking(run: Quantization, method: Method) -> None:
    """Refuse a tracker that has nothing to track, or cannot. Raises UsageError, ResourceError."""
    if run.log_to is not None and not method.needs.epochs and method.needs.end_to_end is None:
        raise UsageError("`log_to` means nothing where nothing trains.", hint="It shows the losses of a training.")
    check_tracker(run.log_to)


def _check_processes(run: Quantization, method: Method) -> None:
    """Refuse what several processes cannot do together. Raises UsageError."""
    count = distributed.size()
    if method.Options.calibrated and run.samples < count:
        raise UsageError(
            f"{run.samples} samples cannot be split over {count} processes.",
            hint="Raise `samples`, or start fewer processes.",
        )
    if run.record.sliced_wasserstein and count > 1:
        raise UsageError(
            "`sliced_wasserstein` compares all tokens of a batch, which several processes hold in parts.",
            hint="Leave it out, or run one process.",
        )


def _only_text(text: str | None, fit_temperature: bool, needs: Needs, start: Start | None) -> bool:
    """Whether an end-to-end phase on a text of its own is all there is to do."""
    return _blocks_stay(fit_temperature, needs, start) and text is not None and not fit_temperature


def _blocks_stay(fit_temperature: bool, needs: Needs, start: Start | None) -> bool:
    if start is None or needs.epochs or (needs.end_to_end is None and not fit_temperature):
        return False
    # A fresh adapter starts from what its layer sees.
    return start.adapted == (needs.adapter is not None)


def _calibration(request: QuantizeRequest, method: Method, start: Start | None, progress: Progress) -> str | None:
    """What samples are drawn of, if any are wanted. Raises UsageError for an idle calibration."""
    if _only_text(request.end_to_end_data, bool(request.fit_temperature), method.needs, start):
        if request.calibration is not None:
            raise UsageError(
                "`calibration` means nothing where an artifact's blocks stay and `end_to_end_data` is the text.",
                hint="Leave out one of them.",
            )
        return None
    if not method.Options.calibrated:
        return None
    return request.calibration or default_calibration(request, progress)


def _bits_per_weight(method: Method, found: ModelStructure, schemes: Mapping[str, AnyScheme]) -> float:
    """True bits a weight that the layers will have, adapters included."""
    return planned_bits(method, found.layers, schemes) + _adapter_bits(method, found)


def _adapter_bits(method: Method, found: ModelStructure) -> float:
    """Bits a weight of the layers' adapters; 0 without any."""
    layers, adapter = found.layers, method.needs.adapter
    if adapter is None:
        return 0.0
    adapted = sum(adapter.bits(x.out_features, x.in_features) for x in layers if adapter.matches(x.name))
    return adapted / sum(x.weights for x in layers)


_DECIDED = (
    *(name for name, _, option in options(QuantizeRequest) if option.section in (COLUMNS, CODEBOOKS)),
    "start",
)
_CHOSEN = ("skip", "only", "plan")


def _refuse_what_is_decided(request: QuantizeRequest) -> None:
    """Refuse options of a pass over the columns, which an artifact has behind it. Raises UsageError."""
    for name in _DECIDED:
        if getattr(request, name) is not None:
            raise UsageError(
                f"`{name}` means nothing to an artifact, whose codes are found already.",
                hint="Leave it out, or start from the full-precision model.",
            )
    for name in _CHOSEN:
        if getattr(request, name):
            raise UsageError(
                f"`{name}` means nothing to an artifact, whose layers are chosen already.",
                hint="Leave it out, or start from the full-precision model.",
            )


def _check_target_bits(
    run: Quantization, method: Method, found: ModelStructure, schemes: Mapping[str, AnyScheme]
) -> None:
    """Refuse a budget that cannot be kept, or not be spent. Raises UsageError."""
    target, reserved = method.needs.target_bits or 0.0, run.record.outlier_bits or 0.0
    # Each block keeps the target by itself, unless the whole model does.
    whole = found.layers
    parts = [whole] if method.needs.survey else [block for block in found.linears if block]
    least = max(scheme_bits(method.scheme, part, schemes) for part in parts)
    if target - reserved < least:
        outliers = f" and {reserved:g} for outliers" if reserved else ""
        raise UsageError(
            f"`target_bits={target:g}` is less than the {least:.2f} bits that codes of {run.record.bits} bits take in "
            f"this model, codebooks and scales included{outliers}.",
            hint=f"Give at least {least + reserved + 0.01:.2f}.",
        )
    widest = 8 if isinstance(method.scheme, AffineScheme) else 4
    wide = {name: scheme.model_copy(update={"bits": widest}) for name, scheme in schemes.items()}
    most = scheme_bits(method.scheme.model_copy(update={"bits": widest}), whole, wide)
    if target - reserved > most:
        raise UsageError(
            f"`target_bits={target:g}` is more than the {most:.2f} bits that codes of {widest} bits take here.",
            hint=f"Give fewer, or take `bits={widest}`.",
        )


def _check_score(method: Method, saliency: Saliency | None) -> None:
    """Refuse scores that are no squared gradients. Raises UsageError."""
    asked = method.needs.saliency
    score = saliency.manifest.score if saliency is not None and saliency.manifest is not None else asked
    if score not in (None, "fisher"):
        raise UsageError(
            f"`saliency={asked}`: layers are compared by fisher scores, and these are {score}.",
            hint="Give `saliency=fisher`, or an artifact of that kind.",
        )


def _check_outputs(method: Method, found: ModelStructure) -> None:
    """Refuse to weigh tokens for layers that do not see all of them. Raises InputError."""
    if not method.needs.output_groups:
        return
    for index, block in enumerate(found.linears):
        for layer in block:
            if any(part.isdigit() for part in layer.name.removeprefix(f"{found.blocks_prefix}.{index}.").split(".")):
                raise InputError(
                    f"'{layer.name}' is one of several experts. What reaches it changes once others are quantized, and "
                    "gradients of before say nothing of that.",
                    hint="Take `hessian=plain`.",
                )


def _check_targets(method: Method, layers: Sequence[Linear]) -> None:
    """Refuse an adapter for layers that the model does not have. Raises InputError."""
    adapter = method.needs.adapter
    if adapter is None:
        return
    for target in adapter.targets:
        if not any(adapter.model_copy(update={"targets": (target,)}).matches(linear.name) for linear in layers):
            names = dict.fromkeys(linear.name.rpartition(".")[2] for linear in layers)
            raise InputError(
                f"No linear layer of the model's blocks is called '{target}'.", hint=f"Its layers: {', '.join(names)}."
            )
