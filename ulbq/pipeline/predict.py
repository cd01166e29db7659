"""What a quantization run will cost, told before it starts."""

from math import prod

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from ulbq import formats, runtime
from ulbq.methods.base import Method
from ulbq.models.blocks import ModelStructure, block_list
from ulbq.pipeline.request import QuantizeRequest
from ulbq.training.precision import Precision

# Float32 copies of a block's linear weights that live at the peak: the block itself, latents, gradient, two moments,
# and the snapshots of the start and of the best epoch; the rest is masks and half-precision copies inside one step.
_TRAINING_COPIES = 9.0
_PLAIN_COPIES = 3.5
# Hidden-sized float32 activations of one step that autograd keeps, in units of the batch's hidden states.
_STEP_ACTIVATIONS = 40
# Float32 copies of a step's logits, of student and teacher together: themselves, log-probabilities, gradients.
_LOGITS = 7
# Float32 copies of one block's weights while it runs: the quantized weight, its gradient, and what autograd keeps.
_QUANTIZED_COPIES = 4


class Cost(BaseModel):
    """Predicted cost of a run, in bytes.

    Attributes:
        peak_memory: largest resident memory of the process (CPU), or of process and device together.
        disk: the artifact plus what lies on disk meanwhile.
        artifact: the finished folder's weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak_memory: int
    disk: int
    artifact: int


def predict(
    request: QuantizeRequest, method: Method, found: ModelStructure, model: PreTrainedModel, precision: Precision
) -> Cost:
    """Predict memory and disk of a run.

    Args:
        request: completed.
        model: the skeleton of which ``found`` tells.
        precision: of the run.
    """
    hidden = model.config.get_text_config().hidden_size
    layers = [linear for block in found.linears for linear in block]
    packed = sum(
        formats.bits_per_weight(method.scheme, linear.out_features, linear.in_features)
        * (linear.out_features * linear.in_features)
        for linear in layers
    )
    quantized = [sum(linear.out_features * linear.in_features for linear in block) for block in found.linears]
    blocks = [sum(p.numel() for p in block.parameters()) for block in block_list(model)[1]]
    weights = sum(p.numel() for p in model.parameters())
    outer = weights - sum(blocks)
    artifact = round(packed / 8) + (weights - sum(quantized)) * 2
    copies = _TRAINING_COPIES if method.needs.epochs else _PLAIN_COPIES
    # What a block holds beside its linear layers (experts, for one) is there once.
    largest = max(copies * inside + (block - inside) for inside, block in zip(quantized, blocks, strict=True))
    started = runtime.peak_memory()
    memory = started + round(4 * largest)
    disk = artifact
    if method.calibrated:
        samples, length = request.samples or 0, request.sequence_length or 0
        held = samples + heldout_samples(samples)
        streams = (2 + method.needs.augmented + method.needs.originals) * held * length * hidden * 4
        memory += min(streams, request.activation_memory or 0) + outer * 4
        disk += max(0, streams - request.activation_memory or 0)
        memory += min(request.batch_size or 1, held) * length * hidden * 4 * _STEP_ACTIVATIONS
    else:
        memory += outer * 2
    whole, kept = _end_to_end(request, method, found, model, precision)
    # On top: most of what the blocks leave behind stays with the allocator, in pieces that the whole does not fit.
    memory += whole
    disk += kept and kept + artifact
    if request.calibration == "self":
        # To write, the model is loaded whole.
        memory = max(memory, started + weights * precision.dtype.itemsize)
    return Cost(peak_memory=memory, disk=disk, artifact=artifact)


def _end_to_end(
    request: QuantizeRequest, method: Method, found: ModelStructure, model: PreTrainedModel, precision: Precision
) -> tuple[int, int]:
    """Bytes of memory that the end-to-end phase needs at its peak, and of its states on disk; 0 without one.

    The student lies there in float32, latents for weights, and the teacher in the dtype of the products; whatever
    trains has a gradient and two moments. One block's activations and quantized weights live at a time, beside the
    hidden states before every block, and the logits with what the loss makes of them.
    """
    settings = method.needs.end_to_end
    if settings is None:
        return 0, 0
    weights = sum(p.numel() for p in model.parameters())
    quantized = [sum(linear.out_features * linear.in_features for linear in block) for block in found.linears]
    beside = _trained_beside_weights(method, found)
    trained = beside + (sum(quantized) if settings.train == "all" else 0)
    config = model.config.get_text_config()
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    tokens = settings.batch_size * (request.sequence_length or 0)
    teacher = weights * precision.dtype.itemsize if settings.taught else 0
    if settings.teacher == "cached":
        # It is gone before the student comes.
        cached = (request.samples or 0) * (request.sequence_length or 0) * (settings.top_k * 8 + 4)
        teacher = min(cached, request.activation_memory or 0)
    states = tokens * hidden * 4 * found.n_blocks * (3 if settings.loss == "kl-hidden" else 1)
    step = tokens * (hidden * _STEP_ACTIVATIONS + vocabulary * _LOGITS) * 4
    memory = 4 * (weights + beside) + 12 * trained + teacher + states + step + max(quantized) * 4 * _QUANTIZED_COPIES
    # Values and moments, of the best epoch and of the last one.
    return memory, 2 * 12 * trained


def _trained_beside_weights(method: Method, found: ModelStructure) -> int:
    """Parameters of scales, router and adapters; norms are too few to count."""
    count = 0
    for linear in (linear for block in found.linears for linear in block):
        shape = (linear.out_features, linear.in_features)
        specs = method.scheme.tensors(*shape).values()
        small = [spec for spec in specs if spec.role != "codes"]
        # Zero points are packed by the bit, and there is one for every scale.
        scales = sum(prod(spec.shape) for spec in small if spec.role != "zeros")
        count += scales * 2 if len(small) > 1 else scales
        adapter = method.needs.adapter
        if adapter is not None and adapter.matches(linear.name):
            count += adapter.bits(*shape) // 16
    return count


def heldout_samples(samples: int) -> int:
    """Samples that are drawn beyond the training ones to choose the best epoch: an eighth, at least two."""
    return max(2, samples // 8)
