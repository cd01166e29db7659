"""How a quantized model lies in its folder: shards, configuration, side files, model card."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ulbq.artifacts.disk import writing
from ulbq.artifacts.records import BitsReport, LayerRecord
from ulbq.artifacts.shards import GUARD_NAME, INDEX_NAME, LazyTensors, write_guard, write_index, write_shard
from ulbq.config.adapter import AdapterConfig
from ulbq.formats import AnyScheme
from ulbq.methods.base import BlockResult
from ulbq.methods.training import half_vector
from ulbq.models.adapter_files import build_adapters, by_layer
from ulbq.models.blocks import assign, block_list, check_shape, check_values, empty_block
from ulbq.models.names import read_state, state_names
from ulbq.models.source import ModelSource
from ulbq.nn.adapter import AdaptedLinear, Adapter
from ulbq.nn.quant_linear import QuantLinear, linear_layer

OUTER_SHARD = "model-outer.safetensors"


def block_shard(index: int) -> str:
    """File name of a block's shard."""
    return f"model-block-{index:05d}.safetensors"


def adapter_shard(index: int) -> str:
    """File name of a block's adapters, which lie in the run's scratch folder until all are written as one."""
    return f"adapter-block-{index:05d}.safetensors"


def write_block(path: Path, prefix: str, source: ModelSource, block: nn.Module, result: BlockResult) -> None:
    """Write one block's shard.

    Args:
        prefix: full name of the block, with the dot.
        block: for the names of its parameters and persistent buffers; may be on the meta device.
        result: what the method made of it; what it did not touch is copied from the source.
    """
    tensors = {
        f"{prefix}{linear}.{short}": tensor
        for linear, packed in result.packed.items()
        for short, tensor in packed.items()
    }
    replaced = {f"{prefix}{linear}.weight" for linear in result.packed}
    tensors |= {f"{prefix}{name}": value for name, value in result.dense.items()}
    buffers = {f"{prefix}{name}" for name, _ in block.named_buffers()}
    for name in (f"{prefix}{name}" for name in block.state_dict()):
        if name not in replaced and name not in tensors:
            tensor = source.read(name)
            tensors[name] = tensor if name in buffers else half(tensor)
    write_shard(path, tensors)


def write_outer(
    path: Path,
    model: PreTrainedModel,
    source: ModelSource,
    prefix: str,
    factors: Mapping[str, float] = {},
    tables: Mapping[str, torch.Tensor] = {},
) -> dict[str, int]:
    """Write everything that is not a block: embeddings, final norm, untied head.

    Args:
        prefix: full name of the list of blocks, with the dot.
        factors: by which tensors are multiplied, by full name.
        tables: what is stored of packed matrices in the place of their weights, by full name.

    Returns:
        Stored bits: ``embeddings`` (matrices) and ``other`` (vectors).

    Raises:
        InputError: a tensor is missing, or stored otherwise than the configuration says.
        NumericsError: a tensor has values that are not finite.
    """
    expected = model.state_dict()
    names = {name: aliases for name, aliases in state_names(model).items() if not name.startswith(prefix)}
    buffers = {name for name, _ in model.named_buffers()}
    tensors = dict(tables)
    for name, aliases in names.items():
        if f"{name.removesuffix('.weight')}.codes" in tables:
            continue
        tensor = read_state(source, name, aliases)
        check_shape(source, name, tensor, expected[name].shape)
        if name not in buffers and expected[name].is_floating_point():
            check_values(source, name, tensor)
        if name in factors:
            tensors[name] = half_vector(tensor.float() * factors[name])
        else:
            tensors[name] = tensor if name in buffers else half(tensor)
    write_shard(path, tensors)
    bits = {"embeddings": 0, "other": 0}
    for tensor in tensors.values():
        bits["embeddings" if tensor.dim() > 1 else "other"] += tensor.nbytes * 8
    return bits


