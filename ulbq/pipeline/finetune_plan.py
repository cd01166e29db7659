"""Everything about a fine-tuning run that is settled before the first weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import Linear as DenseLinear
from transformers import PreTrainedModel

from ulbq import runtime
from ulbq.artifacts.disk import changed, sha256_file
from ulbq.artifacts.manifest import QuantizedManifest
from ulbq.artifacts.records import Record
from ulbq.artifacts.shards import INDEX_NAME
from ulbq.blockwise.walk import check_length
from ulbq.config.adapter import AdapterConfig
from ulbq.config.finetune import FinetuneRequest
from ulbq.config.finetuning import FinetuneSettings
from ulbq.data.calibration import CALIBRATION_FILE, TEXT_FILE
from ulbq.data.examples import ExampleSet, draw_examples
from ulbq.data.instructions import check_training_text
from ulbq.errors import InputError, UsageError
from ulbq.finetuning.head import logits_memory
from ulbq.finetuning.trainer import LOGIT_COPIES
from ulbq.formats import AnyScheme
from ulbq.models.adapter_files import ADAPTER_FOLDER, adapter_folder, read_adapter
from ulbq.models.blocks import Linear, skeleton
from ulbq.models.side_files import is_side_file
from ulbq.models.source import ModelSource, resolve
from ulbq.nn.quant_linear import linear_layer
from ulbq.pipeline.memory import (
    DENSE_BYTES,
    FLOAT,
    Sizes,
    layer_size,
    load_memory,
    part_of_blocks,
    trained_activations,
    trained_layer,
    wide,
)
from ulbq.pipeline.recipe_files import Recipe
from ulbq.pipeline.samples import choose_sharded
from ulbq.pipeline.tasks import request_of, settings_of
from ulbq.progress import Progress
from ulbq.tracking import check_tracker
from ulbq.training.precision import Precision

# Float32 copies of what trains: itself, gradient, two moments.
_TRAINED_COPIES = 4


class FinetuneCost(Record):
    """Predicted cost of a run, in bytes.

    Attributes:
        peak_memory: largest resident memory of the process (CPU), or of process and device together.
        base: the packed model.
        training: what trains, with gradients and moments.
        activations: one micro-batch's activations and logits.
    """

    peak_memory: int
    base: int
    training: int
    activations: int


class FinetunePlan(Record):
    """What a run would do and cost.

    Attributes:
        request: completed.
        adapter: form of the adapter that trains.
        start: ``trained`` where it is the artifact's own, else ``fresh``.
        linears: layers with an adapter.
        parameters: how many train.
        data: what :meth:`~ulbq.data.examples.ExampleSet.record` says.
        template: how questions are laid out; None for plain text.
        steps: optimiser steps.
        sharded: whether each of several processes holds a part of the blocks.
    """

    request: FinetuneRequest
    model: str
    method: str
    bits_per_weight: float
    adapter: AdapterConfig
    start: str
    linears: int
    parameters: int
    data: dict[str, Any]
    template: str | None
    steps: int
    device: str
    precision: str
    sharded: bool = False
    cost: FinetuneCost


@dataclass(frozen=True)
class FinetuneJob:
    """What the parts of a run share.

    Attributes:
        source: the packed model.
        manifest: its own.
        examples: what it learns from.
        adapter: form of the adapter that trains.
        trained: folder of the adapter that goes on; None for a new one.
        linears: full names of the layers with an adapter.
    """

    request: FinetuneRequest
    source: ModelSource
    manifest: QuantizedManifest
    examples: ExampleSet
    settings: FinetuneSettings
    precision: Precision
    adapter: AdapterConfig
    trained: Path | None
    linears: tuple[str, ...]
    plan: FinetunePlan

    @property
    def scales(self) -> bool:
        """Whether scales train too."""
        return self.request.train == "adapter-scales"


def prepare(given: str, task: Recipe, options: Mapping[str, Any], progress: Progress) -> FinetuneJob:
    """Settle everything that can be settled before the first weight is read.

    Args:
        given: path of the artifact.
        task: what to learn.
        options: fields of a request; None for what was not given.
        progress: told what is left out of the data.

    Raises:
        UsageError: options that do not exist or do not go together, or examples longer than the model takes.
        InputError: no quantized artifact, a damaged one, one that cannot be trained; unreadable data.
        ResourceError: data or device are missing.
    """
    source, manifest = open_quantized(given, "fine-tune", offline=bool(options.get("offline")), verify=False)
    folder = adapter_folder(source)
    request = request_of(given, task, options, adapted=folder is not None)
    check_tracker(request.log_to)
    model = skeleton(source)
    check_length(model, request.sequence_length)
    trained = None if request.fresh else folder
    adapter, linears = _adapter(request, source, trained)
    _check_trainable(source, adapter, linears)
    device = runtime.resolve_device(request.device)
    precision = Precision.choose(device, request.precision)
    if request.data is not None and len(request.data) == 1:  # of several, some may be missing
        check_training_text(request.data[0], data_dir=request.data_dir, offline=request.offline)
    _check_whole(source.path, manifest, adapter=trained is not None)
    examples = _examples(request, source, progress)
    settings = settings_of(request, len(examples.train))
    asked = (request, source, manifest, model, adapter, linears, examples, precision)
    parameters, cost = _cost(*asked)
    needed = cost.base + cost.training + cost.activations
    if sharded := choose_sharded(request.shard, needed, device, progress):
        cost = _cost(*asked, sharded=True)[1]
    plan = FinetunePlan(
        request=request,
        model=manifest.name,
        method=manifest.method,
        bits_per_weight=manifest.bits.bits_per_weight,
        adapter=adapter,
        start="fresh" if trained is None else "trained",
        linears=len(linears),
        parameters=parameters,
        data=examples.record(),
        template=examples.template,
        steps=settings.steps(len(examples.train)),
        device=runtime.describe_device(device),
        precision=str(precision.dtype).removeprefix("torch."),
        sharded=sharded,
        cost=cost,
    )
    return FinetuneJob(request, source, manifest, examples, settings, precision, adapter, trained, linears, plan)


def _examples(request: FinetuneRequest, source: ModelSource, progress: Progress) -> ExampleSet:
    return draw_examples(
        request.data or (),
        source.tokenizer(),
        template=request.template,
        samples=request.samples,
        heldout=request.held_out,
        length=request.sequence_length,
        seed=request.seed,
        data_dir=request.data_dir,
        offline=request.offline,
        progress=progress,
    )


def open_quantized(given: str, what: str, *, offline: bool, verify: bool) -> tuple[ModelSource, QuantizedManifest]:
    """The artifact that learns, and its manifest; ``what`` is done to it. Raises InputError for anything else."""
    source = resolve(given, offline=offline, verify=verify)
    if source.quantized is None:
        raise InputError(
            f"'{given}' is no quantized artifact, and there is nothing to {what}.",
            hint="Quantize it first: 'ulbq quantize'.",
        )
    return source, source.quantized


def _check_whole(folder: Path, manifest: QuantizedManifest, *, adapter: bool) -> None:
    """Compare the files that a run takes over with their hashes. Raises InputError naming one that differs.

    They are linked where the file system can: a damaged one would go on from artifact to artifact.
    """
    for name, entry in manifest.files.items():
        if not adapter and name.startswith(f"{ADAPTER_FOLDER}/"):
            continue
        if sha256_file(folder / name) != entry.sha256:
            raise changed(folder / name)


def _adapter(
    request: FinetuneRequest, source: ModelSource, trained: Path | None
) -> tuple[AdapterConfig, tuple[str, ...]]:
    """Form of the adapter that trains, and the layers that it stands beside."""
    if trained is not None:
        own, found = read_adapter(trained)
        return own if request.dropout is None else own.model_copy(update={"dropout": request.dropout}), tuple(found)
    config = request.new_adapter()
    linears = tuple(name for name in source.packed if config.matches(name))
    lost = [one for one in config.targets if not any(AdapterConfig(targets=(one,)).matches(name) for name in linears)]
    if lost:
        names = sorted({name.rpartition(".")[2] for name in source.packed})
        raise UsageError(f"`targets`: no packed layer is called '{lost[0]}'.", hint=f"Layers: {', '.join(names)}.")
    return config, linears


def _check_trainable(source: ModelSource, adapter: AdapterConfig, linears: tuple[str, ...]) -> None:
    """Raises InputError where the artifact's format cannot carry what shall train."""
    if not linears:
        raise InputError(f"'{source.given}' has no packed layer to put an adapter beside.", hint="Quantize it anew.")
    if not adapter.dora:
        return
    mixed = next((name for name in linears if not source.packed[name].is_one_matrix), None)
    if mixed is not None:
        raise InputError(
            f"DoRA needs the norms of one weight, and '{mixed}' of '{source.given}' mixes its scales for every token.",
            hint="Use `dora=False`.",
        )


