"""Everything about a quantization run that is settled before the first tensor is read."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from ulbq import formats, runtime
from ulbq.data.registry import available
from ulbq.errors import InputError
from ulbq.methods.base import Method
from ulbq.models.blocks import ModelStructure, check_group_size, skeleton, structure
from ulbq.models.names import check_complete
from ulbq.models.source import ModelSource, resolve
from ulbq.models.stream import check_length
from ulbq.pipeline.predict import Cost, predict
from ulbq.pipeline.request import QuantizeRequest, build_method, check_options, complete
from ulbq.progress import Progress, Silent
from ulbq.training.precision import Precision


class QuantizePlan(BaseModel):
    """What a run would do and cost.

    Attributes:
        request: completed: presets, defaults and the calibration source filled in.
        bits_per_weight: true bits of the linear weights, scales and zeros included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: QuantizeRequest
    model: str
    blocks: int
    layers: int
    weights: int
    skipped: tuple[str, ...]
    scheme: str
    bits_per_weight: float
    device: str
    precision: str
    cost: Cost


@dataclass(frozen=True)
class Job:
    """Everything that is settled before the first tensor is read."""

    request: QuantizeRequest
    source: ModelSource
    model: PreTrainedModel
    found: ModelStructure
    method: Method
    precision: Precision
    plan: QuantizePlan

    def names(self, index: int) -> tuple[str, tuple[str, ...]]:
        """A block's full name with the dot, and its linear layers' names relative to it."""
        prefix = f"{self.found.blocks_prefix}.{index}."
        return prefix, tuple(linear.name.removeprefix(prefix) for linear in self.found.linears[index])


def plan(request: QuantizeRequest, progress: Progress | None = None) -> QuantizePlan:
    """Check a request and predict its cost; nothing is written.

    Raises:
        UsageError: options that do not exist or do not go together.
        InputError: no such model, one that is quantized or incomplete, a group size that does not divide, or samples
            longer than the model takes.
    """
    return prepare(request, progress or Silent()).plan


def prepare(request: QuantizeRequest, progress: Progress) -> Job:
    """Settle everything that can be settled before the first tensor is read. Raises as :func:`plan`."""
    check_options(request)
    device = runtime.resolve_device(request.device)
    source = resolve(request.source, offline=request.offline)
    if source.packed:
        raise InputError(
            f"'{source.given}' is quantized already.",
            hint=f"Give the full-precision model it was made from{f': {source.parent}' if source.parent else ''}.",
        )
    request = complete(request, "balanced" if device.type == "cuda" else "quick")
    precision = Precision.choose(device, request.precision or "auto")
    method = build_method(request)
    if method.calibrated and request.calibration is None:
        request = request.model_copy(update={"calibration": _default_calibration(request, progress)})
    model = skeleton(source)
    found = structure(model)
    check_group_size(found, request.group_size)
    check_complete(source, model)
    if method.calibrated:
        check_length(model, request.sequence_length or 0)
    layers = [linear for block in found.linears for linear in block]
    sizes = {linear.name: linear.out_features * linear.in_features for linear in layers}
    stored = sum(
        formats.bits_per_weight(method.scheme, linear.out_features, linear.in_features) * sizes[linear.name]
        for linear in layers
    )
    described = QuantizePlan(
        request=request,
        model=source.name,
        blocks=found.n_blocks,
        layers=len(layers),
        weights=sum(sizes.values()),
        skipped=found.skipped,
        scheme=f"{method.scheme.format} {method.scheme.label}",
        bits_per_weight=stored / sum(sizes.values()),
        device=runtime.describe_device(device),
        precision=str(precision.dtype).removeprefix("torch."),
        cost=predict(request, method, found, model, precision),
    )
    return Job(request, source, model, found, method, precision, described)


def _default_calibration(request: QuantizeRequest, progress: Progress) -> str:
    if available("wikitext2", data_dir=request.data_dir, offline=request.offline):
        return "wikitext2"
    progress.note("WikiText-2 cannot be had here: the model writes its own calibration samples (--calibration self).")
    return "self"
