"""What a quantization run will cost, told before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter
from transformers import PreTrainedModel

from ulbq import formats, runtime
from ulbq.config.quantize import Quantization
from ulbq.config.saliency import SaliencyKind, SaliencyRequest
from ulbq.data.generate import writing_memory
from ulbq.finetuning.head import LOGITS_MEMORY
from ulbq.formats import AnyScheme
from ulbq.methods.base import Method
from ulbq.models.blocks import Linear, ModelStructure, block_list
from ulbq.pipeline.saliency_plan import predict_scoring
from ulbq.quantizers.trainable import TRAINABLE
from ulbq.sensitivity import KINDS, SaliencySettings
from ulbq.sensitivity.head import head_memory
from ulbq.training.precision import Precision

# Float32 copies of a block's linear weights that live at the peak: the block itself, latents, gradient, two moments,
# and the snapshots of the start and of the best epoch; the rest is masks and half-precision copies inside one step.
_TRAINING_COPIES = 9.0
_PLAIN_COPIES = 3.5
# The same where columns are compensated: the weights as they came and as they became, and of the layers that read one
# input the values, codes and errors of all columns, beside what the search of the grids tries.
_COMPENSATED_COPIES = 7.0
# Float32 copies of the largest second moments while they are factored in float64.
_FACTOR_COPIES = 10
# More of them where scores weigh a penalty: the scores as read and as they count, and what autograd keeps of the
# distance to the full-precision weights and of its square.
_PENALTY_COPIES = 4
# Float32 copies of a block's adapters: values, gradient, two moments, two snapshots.
_ADAPTER_COPIES = 6
# Hidden-sized float32 activations of one step that autograd keeps, in units of the batch's hidden states.
_STEP_ACTIVATIONS = 40
# Float32 copies of one block's weights while it runs: the quantized weight, its gradient, and what autograd keeps.
_QUANTIZED_COPIES = 4
# Bytes of a tokenizer's files for each token of the vocabulary, as measured on SmolLM2's.
_TOKENIZER_BYTES = 72


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


class _Need(NamedTuple):
    """Bytes of a phase."""

    memory: int
    disk: int


def predict(
    request: Quantization,
    method: Method,
    found: ModelStructure,
    model: PreTrainedModel,
    precision: Precision,
    *,
    gguf_size: int = 0,
    blocks_stay: bool = False,
) -> Cost:
    """Predict memory and disk of a run.

    Args:
        request: in full.
        model: the skeleton of which ``found`` tells.
        precision: of the run.
        gguf_size: bytes of the model's GGUF file, which is mapped and dequantized; 0 where it has none.
        blocks_stay: an artifact's blocks are taken as they are.
    """
    run = _Sizes(request, method, found, model, precision, gguf_size)
    adapters = 2 * sum(run.adapter_values(block) for block in found.linears)
    artifact = run.packed() + (run.weights - sum(run.quantized)) * 2 + adapters
    started = runtime.peak_memory() + runtime.LIBRARY_MEMORY
    blocks, whole = run.untouched() if blocks_stay else run.blocks(), run.end_to_end()
    # On top: most of what the blocks leave behind stays with the allocator, in pieces that the whole does not fit.
    memory = started + blocks.memory + max(whole.memory, run.temperature())
    # The adapters lie in the scratch folder too, the tuned blocks beside those whose places they take.
    beside = adapters + _TOKENIZER_BYTES * run.vocabulary
    disk = artifact + beside + max(blocks.disk, whole.disk and whole.disk + artifact)
    if method.needs.saliency in KINDS and not blocks_stay:
        peak, on_disk, scores = run.scoring()
        memory, disk = max(memory, peak), max(disk + scores, on_disk)
    if "self" in (request.calibration, request.text):
        memory = max(memory, started + run.writing())
    return Cost(peak_memory=memory, disk=disk, artifact=artifact)


@dataclass
class _Sizes:
    """The sizes of a run, and what its phases make of them."""

    request: Quantization
    method: Method
    found: ModelStructure
    model: PreTrainedModel
    precision: Precision
    gguf_size: int

    def __post_init__(self) -> None:
        config = self.model.config.get_text_config()
        self.hidden, self.vocabulary = int(config.hidden_size), int(config.vocab_size)
        self.needs = self.method.needs
        self.samples, self.length = self.request.samples, self.request.sequence_length
        self.limit = self.request.activation_memory
        self.weights = sum(p.numel() for p in self.model.parameters())
        # Of each block: all of its parameters, and those in the layers that are quantized.
        self.inside = [sum(p.numel() for p in block.parameters()) for block in block_list(self.model)[1]]
        self.quantized = [sum(x.out_features * x.in_features for x in block) for block in self.found.linears]

    def packed(self) -> int:
        """Bytes of all packed layers."""
        return round(
            planned_bits(self.method, [x for block in self.found.linears for x in block]) * sum(self.quantized) / 8
        )

    def adapter_values(self, linears: Sequence[Linear]) -> int:
        """Parameters of some layers' adapters."""
        adapter = self.needs.adapter
        if adapter is None:
            return 0
        return sum(adapter.bits(x.out_features, x.in_features) for x in linears if adapter.matches(x.name)) // 16

    def scoring(self) -> tuple[int, int, int]:
        """Bytes of scoring the weights first: memory at its peak, that of the process included; disk; the scores."""
        asked = SaliencyRequest(
            kind=TypeAdapter(SaliencyKind).validate_python(self.needs.saliency),
            samples=self.samples,
            sequence_length=self.length,
            batch_size=SaliencySettings.batch_size,
            activation_memory=self.limit,
        )
        return predict_scoring(asked, self.model, self.found, self.precision, gguf_size=self.gguf_size)

    def writing(self) -> int:
        """Bytes of the model that writes its own samples, loaded whole, and of the texts that it writes at once."""
        request = self.request
        drawn = request.drawn_samples if request.calibration == "self" else request.text_samples
        beside = writing_memory(self.model.config, self.precision.dtype, drawn + heldout_samples(drawn), self.length)
        return self.weights * self.precision.dtype.itemsize + beside

    def blocks(self) -> _Need:
        """The walk over the blocks, beside the artifact."""
        outer = self.weights - sum(self.inside)
        largest = max(map(self._block, range(self.found.n_blocks)))
        if not self.method.Options.calibrated:
            # What is no block is copied first, in half precision; out of a GGUF file it is float32 before.
            copied = self.gguf_size + 6 * outer if self.gguf_size else 2 * outer
            return _Need(max(4 * largest + self.gguf_size, copied), 0)
        held = self.samples + heldout_samples(self.samples)
        # Each has its share of the memory, and lies on disk whole where that is not enough.
        stores = [4 * held * self.length * width for width in self._widths()]
        kept = sum(size for size in stores if size <= self.limit // self.needs.stores)
        step = min(self.request.batch_size, held) * self.length * self.hidden * _STEP_ACTIVATIONS
        return _Need(4 * (largest + outer + step) + kept + self.gguf_size, sum(stores) - kept)

    def untouched(self) -> _Need:
        """Copying blocks that stay: one of them in float32, to say how far its layers are from the model's."""
        return _Need(4 * max(self.inside), 0)

    def _block(self, index: int) -> int:
        """Float32 values that live at the peak of one block's work."""
        quantized, inside = self.quantized[index], self.inside[index]
        copies = _TRAINING_COPIES if self.needs.epochs else _PLAIN_COPIES
        if self.needs.hessians != "none":
            copies = max(copies, _COMPENSATED_COPIES)
        if self.needs.saliency is not None:
            copies += _PENALTY_COPIES
        # What a block holds beside its linear layers (experts, for one) is there once; a reference is a second block.
        beside = inside - quantized + (inside if self.needs.originals else 0)
        adapters = _ADAPTER_COPIES * self.adapter_values(self.found.linears[index])
        return round(copies * quantized) + beside + adapters + self._hessians(index)

    def _hessians(self, index: int) -> int:
        """Float32 values of the second moments of a block's inputs that live at once, and of factoring the largest."""
        if self.needs.hessians == "none":
            return 0
        # Layers of one parent that are as wide read the same input, as far as names tell; experts come all at once.
        inputs = {(linear.name.rpartition(".")[0], linear.in_features) for linear in self.found.linears[index]}
        live: dict[tuple[str, int], int] = {}
        for parent, columns in inputs:
            _, _, inside = parent.partition(f"{self.found.blocks_prefix}.{index}")
            place = ".".join("*" if part.isdigit() else part for part in inside.split("."))
            live[place, columns] = live.get((place, columns), 0) + columns**2
        at_once = max(live.values()) if self.needs.hessians == "sequence" else sum(live.values())
        return at_once + _FACTOR_COPIES * max(columns for _, columns in inputs) ** 2

    def _widths(self) -> list[int]:
        """Values a token in each store of activations, as :attr:`Needs.stores` lists them."""
        widths = [self.hidden] * (2 + self.needs.augmented + self.needs.originals)
        if not self.needs.originals:
            return widths
        # Layers that read the same input, as far as names and shapes tell: the widest have the widest stores.
        groups: dict[tuple[str, int], int] = {}
        for linear in (linear for block in self.found.linears for linear in block):
            key = (linear.name.rpartition(".")[0], linear.in_features)
            groups[key] = groups.get(key, 0) + linear.out_features
        outputs = 1 + self.needs.augmented
        (_, columns), rows = max(groups.items(), key=lambda group: 2 * group[0][1] + outputs * group[1])
        return widths + [columns] * 2 + [rows] * outputs

    def temperature(self) -> int:
        """Bytes of fitting the temperature: a block, the held-out streams, the head in float32, logits of a chunk."""
        if not self.request.fit_temperature:
            return 0
        outer = self.weights - sum(self.inside)
        positions = heldout_samples(self.samples) * self.length
        streams = 2 * positions * self.hidden
        return 4 * (max(self.inside) + streams + outer) + head_memory(self.vocabulary, positions)

    def end_to_end(self) -> _Need:
        """The end-to-end phase: memory on top of the blocks', and its states on disk; 0 without one.

        The student lies there packed where its codes are fixed, else in float32, latents for weights, with embeddings
        and head in the dtype of the products; so does the teacher. Whatever trains has a gradient and two moments. One
        block's activations and quantized weights live at a time, beside the hidden states before every block, and the
        logits of one chunk of positions with what the loss makes of them.
        """
        settings = self.needs.end_to_end
        if settings is None:
            return _Need(0, 0)
        beside = self._trained_beside_weights()
        trained = beside + (sum(self.quantized) if settings.train == "all" else 0)
        tokens = settings.together(self.length) * self.length
        teacher, cached = self.weights * self.precision.dtype.itemsize if settings.needs_teacher else 0, 0
        if settings.teacher == "cached":
            # It is gone before the student comes.
            drawn = self.request.text_samples
            guesses = (drawn + heldout_samples(drawn)) * self.length * (settings.teacher_top_k * 8 + 4)
            teacher = min(guesses, self.limit)
            cached = guesses - teacher
        states = tokens * self.hidden * 4 * self.found.n_blocks * (3 if settings.loss == "kl-hidden" else 1)
        step = tokens * self.hidden * _STEP_ACTIVATIONS * 4 + LOGITS_MEMORY
        outer = self.precision.dtype.itemsize * (self.weights - sum(self.inside))
        inside = sum(self.inside) * 4
        if settings.train != "all":
            a_weight = TRAINABLE[self.method.scheme.format].fixed_bytes
            held = self.packed() if a_weight is None else round(a_weight * sum(self.quantized))
            inside = held + 4 * (sum(self.inside) - sum(self.quantized))
        student = outer + inside + 4 * beside + 12 * trained
        memory = student + teacher + states + step + max(self.quantized) * 4 * _QUANTIZED_COPIES
        # Values and moments, of the best epoch and of the last one.
        return _Need(memory, 2 * 12 * trained + cached)

    def _trained_beside_weights(self) -> int:
        """Parameters of scales, router and adapters; norms are too few to count."""
        layers = [linear for block in self.found.linears for linear in block]
        count = self.adapter_values(layers)
        for linear in layers:
            specs = self.method.scheme.tensors(linear.out_features, linear.in_features).values()
            small = [spec for spec in specs if spec.role != "codes"]
            # Zero points are packed by the bit, and there is one for every scale.
            scales = sum(prod(spec.shape) for spec in small if spec.role != "zeros")
            count += scales * 2 if len(small) > 1 else scales
        return count


def scheme_bits(scheme: AnyScheme, layers: Sequence[Linear]) -> float:
    """Bits a weight of some layers that are all stored by one scheme."""
    shapes = [(linear.out_features, linear.in_features) for linear in layers]
    stored = sum(formats.bits_per_weight(scheme, *shape) * prod(shape) for shape in shapes)
    return stored / sum(map(prod, shapes))


def planned_bits(method: Method, layers: Sequence[Linear]) -> float:
    """True bits a weight that a method will store of all layers, without adapters."""
    return max(scheme_bits(method.scheme, layers) + method.needs.extra_bits, method.needs.target_bits or 0.0)


def heldout_samples(samples: int) -> int:
    """Samples that are drawn beyond the training ones to choose the best epoch: an eighth, at least two."""
    return max(2, samples // 8)
