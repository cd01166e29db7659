"""Takes a finished artifact's blocks back into training, and out of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ulbq.artifacts.shards import LazyTensors, write_shard
from ulbq.config.finetuning import Trained, TrainedBeside
from ulbq.finetuning.student import Student
from ulbq.formats import AnyScheme
from ulbq.methods.base import BlockResult, Packed, check_finite
from ulbq.methods.training import half_vector, pack_layer
from ulbq.models.blocks import empty_block, empty_copy, load_outer, materialize
from ulbq.models.tables import tables_as_stored
from ulbq.nn.quant_linear import linear_layer
from ulbq.pipeline import layout
from ulbq.pipeline.quantization_plan import Job
from ulbq.quantizers.base import Quantizer
from ulbq.quantizers.fixed import FixedAffine
from ulbq.quantizers.trainable import TRAINABLE
from ulbq.training.linear import TrainedLinear
from ulbq.training.sharding import join, shard


@dataclass(frozen=True)
class Folders:
    """Where a run's shards lie: the blocks' own, and their adapters.

    Attributes:
        schemes: by full name, of layers whose scheme is not the method's.
    """

    blocks: Path
    adapters: Path
    schemes: Mapping[str, AnyScheme] = field(default_factory=dict)

    def block(self, index: int) -> Path:
        """A block's shard."""
        return self.blocks / layout.block_shard(index)

    def adapter(self, index: int) -> Path:
        """The adapters of a block."""
        return self.adapters / layout.adapter_shard(index)


def build_student(job: Job, folders: Folders, *, train: Trained | TrainedBeside, checkpointing: bool) -> Student:
    """The whole model as its shards have it, ready to train on; sharded over processes where the plan says so.

    One weight after the other is read in full precision and becomes the quantizer's latents; at no time is there a
    second copy of more than a block. Weights whose codes are fixed are not read at all, but for codebooks'.

    Args:
        job: the run.
        folders: of its block phase; the shard of everything beside the blocks lies with the blocks.
        train: what trains; without weights the codes are fixed.
        checkpointing: see :class:`Student`.
    """
    precision = job.precision
    model = empty_copy(job.model)
    outer = LazyTensors([folders.blocks / layout.OUTER_SHARD])
    if precision.dtype != torch.float32:
        rows = outer.rows if job.streamed else None
        tables_as_stored(model, partial(_table, job, outer), precision.device, head=True, rows=rows)
    load_outer(model, job.embedded or job.source, torch.float32, precision.device)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in outer.names and tensor.dtype == torch.float32:
                tensor.copy_(outer.read(name))  # rounded as it will be read
    blocks = model.get_submodule(job.found.blocks_prefix)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError("the blocks are no list")
    for index in range(job.found.n_blocks):
        blocks[index] = _block(job, folders, index, train)
        if job.plan.sharded:
            shard(blocks[index], precision.device)
    if job.plan.sharded:
        join(blocks, precision.device)
    return Student(model, blocks, precision, checkpointing=checkpointing)


def _table(job: Job, outer: LazyTensors, name: str) -> torch.Tensor | None:
    """A matrix outside the blocks as it is stored; one that is packed dense, in the dtype that it will be run in."""
    if job.embedded is not None and name in {f"{table.name}.weight" for table in job.tables}:
        return job.embedded.read(name).to(job.precision.dtype)
    return outer.read(name) if name in outer.names else None


def _quantizer(
    weight: torch.Tensor, packed: Mapping[str, torch.Tensor], scheme: AnyScheme, train: Trained | TrainedBeside
) -> Quantizer:
    """Of a packed matrix, with what is to train."""
    if train == "all":
        return TRAINABLE[scheme.format].free.from_packed(weight, packed, scheme, train_weights=True)
    fixed = fixed_quantizer(weight, packed, scheme)
    if train == "scales-zeros" and isinstance(fixed, FixedAffine):
        fixed.let_zeros_train()
    return fixed


