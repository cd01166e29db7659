"""What ``saliency`` is asked to do, and everything about a run that is settled before the first tensor is read."""

from dataclasses import dataclass
from math import prod
from typing import Any

from transformers import PreTrainedModel

from ulbq import runtime
from ulbq.artifacts.records import Record
from ulbq.blockwise.walk import check_length
from ulbq.config.saliency import SaliencyRequest
from ulbq.data.calibration import check_calibration
from ulbq.data.generate import writing_passes
from ulbq.errors import InputError, UsageError
from ulbq.models.blocks import ModelStructure, skeleton, structure
from ulbq.models.names import check_complete
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.memory import FLOAT, Sizes, layer_size, passed_activations, trained_activations, wide
from ulbq.pipeline.samples import choose_streamed, default_calibration
from ulbq.progress import Progress
from ulbq.sensitivity import SaliencySettings
from ulbq.sensitivity.head import head_memory
from ulbq.sensitivity.passing import kept_every, kept_stores
from ulbq.sensitivity.settings import BACKWARD
from ulbq.training.precision import Precision

_WITH_DATA = (
    *("calibration", "samples", "sequence_length", "batch_size", "activation_memory", "precision", "stream"),
    "deterministic",
)
# Bytes of each of a block's weights as its scores are written, in float32 and in half precision: those of inputs are
# products with weights, those of gradients quotients of sums, beside the weights.
_SCORED = {"magnitude": 6, "wanda": 10, "hessian": 8, "fisher": 14, "gradient": 14}
# The largest layer, as its scores are summed up: decoded, counted by their size, compared in float64.
_SUMMED = 20
# While the next block is read: it and the one before, with what that was scored by.
_TWO_BLOCKS, _TWO_BLOCKS_BACKWARD = 8, 12


# Beside the scores: a header and a scale for each layer, what manifest and page say of it, the page, and tokens.
_HEADER_BYTES, _TOLD_BYTES, _PAGE_BYTES, _TOKEN_BYTES = 188, 2650, 20_000, 4


# What does not change the scores and so is no part of a run's identity, or stands there as what it came to.
NOT_IN_FINGERPRINT = frozenset(
    {
        *("source", "out", "force", "data_dir", "offline", "activation_memory", "stream", "deterministic"),
        *("calibration", "device", "precision"),
    }
)


class SaliencyPlan(Record):
    """What a run would do and cost.

    Attributes:
        request: completed: defaults and the calibration source filled in.
        reads: how often the model that writes its samples is read block by block; 0 where it is loaded.
        peak_memory: predicted bytes of the process (CPU), or of process and device together.
        disk: predicted bytes of the artifact and of what lies on disk meanwhile.
        artifact: bytes of the scores.
    """

    request: SaliencyRequest
    model: str
    blocks: int
    layers: int
    weights: int
    device: str
    precision: str
    reads: int = 0
    peak_memory: int
    disk: int
    artifact: int


@dataclass(frozen=True)
class SaliencyJob:
    """Everything that is settled before the first tensor is read."""

    request: SaliencyRequest
    source: ModelSource
    model: PreTrainedModel
    found: ModelStructure
    settings: SaliencySettings
    plan: SaliencyPlan


def prepare(request: SaliencyRequest, progress: Progress, *, outline: bool = False) -> SaliencyJob:
    """Check a request and complete it.

    Args:
        request: what is asked for.
        progress: told what is chosen.
        outline: no tensor will be read, as of :func:`~ulbq.models.source.resolve`.

    Raises:
        UsageError: options that mean nothing to the kind, or no such calibration set.
        InputError: no such model, one that is quantized or incomplete, samples longer than the model takes, or no such
            file of samples.
        ResourceError: no such device, or no such data here and the network is off.
    """
    _check_options(request)
    if request.calibration is not None:
        check_calibration(request.calibration, data_dir=request.data_dir, offline=request.offline)
    device = runtime.resolve_device(request.device)
    source = resolve(request.source, offline=request.offline, outline=outline)
    source.tell(progress)
    if source.packed:
        raise InputError(
            f"'{source.given}' is quantized already: its weights have no gradients of their own.",
            hint=f"Give the full-precision model it was made from{f': {source.parent}' if source.parent else ''}.",
        )
    source.check_parent()
    request = _complete(request, 128 if device.type == "cuda" else 32, progress)
    precision = Precision.choose(device, request.precision or "fp32")
    model = skeleton(source)
    found = structure(model)
    check_complete(source, model)
    if request.kind != "magnitude":
        check_length(model, request.sequence_length or 0)
    whole = _writing(request, Sizes.of(model), model, precision, streamed=False)
    streamed = choose_streamed(request.stream, whole, device, progress)
    sized: dict[str, Any] = {"gguf_size": source.gguf_size, "halves": source.halves, "streamed": streamed}
    peak_memory, disk, artifact = predict_scoring(request, model, found, precision, **sized)
    reads = writing_passes(model.config, precision.dtype, *_amounts(request)) if streamed else 0
    disk += _TOLD_BYTES * len(found.layers) + _PAGE_BYTES + _TOKEN_BYTES * prod(_amounts(request)[:2])
    plan = SaliencyPlan(
        request=request,
        model=source.name,
        blocks=found.n_blocks,
        layers=len(found.layers),
        weights=sum(linear.weights for linear in found.layers),
        device=runtime.describe_device(device),
        precision=str(precision.dtype).removeprefix("torch."),
        reads=reads,
        peak_memory=peak_memory,
        disk=disk,
        artifact=artifact,
    )
    settings = SaliencySettings(
        kind=request.kind,
        precision=precision,
        dtype=request.dtype,
        batch_size=request.batch_size or 1,
        activation_memory=request.activation_memory or 0,
    )
    return SaliencyJob(request, source, model, found, settings, plan)


