"""What a quantization run will cost, told before it starts."""

from pydantic import BaseModel, ConfigDict

from ulbq import formats, runtime
from ulbq.methods.base import Method
from ulbq.models.blocks import ModelStructure
from ulbq.pipeline.request import QuantizeRequest

# Float32 copies of a block's weights that live at the peak: the block itself, latents, gradient, two moments, and the
# snapshots of the start and of the best epoch; the rest is masks and half-precision copies inside one step.
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


def predict(request: QuantizeRequest, method: Method, found: ModelStructure, hidden: int, outer_weights: int) -> Cost:
    """Predict memory and disk of a run.

    Args:
        request: completed.
        hidden: width of the hidden states.
        outer_weights: number of parameters outside the blocks.
    """
    layers = [linear for block in found.linears for linear in block]
    packed = sum(
        formats.bits_per_weight(method.scheme, linear.out_features, linear.in_features)
        * (linear.out_features * linear.in_features)
        for linear in layers
    )
    artifact = round(packed / 8) + outer_weights * 2
    largest = max(sum(linear.out_features * linear.in_features for linear in block) for block in found.linears)
    copies = _TRAINING_COPIES if method.epochs else _PLAIN_COPIES
    memory = runtime.peak_memory() + round(copies * 4 * largest)
    disk = artifact
    if method.calibrated:
        samples, length = request.samples or 0, request.sequence_length or 0
        held = samples + heldout_samples(samples)
        streams = (3 if method.augmented else 2) * held * length * hidden * 4
        memory += min(streams, request.activation_memory) + outer_weights * 4
        disk += max(0, streams - request.activation_memory)
        memory += (request.batch_size or 1) * length * hidden * 4 * _STEP_ACTIVATIONS
    else:
        memory += outer_weights * 2
    return Cost(peak_memory=memory, disk=disk, artifact=artifact)


def heldout_samples(samples: int) -> int:
    """Samples that are drawn beyond the training ones to choose the best epoch: an eighth, at least two."""
    return max(2, samples // 8)
