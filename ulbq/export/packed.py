"""Model folders whose linear layers stay packed, in the layout of another library: GPTQ and compressed-tensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ulbq import formats
from ulbq.artifacts.disk import write_atomically, writing
from ulbq.artifacts.shards import INDEX_NAME, LazyTensors, write_index, write_shard
from ulbq.errors import NumericsError
from ulbq.export import compressed_tensors, gptq
from ulbq.export.dense import dense_tensor, shard_names, write_beside
from ulbq.formats import AffineScheme
from ulbq.models.blocks import block_list, skeleton
from ulbq.models.names import state_names
from ulbq.models.source import ModelSource
from ulbq.nn.quant_linear import is_dense_linear

Tensors = Mapping[str, torch.Tensor]


class _Layout(NamedTuple):
    """How a library stores layers.

    Attributes:
        encode: a layer's tensors by short name, from its scheme, our tensors and ``(out, in)``.
        decode: its float32 weight ``[out, in]``, from nothing but what is stored and the bits.
        configuration: the ``quantization_config``.
    """

    encode: Callable[[AffineScheme, Tensors, tuple[int, int]], dict[str, torch.Tensor]]
    decode: Callable[[Tensors, int], torch.Tensor]
    configuration: dict[str, Any]


def affine_layers(source: ModelSource) -> dict[str, AffineScheme]:
    """Schemes of the packed layers, which are all affine. Raises TypeError for any other."""
    for scheme in source.packed.values():
        if not isinstance(scheme, AffineScheme):
            raise TypeError(f"{scheme.format} is no affine format")
    return {name: scheme for name, scheme in source.packed.items() if isinstance(scheme, AffineScheme)}


def dense_linears(source: ModelSource) -> tuple[str, ...]:
    """Full names of the linear layers that a packed model holds dense, the head among them."""
    modules = skeleton(source).named_modules()
    return tuple(name for name, module in modules if is_dense_linear(module) and name not in source.packed)


def layer_shapes(source: ModelSource) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every packed layer by full name."""
    model = skeleton(source)
    found: dict[str, tuple[int, int]] = {}
    for name in source.packed:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            found[name] = (layer.out_features, layer.in_features)
    return found


def write_packed(
    source: ModelSource,
    folder: Path,
    target: Literal["gptq", "compressed-tensors"],
    dtype: torch.dtype,
    on_shard: Callable[[str], None] = lambda name: None,
    *,
    untie: bool = False,
) -> list[str]:
    """Write a packed model for other libraries, and read every packed layer back. Returns the names of all files.

    Args:
        source: an artifact whose layers the target holds, as :func:`ulbq.export.fit.check` says.
        folder: exists; side files, tokenizer, configuration and adapter land there too.
        dtype: of the tensors that are not packed; scales are float16.
        on_shard: called with each shard's name once it is written and read back.
        untie: store a tied head by itself too, for loaders that do not tie.

    Raises:
        InputError: a tensor is missing.
        NumericsError: a tensor does not fit the dtype, or what was written decodes to other weights than the artifact.
    """
    model, layers = skeleton(source), affine_layers(source)
    layout = _layout(target, source, layers)
    aliases, shapes = state_names(model), layer_shapes(source)
    shards: dict[str, tuple[str, ...]] = {}
    for shard, names in shard_names(model).items():
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            linear = name.removesuffix(".weight")
            if linear != name and linear in layers:
                found = layout.encode(layers[linear], source.read_packed(linear), shapes[linear])
                tensors |= {f"{linear}.{short}": tensor for short, tensor in found.items()}
            else:
                tensors[name] = dense_tensor(source, model, name, aliases[name], dtype)
                if untie:
                    tensors |= {alias: tensors[name].clone() for alias in aliases[name]}
        write_shard(folder / shard, tensors)
        shards[shard] = tuple(tensors)
        _read_back(source, folder / shard, layout, {n: layers[n] for n in layers if f"{n}.weight" in names}, shapes)
        on_shard(shard)
    shards |= {shard: tuple(names) for shard, names in source.write_carried(folder).items()}
    write_index(folder, shards)
    tied = bool(source.config.tie_word_embeddings) and not untie
    changes = {
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": layout.configuration,
    }
    written = [*shards, INDEX_NAME, *write_beside(source, folder, changes, adapter=True)]
    if target == "gptq":
        written.append("quantize_config.json")
        with writing(folder):
            text = json.dumps(layout.configuration, indent=2) + "\n"
            write_atomically(folder / "quantize_config.json", text.encode())
    return written


def _layout(
    target: Literal["gptq", "compressed-tensors"], source: ModelSource, layers: dict[str, AffineScheme]
) -> _Layout:
    dense = dense_linears(source)
    if target == "compressed-tensors":
        configuration = compressed_tensors.configuration(layers, dense)
        return _Layout(compressed_tensors.encode, compressed_tensors.decode, configuration)
    v1 = gptq.is_v1(layers)
    inside = f"{block_list(skeleton(source))[0]}."
    return _Layout(
        lambda scheme, packed, shape: gptq.encode(scheme, packed, shape, v1=v1),
        lambda tensors, bits: gptq.decode(tensors, bits, v1=v1),
        gptq.configuration(layers, tuple(name for name in dense if name.startswith(inside))),
    )


def _read_back(
    source: ModelSource,
    shard: Path,
    layout: _Layout,
    layers: Mapping[str, AffineScheme],
    shapes: Mapping[str, tuple[int, int]],
) -> None:
    """Compare every layer of a written shard with the artifact, to the bit. Raises NumericsError."""
    stored = LazyTensors([shard])
    for name, scheme in layers.items():
        prefix = f"{name}."
        shorts = [full.removeprefix(prefix) for full in stored.names if full.startswith(prefix)]
        found = layout.decode({short: stored.read(prefix + short) for short in shorts}, scheme.bits)
        if not torch.equal(found, formats.dequantize(scheme, source.read_packed(name), shapes[name][1])):
            raise NumericsError(
                f"What was written of '{name}' does not decode to the artifact's weights.",
                hint="This is a defect of ulbq, or of the disk: please report it with the command.",
            )