def _cost(
    request: FinetuneRequest,
    source: ModelSource,
    manifest: QuantizedManifest,
    model: PreTrainedModel,
    adapter: AdapterConfig,
    linears: tuple[str, ...],
    examples: ExampleSet,
    precision: Precision,
    *,
    sharded: bool = False,
) -> tuple[int, FinetuneCost]:
    """How many parameters train, and what the run needs."""
    layers = {name: linear_layer(model, name) for name in source.packed}
    parameters = sum(
        adapter.rank * (layers[name].in_features + layers[name].out_features)
        + (layers[name].out_features if adapter.dora else 0)
        for name in linears
    )
    scales = sum(_scales(scheme, layers[name]) for name, scheme in source.packed.items())
    scales = scales if request.train == "adapter-scales" else 0
    tables = sum(sum(table.bits.values()) for table in manifest.tables)
    packed = (sum(sum(layer.bits.values()) for layer in manifest.layers) + tables) // 8
    outside = sum(manifest.bits.parts.get(part, 0) for part in ("embeddings", "other")) - tables
    held = packed + 2 * outside // 8
    if precision.dtype.itemsize == 2:
        held = packed + (held - packed) // 2
    sizes, itemsize = Sizes.of(model), precision.dtype.itemsize
    shapes = [Linear(name, layer.out_features, layer.in_features) for name, layer in layers.items()]
    # Behind the end of each example one token more.
    width = 1 + max(len(example.tokens) for example in (*examples.train, *examples.validation))
    activations = _activations(request, sizes, shapes, width * request.micro_batch, precision, scales > 0)
    training = (parameters + scales) * FLOAT * _TRAINED_COPIES
    loading = load_memory(held, itemsize * sizes.table)
    # An adapter asks each layer for its weight as it is put beside it.
    adapting = held + FLOAT * parameters + DENSE_BYTES * layer_size(shapes)
    # Opened again beside what has trained.
    opening = held + FLOAT * (parameters + scales) + loading
    started = runtime.peak_memory() + runtime.LIBRARY_MEMORY
    if sharded:
        blocks, inside = len(sizes.inside), packed - tables // 8
        held += part_of_blocks(inside, blocks) - inside
        training = part_of_blocks(training, blocks)
    peak = started + max(loading, adapting, held + training + activations, opening)
    cost = FinetuneCost(peak_memory=peak, base=held, training=training, activations=activations)
    return parameters + scales, cost


