"""What a quantization run will cost, told before it starts."""

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
    copies = _TRAINING_COPIES if method.epochs else _PLAIN_COPIES
    # What a block holds beside its linear layers (experts, for one) is there once.
    largest = max(copies * inside + (block - inside) for inside, block in zip(quantized, blocks, strict=True))
    started = runtime.peak_memory()
    memory = started + round(4 * largest)
    disk = artifact
    if method.calibrated:
        samples, length = request.samples or 0, request.sequence_length or 0
        held = samples + heldout_samples(samples)
        streams = (3 if method.augmented else 2) * held * length * hidden * 4
        memory += min(streams, request.activation_memory or 0) + outer * 4
        disk += max(0, streams - request.activation_memory or 0)
        memory += min(request.batch_size or 1, held) * length * hidden * 4 * _STEP_ACTIVATIONS
    else:
        memory += outer * 2
    if request.calibration == "self":
        # To write, the model is loaded whole.
        memory = max(memory, started + weights * precision.dtype.itemsize)
    return Cost(peak_memory=memory, disk=disk, artifact=artifact)


def heldout_samples(samples: int) -> int:
    """Samples that are drawn beyond the training ones to choose the best epoch: an eighth, at least two."""
    return max(2, samples // 8)
