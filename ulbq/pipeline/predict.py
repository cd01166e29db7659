"""What a quantization run will cost, told before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from transformers import PreTrainedModel

from ulbq import distributed, formats, runtime
from ulbq.artifacts.shards import EXPERT
from ulbq.config.finetuning import FinetuneSettings
from ulbq.config.quantize import Quantization
from ulbq.config.saliency import SaliencyKind, SaliencyRequest
from ulbq.data.generate import writing_passes
from ulbq.finetuning.head import logits_memory
from ulbq.finetuning.teacher import TEACHER_COPIES
from ulbq.finetuning.trainer import LOGIT_COPIES, LOGIT_COPIES_TAUGHT
from ulbq.formats import AnyScheme
from ulbq.methods.base import Method
from ulbq.methods.rtn import PACKING_BYTES
from ulbq.models.blocks import Linear, ModelStructure
from ulbq.pipeline.memory import (
    FLOAT,
    HALF,
    OPENED_COPIES,
    TABLE_PART,
    Sizes,
    compared_layer,
    input_groups,
    layer_size,
    load_memory,
    part_of_blocks,
    passed_activations,
    solving_memory,
    trained_activations,
    trained_layer,
    wide,
)
from ulbq.pipeline.saliency_plan import predict_scoring
from ulbq.quantizers.trainable import TRAINABLE
from ulbq.sensitivity import KINDS, SaliencySettings
from ulbq.sensitivity.head import head_memory
from ulbq.training.precision import Precision

# Float32 copies of a block's adapters: values, gradient, two moments, two snapshots.
_ADAPTER_COPIES = 6
# Of each value outside the blocks as it is copied: half precision; out of a GGUF file it is float32 before.
_COPIED, _COPIED_FROM_GGUF = 2, 6

_NOTHING_KEPT = 1
"""Memory for activations that holds none of them."""

# Bytes of a tokenizer's files for each token of the vocabulary, as measured on SmolLM2's.
_TOKENIZER_BYTES = 72
# What torch imports as it checkpoints and clips.
_TRAINING_LIBRARY = 45 << 20


class Cost(BaseModel):
    """Predicted cost of a run, in bytes.

    Attributes:
        peak_memory: largest resident memory of the process.
        device_memory: the most that is taken on a GPU; 0 where the run has none.
        disk: the artifact plus what lies on disk meanwhile.
        artifact: the finished folder's weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak_memory: int
    device_memory: int = 0
    disk: int
    artifact: int


class _Need(NamedTuple):
    """Bytes of a phase.

    Attributes:
        memory: all of it, on a CPU.
        host: where the work is done on a GPU, what is in the process's memory.
        device: and what is on the GPU at least; None for the rest of ``memory``.
    """

    memory: int
    host: int = 0
    disk: int = 0
    device: int | None = None

    def at_work(self, device: torch.device) -> int:
        """Bytes where it computes: on a GPU, or in the process's memory, which is all there is then."""
        if device.type != "cuda":
            return self.memory
        return self.memory - self.host if self.device is None else self.device