def _check_options(request: SaliencyRequest) -> None:
    if request.kind != "magnitude":
        return
    for name in _WITH_DATA:
        if getattr(request, name) is not None:
            raise UsageError(
                f"`{name}` means nothing to `kind=magnitude`, which looks at no data.",
                hint="It belongs to: fisher, gradient, hessian, wanda. Leave it out.",
            )


def _complete(request: SaliencyRequest, samples: int, progress: Progress) -> SaliencyRequest:
    """Fill in everything that was left open, so that the manifest says what was done."""
    if request.kind == "magnitude":
        return request
    defaults: dict[str, Any] = {"samples": samples, "sequence_length": 512, "batch_size": 4}
    defaults |= {"precision": "auto", "activation_memory": 4 * 2**30}
    if request.calibration is None:
        defaults["calibration"] = default_calibration(request, progress)
    return request.model_copy(
        update={name: value for name, value in defaults.items() if getattr(request, name) is None}
    )


def predict_scoring(
    request: SaliencyRequest,
    model: PreTrainedModel,
    found: ModelStructure,
    precision: Precision,
    *,
    gguf_size: int = 0,
    halves: bool = False,
    streamed: bool = False,
) -> tuple[int, int, int]:
    """Peak memory, disk and artifact of a completed request, in bytes; the last two as of ``predict``."""
    sizes, length = Sizes.of(model, halves=halves), request.sequence_length or 0
    layers = found.layers
    backward, samples = request.kind in BACKWARD, request.samples or 0
    artifact = sum(2 * x.in_features * (1 if request.kind == "hessian" else x.out_features) for x in layers)
    artifact += _HEADER_BYTES * len(layers)
    started = runtime.peak_memory() + runtime.LIBRARY_MEMORY + gguf_size
    written = 0 if request.kind == "hessian" else _SUMMED * layer_size(layers)
    block = max(sizes.inside)
    memory, disk = _SCORED[request.kind] * block + written, artifact
    if request.kind != "magnitude":
        store, limit = FLOAT * samples * length * sizes.hidden, request.activation_memory or 0
        every = kept_every(found.n_blocks, fits=store * (found.n_blocks + 1) <= limit)
        activations = store * (kept_stores(found.n_blocks, every) if backward else 1)
        kept = min(activations, limit)
        together = min(request.batch_size or 1, samples or 1) * length
        step = together * passed_activations(sizes.hidden, wide(layers))
        if backward:
            # One sequence after the other; the float32 of what is between the products is torch's to keep.
            step = max(step, length * trained_activations(sizes.hidden, wide(layers), FLOAT))
            ending = FLOAT * sizes.ending + 2 * sizes.head_at_work(precision.dtype.itemsize)
            memory = max(memory, ending + head_memory(sizes.vocabulary, length, precision.device))
        two = _TWO_BLOCKS_BACKWARD if backward else _TWO_BLOCKS
        memory = max(memory + kept, two * block + kept + step, sizes.walk_begins(kept))
        disk += activations - kept
    memory = max(memory, _writing(request, sizes, model, precision, streamed=streamed))
    return started + memory, disk, artifact


def _writing(
    request: SaliencyRequest, sizes: Sizes, model: PreTrainedModel, precision: Precision, *, streamed: bool
) -> int:
    """Bytes of the model that writes its own samples; 0 where none does."""
    if request.calibration != "self":
        return 0
    samples, length, room = _amounts(request)
    return sizes.writing(model.config, precision.dtype, samples, length, room if streamed else None)


def _amounts(request: SaliencyRequest) -> tuple[int, int, int]:
    return request.samples or 0, request.sequence_length or 0, request.activation_memory or 0
