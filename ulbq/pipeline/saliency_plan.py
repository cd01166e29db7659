"""What ``saliency`` is asked to do, and everything about a run that is settled before the first tensor is read."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from ulbq import runtime
from ulbq.blockwise.walk import check_length
from ulbq.config.saliency import SaliencyRequest
from ulbq.data.calibration import check_calibration
from ulbq.data.generate import writing_memory
from ulbq.errors import InputError, UsageError
from ulbq.models.blocks import ModelStructure, block_list, skeleton, structure
from ulbq.models.names import check_complete
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.samples import default_calibration
from ulbq.progress import Progress
from ulbq.sensitivity import SaliencySettings
from ulbq.sensitivity.head import head_memory
from ulbq.sensitivity.settings import BACKWARD
from ulbq.training.precision import Precision

_WITH_DATA = ("calibration", "samples", "sequence_length", "batch_size", "activation_memory", "precision")
# Float32 copies of a block's weights at the peak: the block and the sums, or the block alone; and one layer's gradient
# or scores beside them, with its bins.
_BACKWARD_COPIES = 2.5
_FORWARD_COPIES = 1.5
# Hidden-sized float32 activations of one sequence that autograd keeps.
_STEP_ACTIVATIONS = 40


# What does not change the scores and so is no part of a run's identity, or stands there as what it came to.
NOT_IN_FINGERPRINT = frozenset(
    {
        *("source", "out", "force", "data_dir", "offline", "activation_memory"),
        *("calibration", "device", "precision"),
    }
)


class SaliencyPlan(BaseModel):
    """What a run would do and cost.

    Attributes:
        request: completed: defaults and the calibration source filled in.
        peak_memory: predicted bytes of the process (CPU), or of process and device together.
        disk: predicted bytes of the artifact and of what lies on disk meanwhile.
        artifact: bytes of the scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: SaliencyRequest
    model: str
    blocks: int
    layers: int
    weights: int
    device: str
    precision: str
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


def prepare(request: SaliencyRequest, progress: Progress) -> SaliencyJob:
    """Check a request and complete it.

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
    source = resolve(request.source, offline=request.offline)
    source.tell(progress)
    if source.packed:
        raise InputError(
            f"'{source.given}' is quantized already: its weights have no gradients of their own.",
            hint=f"Give the full-precision model it was made from{f': {source.parent}' if source.parent else ''}.",
        )
    request = _complete(request, 128 if device.type == "cuda" else 32, progress)
    precision = Precision.choose(device, request.precision or "fp32")
    model = skeleton(source)
    found = structure(model)
    check_complete(source, model)
    if request.kind != "magnitude":
        check_length(model, request.sequence_length or 0)
    settings = SaliencySettings(
        kind=request.kind,
        precision=precision,
        dtype=request.dtype,
        batch_size=request.batch_size or 1,
        activation_memory=request.activation_memory or 0,
    )
    layers = [linear for block in found.linears for linear in block]
    peak_memory, disk, artifact = predict_scoring(request, model, found, precision, gguf_size=source.gguf_size)
    plan = SaliencyPlan(
        request=request,
        model=source.name,
        blocks=found.n_blocks,
        layers=len(layers),
        weights=sum(linear.out_features * linear.in_features for linear in layers),
        device=runtime.describe_device(device),
        precision=str(precision.dtype).removeprefix("torch."),
        peak_memory=peak_memory,
        disk=disk,
        artifact=artifact,
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
) -> tuple[int, int, int]:
    """Peak memory, disk and artifact of a completed request, in bytes; ``gguf_size`` as of ``predict``."""
    config = model.config.get_text_config()
    hidden, length = config.hidden_size, request.sequence_length or 0
    layers = [linear for block in found.linears for linear in block]
    backward = request.kind in BACKWARD
    artifact = sum(2 * x.in_features * (1 if request.kind == "hessian" else x.out_features) for x in layers)
    blocks = [sum(p.numel() for p in block.parameters()) for block in block_list(model)[1]]
    weights = sum(p.numel() for p in model.parameters())
    started = runtime.peak_memory() + runtime.LIBRARY_MEMORY
    copies = _BACKWARD_COPIES if backward else _FORWARD_COPIES
    memory, disk = started + gguf_size + round(4 * copies * max(blocks)), artifact
    if request.kind != "magnitude":
        sequence = length * hidden * 4
        activations = (request.samples or 0) * sequence * (found.n_blocks + 1 if backward else 1)
        kept = min(activations, request.activation_memory or 0)
        at_once = 1 if backward else min(request.batch_size or 1, request.samples or 1)
        # The embeddings, or the head, are there while no block is.
        outside = 4 * (weights - sum(blocks)) + (head_memory(config.vocab_size, length) if backward else 0)
        memory += kept + max(at_once * sequence * _STEP_ACTIVATIONS, outside)
        disk += activations - kept
    if request.calibration == "self":
        # To write, the model is loaded whole.
        beside = writing_memory(model.config, precision.dtype, request.samples or 0, length)
        memory = max(memory, started + weights * precision.dtype.itemsize + beside)
    return memory, disk, artifact