def predict(run: "RunSizes", *, blocks_stay: bool = False) -> Cost:
    """Predict memory and disk of a run. With ``blocks_stay`` an artifact's blocks are taken as they are."""
    whole_tables, packed_tables = run.tables_held()
    adapters = 2 * sum(run.adapter_values(block) for block in run.found.linears)
    artifact = run.packed() + 2 * (run.sizes.weights - sum(run.quantized) - whole_tables) + packed_tables + adapters
    started = runtime.peak_memory() + runtime.LIBRARY_MEMORY
    blocks, whole = run.untouched() if blocks_stay else run.blocks(), run.end_to_end()
    # One phase after the other: what one leaves free goes back to the system.
    phases = [run.copying(), blocks, run.temperature(), whole]
    if run.writes:
        phases.append(_Need(run.writing()))
    on_gpu = run.precision.device.type == "cuda"
    device = max(phase.at_work(run.precision.device) for phase in phases) if on_gpu else 0
    # What goes to a GPU passes the process's memory, one tensor after the other.
    held = (phase.host + run.passing() if on_gpu else phase.memory for phase in phases)
    memory = started + run.gguf_size + max(held)
    # Opened again at the end; block by block where all of it would be the most there is.
    opened = load_memory(artifact, 2 * run.sizes.table)
    if OPENED_COPIES * artifact > memory:
        # A block as it is read, and in the layout of its products.
        block = 2 * run.packed() // run.found.n_blocks
        ending = run.sizes.ending + run.sizes.head
        opened = _COPIED * max(run.sizes.embedded, ending) + block
    memory = max(memory, started + opened)
    # Adapters and tables lie in the scratch folder too, the tuned blocks beside those whose places they take.
    beside = adapters + packed_tables + _TOKENIZER_BYTES * run.sizes.vocabulary
    tuned = whole.disk and whole.disk + run.packed() + adapters
    disk = artifact + beside + max(blocks.disk, tuned)
    if run.needs.saliency in KINDS and not blocks_stay:
        kind: SaliencyKind = TypeAdapter(SaliencyKind).validate_python(run.needs.saliency)
        peak, on_disk, scores = run.scoring(kind)
        memory, device = run.placed(kind, memory, device, started, peak)
        disk = max(disk + scores, on_disk)
    if run.needs.output_groups and not blocks_stay:
        costs = [run.output_costs(block) for block in run.found.linears]
        peak, on_disk, _ = run.scoring("fisher")
        memory, device = run.placed("fisher", memory, device, started, peak + max(costs))
        disk = max(disk, on_disk) + sum(costs)
    return Cost(peak_memory=memory, device_memory=device, disk=disk, artifact=artifact)


def trained_memory(run: "RunSizes", *, blocks_stay: bool = False) -> int:
    """Bytes, where it computes, of training in each process with all that trains, the teacher being read by blocks.

    0 where nothing trains; ``blocks_stay`` as in :func:`predict`. A block counts with one sample at once: training goes
    down to that by itself where there is no room for more, but not in parts.
    """
    run = replace(run, streamed=True)
    options = run.request.options.model_copy(update={"micro_batch": 1})
    single = replace(run, request=run.request.model_copy(update={"options": options}))
    blocks = single.blocks().at_work(run.precision.device) if run.needs.epochs and not blocks_stay else 0
    return max(blocks, run.end_to_end().at_work(run.precision.device))


def whole_memory(run: "RunSizes") -> int:
    """Bytes, where it computes, of the largest phase that wants all of the full-precision model, if it is loaded.

    0 without such a phase.
    """
    run, settings = replace(run, streamed=False), run.needs.end_to_end
    needs_teacher = settings is not None and settings.needs_teacher
    taught = run.end_to_end().at_work(run.precision.device) if needs_teacher else 0
    return max(taught, run.writing() if run.writes else 0)


def whole_passes(run: "RunSizes") -> int:
    """How often all of the full-precision model is read in a run that reads it block by block."""
    settings, passes = run.needs.end_to_end, 0
    if run.writes:
        passes += writing_passes(run.model.config, run.precision.dtype, run.drawn(), run.length, run.limit)
    if settings is not None and settings.needs_teacher:
        passes += 1 if settings.teacher == "cached" else run.taught_batches(settings)
    return passes


