"""A plain half- or full-precision model folder that transformers loads without ulbq."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ulbq import formats
from ulbq.artifacts.disk import writing
from ulbq.artifacts.shards import write_index, write_shard
from ulbq.errors import NumericsError
from ulbq.models.blocks import block_list, skeleton
from ulbq.models.names import read_state, state_names
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import linear_layer


def shard_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Which tensors each shard file will hold: one shard a block, one for the rest.

    A tied head is not among them: it is the embedding.
    """
    prefix = f"{block_list(model)[0]}."
    parts: dict[str, list[str]] = {}
    for name in state_names(model):
        inside = name.startswith(prefix)
        parts.setdefault(name.removeprefix(prefix).split(".")[0] if inside else "", []).append(name)
    count = len(parts)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": tuple(names) for i, names in enumerate(parts.values(), 1)}


def write_dense(
    source: ModelSource, folder: Path, dtype: torch.dtype, on_shard: Callable[[str], None] = lambda name: None
) -> None:
    """Write a model densely; one shard's tensors are in memory at a time.

    Args:
        source: any model; packed layers are dequantized in float32 and rounded once.
        folder: exists; side files, tokenizer and configuration land there too.
        dtype: of all floating tensors.
        on_shard: called with each shard's name once it is written.

    Raises:
        InputError: a tensor is missing in the source.
        NumericsError: a weight does not fit the dtype's range.
    """
    model = skeleton(source)
    aliases = state_names(model)
    shards = shard_names(model)
    for shard, names in shards.items():
        write_shard(folder / shard, {name: _dense(source, model, name, aliases[name], dtype) for name in names})
        on_shard(shard)
    write_index(folder, shards)
    with writing(folder):
        config = source.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
        type(source.config).from_dict(config).save_pretrained(folder)
        source.save_tokenizer_files(folder)


def _dense(
    source: ModelSource, model: PreTrainedModel, name: str, aliases: tuple[str, ...], dtype: torch.dtype
) -> torch.Tensor:
    linear = name.removesuffix(".weight")
    scheme = source.packed.get(linear) if linear != name else None
    if scheme is not None:
        columns = linear_layer(model, linear).in_features
        tensor = formats.dequantize(scheme, source.read_packed(linear), columns, dtype)
    else:
        tensor = read_state(source, name, aliases)
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not torch.isfinite(tensor).all():
        raise NumericsError(f"'{name}' does not fit {dtype}.", hint="Use --dtype bf16 or fp32.")
    return tensor