def _activations(
    request: FinetuneRequest, sizes: Sizes, linears: list[Linear], tokens: int, precision: Precision, scales: bool
) -> int:
    """Bytes of so many tokens on their way through blocks and head, and back."""
    itemsize, blocks = precision.dtype.itemsize, len(sizes.inside)
    total = sum(linear.in_features * linear.out_features for linear in linears)
    block = tokens * trained_activations(sizes.hidden, wide(linears), itemsize)
    if scales:
        # What scales multiply is made dense for a product, and kept for the gradients.
        block += total // blocks * itemsize
    states = FLOAT * tokens * sizes.hidden * blocks
    kept = states + block if request.checkpointing else max(states, block * blocks)
    logits = logits_memory(sizes.vocabulary, LOGIT_COPIES, tokens, precision.device) + sizes.head_at_work(itemsize)
    return kept + trained_layer(layer_size(linears)) + logits


def _scales(scheme: AnyScheme, layer: DenseLinear) -> int:
    """Half-precision values of a layer that train as its scales: a codebook's levels too, and a mixture's zeros."""
    specs = scheme.tensors(layer.out_features, layer.in_features).values()
    trained = [s for s in specs if s.dtype == "float16" and s.role in ("scales", "codebooks", "zeros")]
    return sum(spec.bits for spec in trained) // 16


def side_files(manifest: QuantizedManifest) -> list[str]:
    """Files that the new artifact takes over as they are: all but the adapter, and what is written anew.

    How the base was made, its calibration samples among it, stays with the base; so does what no model needs.
    """
    left = (CALIBRATION_FILE, TEXT_FILE)
    weights = {
        name for name in manifest.files if name.endswith(".safetensors") and "/" not in name and name not in left
    }
    return [name for name in manifest.files if name in weights or name == INDEX_NAME or is_side_file(name)]