@dataclass
class RunSizes:
    """The sizes of a run, and what its phases make of them.

    Attributes:
        request: in full.
        model: the skeleton of which ``found`` tells.
        gguf_size: bytes of the model's GGUF file, which is mapped and dequantized; 0 where it has none.
        halves: its matrices are stored in half precision.
        streamed: where all of the full-precision model is wanted, its blocks are read one after the other.
        sharded: each process holds a part of the blocks of a whole model that trains, and of its teacher; of a block
            that trains alone it holds a part of all but the weights.
        tables: matrices outside the blocks that are packed, and how.
        schemes: of the layers that have one of their own, by full name.
    """

    request: Quantization
    method: Method
    found: ModelStructure
    model: PreTrainedModel
    precision: Precision
    gguf_size: int = 0
    halves: bool = False
    streamed: bool = False
    sharded: bool = False
    tables: Mapping[Linear, AnyScheme] = field(default_factory=dict)
    schemes: Mapping[str, AnyScheme] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = Sizes.of(self.model, halves=self.halves, rotated=self.request.rotate)
        self.needs = self.method.needs
        self.samples, self.length = self.request.samples, self.request.sequence_length
        self.limit = self.request.activation_memory
        self.itemsize = self.precision.dtype.itemsize
        self.layers = [linear for block in self.found.linears for linear in block]
        # Of each block, in the layers that are quantized.
        self.quantized = [sum(x.out_features * x.in_features for x in block) for block in self.found.linears]

    @property
    def writes(self) -> bool:
        """Whether the model writes samples itself."""
        return "self" in (self.request.calibration, self.request.text)

    def packed(self) -> int:
        """Bytes of all packed layers."""
        return round(planned_bits(self.method, self.layers, self.schemes) * sum(self.quantized) / 8)

    def adapter_values(self, linears: Sequence[Linear]) -> int:
        """Parameters of some layers' adapters."""
        adapter = self.needs.adapter
        if adapter is None:
            return 0
        return sum(adapter.bits(x.out_features, x.in_features) for x in linears if adapter.matches(x.name)) // 16

    def placed(self, kind: SaliencyKind, memory: int, device: int, started: int, peak: int) -> tuple[int, int]:
        """The host's and a GPU's bytes, scoring counted: activations that are kept lie on the host of a GPU."""
        if self.precision.device.type != "cuda":
            return max(memory, peak), 0
        kept = peak - self.scoring(kind, limit=_NOTHING_KEPT)[0]
        on_host = started + self.gguf_size + kept + self.passing()
        return max(memory, on_host), max(device, peak - kept - self.gguf_size - started)

    def scoring(self, kind: SaliencyKind, *, limit: int | None = None) -> tuple[int, int, int]:
        """Bytes of scoring the weights first: memory at its peak, that of the process included; disk; the scores."""
        asked = SaliencyRequest(
            kind=kind,
            samples=self.samples,
            sequence_length=self.length,
            batch_size=SaliencySettings.batch_size,
            activation_memory=self.limit if limit is None else limit,
        )
        sized: dict[str, Any] = {"gguf_size": self.gguf_size, "halves": self.halves}
        return predict_scoring(asked, self.model, self.found, self.precision, **sized)

    def output_costs(self, linears: Sequence[Linear]) -> int:
        """Bytes of what errors at the outputs of some layers cost."""
        tokens = self.samples * self.length * self.needs.output_groups * len(linears)
        return FLOAT * (tokens + self.needs.between_outputs * sum(x.out_features**2 for x in linears))

    def drawn(self) -> int:
        """Samples that the model writes itself."""
        drawn = self.request.drawn_samples if self.request.calibration == "self" else self.request.text_samples
        return drawn + heldout_samples(drawn)

    def writing(self) -> int:
        """Bytes of the model that writes its own samples, whole or not, and of the texts that it writes at once."""
        room = self.limit if self.streamed else None
        return self.sizes.writing(self.model.config, self.precision.dtype, self.drawn(), self.length, room)

    def taught_batches(self, settings: FinetuneSettings) -> int:
        """How often a teacher beside the student is asked."""
        training, together = self.request.text_samples, settings.together(self.length)
        steps, rest = divmod(training, settings.batch_size)
        batches = steps * ceil(settings.batch_size / together) + ceil(rest / together)
        return settings.epochs * batches + (settings.epochs + 1) * ceil(heldout_samples(training) / together)

    def passing(self) -> int:
        """Bytes of the largest tensor on its way to a GPU: as it is stored, and in float32."""
        return (HALF + FLOAT) * max(self.sizes.table, layer_size(self.layers))

    def copying(self) -> _Need:
        """What is no block, as it is written out."""
        # A table as it is packed: what is packed twice, and of some rows what their rounding takes.
        packing = 2 * self.tables_held()[1] + (round(PACKING_BYTES * TABLE_PART) if self.tables else 0)
        copied = (_COPIED_FROM_GGUF if self.gguf_size else _COPIED) * self.sizes.outer + packing
        return _Need(copied, copied)

    def tables_held(self) -> tuple[int, int]:
        """Values of the tables that are packed, and bytes that they take."""
        whole = sum(table.out_features * table.in_features for table in self.tables)
        bits = sum(
            spec.bits
            for table, scheme in self.tables.items()
            for spec in scheme.tensors(table.out_features, table.in_features).values()
        )
        return whole, bits // 8

    def blocks(self) -> _Need:
        """The walk over the blocks, beside the artifact."""
        every = range(self.found.n_blocks)
        largest = max(map(self._block, every))
        on_gpu = max(self._block(index, on_gpu=True) for index in every)
        if not self.method.Options.calibrated:
            return _Need(largest)
        held = self.samples + heldout_samples(self.samples)
        # Each has its share of the memory, and lies on disk whole where that is not enough.
        stores = [FLOAT * held * self.length * width for width in self._widths()]
        kept = sum(size for size in stores if size <= self.limit // self.needs.stores)
        memory = max(self.sizes.walk_begins(kept), largest + kept)
        aside = max(map(self._aside, every))
        return _Need(memory, kept + aside, sum(stores) - kept, max(self.sizes.walk_begins(0), on_gpu))

    def untouched(self) -> _Need:
        """Copying blocks that stay: one of them in float32, to say how far its layers are from the model's."""
        return _Need(FLOAT * max(self.sizes.inside) + compared_layer(self.layers))

    def _aside(self, index: int) -> int:
        """Bytes of what a GPU may have no room for while a block trains: the weights as read, and snapshots."""
        snapshots = 2 * FLOAT * self._trains(index) // self._parts if self.needs.trains else 0
        return snapshots + self._as_read(index)

    def _as_read(self, index: int) -> int:
        """Bytes of a block's weights beside what trains: to be compared with, or looked at by a penalty."""
        halved = self.needs.trains or self.needs.hessians != "none"
        return (self._aside_bytes if halved else FLOAT) * self.quantized[index]

    @property
    def _aside_bytes(self) -> int:
        """Bytes of a weight that is set aside."""
        return HALF if self.halves and not self.request.rotate else FLOAT

    @property
    def _parts(self) -> int:
        """In how many parts lies what processes share where training is sharded."""
        return distributed.size() if self.sharded else 1

    def _trains(self, index: int) -> int:
        """Weights of a block that train at once: all, or those of layers that read the same input."""
        if not self.needs.layerwise:
            return self.quantized[index]
        groups = input_groups(self.found.linears[index]).values()
        return max((sum(x.out_features * x.in_features for x in layers) for layers in groups), default=0)

    def _block(self, index: int, *, on_gpu: bool = False) -> int:
        """Bytes at the peak of one block's work, or what of it is on a GPU at least.

        First its layers are solved, or where a search or rounding begins their training, one after the other. Then
        they train: at the start of the way back their matrices and all activations live; at its end, or as the best of
        an epoch is kept, the gradients, or a third snapshot, do.
        """
        quantized, inside = self.quantized[index], self.sizes.inside[index]
        linears, needs = self.found.linears[index], self.needs
        # All those that weigh a penalty; others are read layer by layer.
        scores = 0 if needs.saliency is None else FLOAT * (quantized if needs.trains else layer_size(linears))
        tokens = min(self.request.batch_size, self.samples) * self.length
        # What a block holds beside its linear layers (experts, for one) is there once.
        held = FLOAT * inside + scores + (self.packed() * quantized // sum(self.quantized))
        # All of them before training, else one after the other.
        halved = needs.trains and self._aside_bytes == HALF
        aside = 0 if on_gpu else self._aside_bytes
        solving = solving_memory(linears, needs, self.samples * self.length, aside=0 if halved else aside)
        solving += aside * quantized * halved
        solving += self.output_costs(linears) if needs.output_groups else 0
        passing = tokens * passed_activations(self.sizes.hidden, wide(linears)) if self.method.Options.calibrated else 0
        # Behind it all the block is gone, but for what its layers were.
        back = FLOAT * layer_size(linears) if self._as_read(index) < FLOAT * quantized else 0
        compared = held - FLOAT * inside + self._as_read(index) + back + compared_layer(linears)
        phases = [held + solving, held + passing, compared]
        if needs.epochs or needs.adapter is not None:
            trained = min(self.request.at_once, self.samples) * self.length
            training = held - FLOAT * quantized + self._training(index, trained)
            # A penalty looks at the weights as read.
            looked = self._as_read(index) if needs.saliency is not None else 0
            phases.append(training + self._as_read(index) - (self._aside(index) - looked if on_gpu else 0))
        return max(phases)

    def _training(self, index: int, tokens: int) -> int:
        """Bytes of a block's training beside the block as it was read."""
        linears, quantized, copies = self.found.linears[index], self.quantized[index], self.needs.copies - 1
        fixed = _ADAPTER_COPIES * FLOAT * self.adapter_values(linears)
        trains = self._trains(index)
        if self.needs.layerwise:  # a reference
            fixed += FLOAT * (self.sizes.inside[index] + quantized - trains)
        gradients = FLOAT * trains // self._parts if copies > 1 else 0
        kept = tokens * trained_activations(self.sizes.hidden, wide(linears), self.itemsize)
        back = max(self.itemsize * trains + kept, gradients) - gradients
        if self.needs.parted and self._parts > 1:
            # A gradient is whole until it was added up; in a mixture they wait for each other.
            mixture = any(EXPERT.search(linear.name) for linear in linears)
            fixed += FLOAT * (trains if mixture else layer_size(linears))
            copies -= self.needs.parted
            fixed += FLOAT * self.needs.parted * trains // self._parts
        return fixed + FLOAT * copies * trains + back + trained_layer(layer_size(linears))

    def _widths(self) -> list[int]:
        """Values a token in each store of activations, as :attr:`Needs.stores` lists them."""
        widths = [self.sizes.hidden] * (2 + self.needs.augmented + self.needs.originals)
        if not self.needs.layerwise:
            return widths
        # Layers that read the same input: the widest have the widest stores.
        groups: dict[tuple[str, int], int] = {
            key: sum(x.out_features for x in layers) for key, layers in input_groups(self.layers).items()
        }
        outputs = 1 + self.needs.augmented
        (_, columns), rows = max(groups.items(), key=lambda group: 2 * group[0][1] + outputs * group[1])
        return widths + [columns] * 2 + [rows] * outputs

    def temperature(self) -> _Need:
        """Bytes of fitting the temperature: the held-out streams, a block or the head, and the logits of a chunk."""
        if not self.request.fit_temperature:
            return _Need(0)
        sizes = self.sizes
        streams = FLOAT * 2 * heldout_samples(self.samples) * self.length * sizes.hidden
        # Of a packed head the original and what is stored.
        head = (2 if self.tables else 1) * FLOAT * sizes.ending + 2 * sizes.head_at_work(self.itemsize)
        head += head_memory(sizes.vocabulary, self.length, self.precision.device)
        return _Need(streams + max(head, sizes.walk_begins(0)), streams)

    def end_to_end(self) -> _Need:
        """The end-to-end phase: memory, and its states on disk; 0 without one.

        The student lies there packed where its codes are fixed, else in float32, latents for weights, with embeddings
        and head in the dtype of the products, which are read in float32; so does the teacher. Whatever trains has a
        gradient and two moments. One block's activations and quantized weights live at a time, beside the hidden states
        before every block, and the logits of one chunk of positions with what the loss makes of them.
        """
        settings, sizes = self.needs.end_to_end, self.sizes
        if settings is None:
            return _Need(0)
        beside = self._trained_beside_weights()
        trained = beside + (sum(self.quantized) if settings.train == "all" else 0)
        tokens = settings.together(self.length) * self.length
        teacher, asking, passed, on_disk = self._teacher(settings)
        inside = FLOAT * sum(sizes.inside)
        if settings.train != "all":
            a_weight = TRAINABLE[self.method.scheme.format].fixed_bytes
            held = self.packed() if a_weight is None else round(a_weight * sum(self.quantized))
            inside = held + FLOAT * (sum(sizes.inside) - sum(self.quantized))
        reading = teacher + (0 if sizes.halved and self.itemsize < FLOAT else FLOAT * (sizes.outer + sizes.table))
        outer = sizes.ending if self.streamed and sizes.by_rows and self.itemsize < FLOAT else sizes.outer
        student = self.itemsize * outer + self._of_blocks(inside + FLOAT * beside + 3 * FLOAT * trained)
        copies = LOGIT_COPIES_TAUGHT if settings.needs_teacher else LOGIT_COPIES
        logits = logits_memory(sizes.vocabulary, copies, tokens, self.precision.device)
        cached = settings.needs_teacher and settings.teacher == "cached"
        heads = (1 + (settings.needs_teacher and not cached)) * sizes.head_at_work(self.itemsize)
        training = teacher + student + self._step(settings, tokens) + logits + heads
        # Values and moments.
        states = settings.states(self.request.text_samples) * 3 * FLOAT * trained
        kept = teacher if cached else 0
        memory = _TRAINING_LIBRARY + max(asking, reading, training)
        # Guesses, and the states that pass the teacher's blocks, stay on the host.
        device = max(asking - kept - passed, reading - kept, training - kept)
        return _Need(memory, _TRAINING_LIBRARY + kept + passed, states + on_disk, device)

    def _of_blocks(self, held: int) -> int:
        """Bytes in one process of what all blocks hold together."""
        return part_of_blocks(held, self.found.n_blocks) if self.sharded else held

    def _teacher(self, settings: FinetuneSettings) -> tuple[int, int, int, int]:
        """Bytes of a teacher beside the student, and of one before it is there: in all, of its states, and on disk."""
        if not settings.needs_teacher:
            return 0, 0, 0, 0
        sizes = self.sizes
        held = sizes.held_at_once(self.itemsize, streamed=self.streamed)
        if self.sharded and settings.teacher == "streamed" and not self.streamed:
            held = self.itemsize * sizes.outer + self._of_blocks(self.itemsize * sum(sizes.inside))
        asking = load_memory(held, self.itemsize * sizes.table)
        if settings.teacher == "streamed":
            return held, asking, 0, 0
        # It is gone before the student comes.
        drawn = self.request.text_samples
        tokens = (drawn + heldout_samples(drawn)) * self.length
        guesses = tokens * (settings.teacher_top_k * 8 + 4)
        kept = min(guesses, self.limit)
        if not self.streamed:
            return kept, asking, 0, guesses - kept
        states = tokens * self.itemsize * sizes.hidden
        beside = states if states <= self.limit else 0
        logits = logits_memory(sizes.vocabulary, TEACHER_COPIES, self.length, self.precision.device)
        asking = sizes.passed(self.itemsize, beside, self.length, wide(self.layers), logits) + kept
        return kept, asking, beside, guesses - kept + states - beside

    def _step(self, settings: FinetuneSettings, tokens: int) -> int:
        """Bytes that an end-to-end step keeps of the blocks for the way back."""
        blocks, widest = self.found.n_blocks, wide(self.layers)
        block = tokens * trained_activations(self.sizes.hidden, widest, self.itemsize)
        block += self.itemsize * max(self.quantized)
        states = FLOAT * tokens * self.sizes.hidden * blocks * (3 if settings.loss == "kl-hidden" else 1)
        kept = states + block if settings.checkpointing else max(states, blocks * block)
        return kept + trained_layer(layer_size(self.layers))

    def _trained_beside_weights(self) -> int:
        """Parameters of scales, router and adapters; norms are too few to count."""
        count = self.adapter_values(self.layers)
        for linear in self.layers:
            specs = self.method.scheme.tensors(linear.out_features, linear.in_features).values()
            small = [spec for spec in specs if spec.role != "codes"]
            # Zero points are packed by the bit, and there is one for every scale.
            scales = sum(prod(spec.shape) for spec in small if spec.role != "zeros")
            count += scales * 2 if len(small) > 1 else scales
        return count


def scheme_bits(scheme: AnyScheme, layers: Sequence[Linear], schemes: Mapping[str, AnyScheme] = {}) -> float:
    """Bits a weight of some layers that are stored by one scheme, but for those of ``schemes``, by full name."""
    stored, weights = 0.0, 0
    for linear in layers:
        own, shape = schemes.get(linear.name, scheme), (linear.out_features, linear.in_features)
        stored, weights = stored + formats.bits_per_weight(own, *shape) * prod(shape), weights + prod(shape)
    return stored / weights


def planned_bits(method: Method, layers: Sequence[Linear], schemes: Mapping[str, AnyScheme] = {}) -> float:
    """True bits a weight that a method will store of all layers, without adapters; ``schemes`` as above."""
    return max(scheme_bits(method.scheme, layers, schemes) + method.needs.extra_bits, method.needs.target_bits or 0.0)


def heldout_samples(samples: int) -> int:
    """Samples that are drawn beyond the training ones to choose the best epoch: an eighth, at least two."""
    return max(2, samples // 8)