def half(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter that was not trained, as it is stored: float32 and wider as bfloat16, anything else as it is.

    Buffers are stored as they are: the correction biases of a mixture of experts decide in float32 who is called.
    """
    return tensor.to(torch.bfloat16) if tensor.dtype in (torch.float32, torch.float64) else tensor


def packed_block(
    model: PreTrainedModel,
    index: int,
    shard: Path,
    linears: Sequence[str],
    scheme: AnyScheme,
    schemes: Mapping[str, AnyScheme] = {},
) -> nn.Module:
    """The packed block that a shard holds, by the shard alone, on the CPU; what is not packed is in float32.

    The quantized stream runs through this, in the first run and in a resumed one alike: what later blocks are
    trained on is what was stored, to the bit.

    Args:
        model: a skeleton; it stays as it is.
        index: of the block.
        shard: the block's.
        linears: names of the packed layers, relative to the block.
        scheme: of every layer that has none of its own.
        schemes: of those that have.
    """
    prefix, block = block_list(model)[0], empty_block(model, index)
    for linear in linears:
        layer = linear_layer(block, linear)
        own, bias = schemes.get(linear, scheme), layer.bias is not None
        block.set_submodule(linear, QuantLinear(own, layer.in_features, layer.out_features, bias=bias, cache=True))
    stored = LazyTensors([shard])
    with torch.no_grad():
        # Parameters, packed tensors and persistent buffers alike.
        for name, tensor in block.state_dict(keep_vars=True).items():
            value = stored.read(f"{prefix}.{index}.{name}")
            if tensor.is_meta:
                kept = torch.float32 if value.is_floating_point() else value.dtype
                assign(block, name, nn.Parameter(value.to(kept), requires_grad=False))
            else:
                tensor.copy_(value)
    return block


def write_adapters(path: Path, prefix: str, adapters: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write the adapters of one block under the layers' full names and peft's short ones."""
    named = {f"{prefix}{linear}.{short}": t for linear, tensors in adapters.items() for short, t in tensors.items()}
    write_shard(path, named)


def read_adapters(path: Path, prefix: str, config: AdapterConfig) -> dict[str, Adapter]:
    """The adapters of one block as :func:`write_adapters` left them, by the layers' names inside the block."""
    return build_adapters(config, by_layer(LazyTensors([path]), prefix))


def restore_adapters(block: nn.Module, prefix: str, shard: Path, config: AdapterConfig) -> None:
    """Put stored adapters beside the packed layers of a block, in place."""
    for linear, adapter in read_adapters(shard, prefix, config).items():
        base = block.get_submodule(linear)
        block.set_submodule(linear, AdaptedLinear(base, adapter.to(next(base.buffers()).device)))


def bits_report(
    layers: Sequence[LayerRecord], shards: Iterable[Path], outer: Mapping[str, int], adapter: int = 0
) -> BitsReport:
    """Where the stored bits went, added up from the layers' records and the tensors on disk.

    Args:
        adapter: bits of the adapters, 0 without any.
    """
    parts: dict[str, int] = {}
    for layer in layers:
        for role, bits in layer.bits.items():
            parts[role] = parts.get(role, 0) + bits
    in_blocks = 0
    for shard in shards:
        stored = LazyTensors([shard])
        in_blocks += sum(stored.nbytes(name) for name in stored.names) * 8
    other = in_blocks - sum(parts.values()) + outer["other"]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    if adapter:
        parts["adapter"] = adapter
    return BitsReport(parts={**parts, "embeddings": outer["embeddings"], "other": other}, weights=weights)


def write_folder(
    folder: Path,
    source: ModelSource,
    scheme: AnyScheme,
    method: str,
    bits: BitsReport,
    layers: Sequence[LayerRecord],
    card: str,
    shards: Sequence[str],
    tables: Sequence[LayerRecord] = (),
) -> list[str]:
    """Everything beside the shards: index, configuration, side files and model card.

    The configuration says how each layer is packed, for those who read it without the manifest.

    Args:
        shards: names of the weights' files, all of them.
        tables: matrices outside the blocks that are packed.

    Returns:
        Names of what was written.
    """
    guard = write_guard(folder, [layer.name for layer in layers])
    write_index(folder, guard | {name: sorted(LazyTensors([folder / name]).names) for name in sorted(shards)})
    with writing(folder):
        config = source.config.to_dict()
        # As `half` leaves them: what came as float16 is still float16.
        config["dtype"] = "float16" if config.get("dtype") in ("float16", torch.float16) else "bfloat16"
        shared = scheme.model_dump(mode="json")
        config["quantization_config"] = {
            **{"quant_method": "ulbq", "method": method, **shared},
            # Tables are named always: what is shared holds of layers.
            "layers": {layer.name: layer.scheme for layer in layers if layer.scheme != shared}
            | {table.name: table.scheme for table in tables},
            "adapter": bool(bits.parts.get("adapter")),
        }
        updated = type(source.config).from_dict(config)
        updated.save_pretrained(folder)
        beside = source.save_tokenizer_files(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return [INDEX_NAME, GUARD_NAME, "config.json", "README.md", *beside]