def fixed_quantizer(weight: torch.Tensor, packed: Mapping[str, torch.Tensor], scheme: AnyScheme) -> Quantizer:
    """Of a packed matrix whose codes are fixed; of ``weight [out, in]`` codebooks alone look at more than the shape."""
    return TRAINABLE[scheme.format].fixed.from_packed(weight, packed, scheme, train_weights=False)


def _block(job: Job, folders: Folders, index: int, train: Trained | TrainedBeside) -> nn.Module:
    prefix, linears = job.names(index)
    device = job.precision.device
    schemes = {linear: folders.schemes.get(prefix + linear, job.method.scheme) for linear in linears}
    # Quantizers of fixed codes ask for a weight's shape alone.
    by_shape = [name for name in linears if TRAINABLE[schemes[name].format].fixed_bytes is None]
    unread = [] if train == "all" else [f"{name}.weight" for name in by_shape]
    block = empty_block(job.model, index)
    materialize(block, job.source, torch.float32, prefix=prefix, without=tuple(unread), device=device)
    stored = LazyTensors([folders.block(index)])
    config = job.method.needs.adapter
    adapters = {} if config is None else layout.read_adapters(folders.adapter(index), prefix, config)
    for linear in linears:
        dense = linear_layer(block, linear)
        scheme = schemes[linear]
        packed = {short: t.to(device) for short, t in _packed(stored, prefix + linear, scheme, dense)}
        quantizer = _quantizer(dense.weight.detach(), packed, scheme, train)
        adapter = adapters.get(linear)
        layer = TrainedLinear(quantizer.to(device), dense.bias, None if adapter is None else adapter.to(device))
        block.set_submodule(linear, layer)
    with torch.no_grad():
        for name, tensor in block.state_dict(keep_vars=True).items():
            if prefix + name in stored.names:
                tensor.copy_(stored.read(prefix + name))
    return block


def _packed(
    stored: LazyTensors, linear: str, scheme: AnyScheme, dense: nn.Linear
) -> Iterator[tuple[str, torch.Tensor]]:
    for short in scheme.tensors(dense.out_features, dense.in_features):
        yield short, stored.read(f"{linear}.{short}")


@torch.no_grad()
def write_tuned(
    job: Job, student: Student, index: int, before: Folders, after: Folders, sizes: Mapping[str, float]
) -> dict[str, Packed]:
    """Pack one block of a student, and write its shards.

    What is neither quantized nor trained is copied as it lies in the block phase's shard, and so is a vector whose
    value did not change.

    Args:
        before: the block phase's shards.
        after: where the new ones go.
        sizes: root mean square of each layer's inputs, by full name.

    Returns:
        Packed tensors of each layer, by name inside the block.

    Raises:
        NumericsError: what was packed is not what was trained, or not finite.
    """
    prefix, linears = job.names(index)
    block = student.model.get_submodule(prefix[:-1])
    old = LazyTensors([before.block(index)])
    result = BlockResult({})
    for linear in linears:
        layer = block.get_submodule(linear)
        if not isinstance(layer, TrainedLinear):
            raise TypeError(f"'{linear}' does not train")
        result.packed[linear] = pack_layer(linear, layer.quantizer, sizes[prefix + linear])
        if layer.adapter is not None:
            result.adapters[linear] = layer.adapter.tensors()
    tensors = {name: old.read(name) for name in old.names}
    for name, parameter in block.named_parameters():
        stored = tensors.get(prefix + name)
        if stored is not None and not torch.equal(stored.to(parameter.device, parameter.dtype), parameter):
            result.dense[name] = half_vector(parameter.detach())
    check_finite(index, result)
    tensors |= {prefix + name: parameter for name, parameter in result.dense.items()}
    tensors |= {f"{prefix}{linear}.{short}": t for linear, parts in result.packed.items() for short, t in parts.items()}
    write_shard(after.block(index), {name: tensors[name] for name in sorted(tensors)})
    if job.method.needs.adapter is not None:
        layout.write_adapters(after.adapter(index), prefix, result.adapters)
    return result.packed
