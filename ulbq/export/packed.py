"""Model folders that other libraries load: dense, or with linear layers packed as GPTQ and compressed-tensors do."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from ulbq import formats
from ulbq.artifacts.shards import INDEX_NAME, LazyTensors, write_index, write_shard
from ulbq.errors import NumericsError
from ulbq.export.dense import adapters_to_merge, dense_tensor, shard_names, write_beside
from ulbq.export.fit import Candidate, Layer
from ulbq.export.targets.base import FULL_PRECISION, Conversion, Written, layer_reason
from ulbq.formats import AffineScheme, AnyScheme
from ulbq.models.blocks import skeleton
from ulbq.models.load import DTYPES
from ulbq.models.names import state_names
from ulbq.models.source import ModelSource
from ulbq.models.stored_names import StoredNames
from ulbq.nn.quant_linear import is_dense_linear

READ_BACK = "Every layer reads back to the bit"
OPENED = f"{READ_BACK}; opened again by transformers"


class PackedLayout(NamedTuple):
    """How a library stores layers.

    Attributes:
        encode: a layer's tensors by short name, from its scheme, our tensors and ``(out, in)``.
        decode: its float32 weight ``[out, in]``, from nothing but what is stored and the bits.
        configuration: what ``config.json`` says of it, and by which ``key``.
        tables: the table of tokens and the head, where they are packed and the library has them so too.
    """

    encode: Callable[..., dict[str, torch.Tensor]]
    decode: Callable[[Mapping[str, torch.Tensor], int], torch.Tensor]
    configuration: dict[str, Any]
    key: str = "quantization_config"
    tables: Mapping[str, Layer] = {}


def stored_layers(conversion: Conversion) -> tuple[dict[str, AffineScheme], tuple[str, ...]]:
    """Schemes of the packed layers, which are all affine, and what is dense: linear layers, the head, and routers.

    Both under the names that they are stored by.
    """
    source, candidate, naming = conversion.source, conversion.candidate, StoredNames(conversion.source.config)
    schemes = {
        naming.layer(name) or name: layer.scheme
        for name, layer in candidate.layers.items()
        if isinstance(layer.scheme, AffineScheme)
    }
    dense = [
        name
        for name, module in skeleton(source).named_modules()
        if name in candidate.routers or (is_dense_linear(module) and name not in source.packed)
    ]
    return schemes, tuple(naming.layer(name) or name for name in dense)


def bits(candidate: Candidate, stored_bits: Callable[..., int]) -> int:
    """What the packed layers of a model take where ``stored_bits(scheme, shape)`` is what one does."""
    return sum(stored_bits(layer.scheme, layer.shape) for layer in candidate.layers.values())


def dense_bits(scheme: AnyScheme, shape: tuple[int, int]) -> int:
    """What a layer ``(out, in)`` takes in half precision."""
    return 16 * math.prod(shape)


def unsupported_reason(candidate: Candidate, reason: Callable[..., str | None]) -> str | None:
    """Why a layout cannot hold a model, where ``reason(scheme, shape)`` says why not a layer; None where it can."""
    if not candidate.layers:
        return FULL_PRECISION
    if candidate.unpacked:
        return f"'{candidate.unpacked[0]}' stays dense in it, which this layout has no name for"
    if candidate.fused_expert is not None:
        kind, lost = candidate.config.model_type, candidate.fused_expert
        return f"models of the type '{kind}' store their experts as one, so that '{lost}' has no name in this layout"
    return layer_reason(candidate, reason)


def unopened_reason(candidate: Candidate, folder: Path, *packages: str) -> str | None:
    """Why transformers cannot run a folder here, as a whole sentence, where it takes ``packages`` to; None if it can.

    Its configuration is opened in any case.
    """
    AutoConfig.from_pretrained(folder, local_files_only=True)
    if candidate.routers:
        return f"{READ_BACK}; not run, for transformers reads no packed experts of this layout."
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{READ_BACK}; not run, for want of {' and '.join(missing)}." if missing else None


def write_folder(
    conversion: Conversion, folder: Path, on_shard: Callable[[str], None], layout: PackedLayout | None = None
) -> tuple[list[str], int]:
    """Write a model as shards, one of which is in memory at a time, and what lies beside them.

    Args:
        conversion: of a model that the layout holds.
        folder: exists; side files, tokenizer, configuration and adapter land there too.
        on_shard: called with each shard's name once it is written and read back.
        layout: of the packed layers, whose scales are float16 whatever the dtype; None where all is to be dense.

    Returns:
        The names of the files, and the bits of the packed layers, those of tables not among them.

    Raises:
        InputError: a tensor is missing; there is no adapter to merge, or it is damaged.
        NumericsError: a tensor does not fit the dtype, or what was written decodes to other weights than the artifact.
    """
    source, dtype, merge = conversion.source, DTYPES[conversion.dtype], conversion.merge_adapter
    model = skeleton(source)
    adapters = adapters_to_merge(source, model) if merge else {}
    packed = {**conversion.candidate.layers, **layout.tables} if layout is not None else {}
    stored = 0
    aliases, shards, naming = state_names(model), dict[str, tuple[str, ...]](), StoredNames(source.config)
    for shard, names in shard_names(model).items():
        tensors: dict[str, torch.Tensor] = {}
        encoded: dict[str, torch.Tensor] = {}
        for name in names:
            linear = name.removesuffix(".weight")
            if layout is not None and linear != name and linear in packed:
                found = layout.encode(packed[linear].scheme, source.read_packed(linear), packed[linear].shape)
                encoded |= {f"{naming.layer(linear)}.{short}": tensor for short, tensor in found.items()}
                if linear not in layout.tables:
                    stored += 8 * sum(tensor.nbytes for tensor in found.values())
            else:
                tensors[name] = dense_tensor(
                    source, model, name, aliases[name], dtype, adapters.get(linear), keeps=conversion.keeps
                )
                if conversion.untie:
                    tensors |= {alias: tensors[name].clone() for alias in aliases[name]}
        written = encoded | naming.dense(tensors)
        write_shard(folder / shard, written)
        shards[shard] = tuple(written)
        if layout is not None:
            here = {name: layer for name, layer in packed.items() if f"{name}.weight" in names}
            _read_back(source, folder / shard, layout, naming, here)
        on_shard(shard)
    shards |= {shard: tuple(names) for shard, names in source.write_carried(folder).items()}
    write_index(folder, shards)
    changes: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if layout is not None:
        tied = bool(getattr(source.config, "tie_word_embeddings", False)) and not conversion.untie
        changes = {"tie_word_embeddings": tied, **changes, layout.key: layout.configuration}
    return [*shards, INDEX_NAME, *write_beside(source, folder, changes, adapter=not merge)], stored


def write_packed(
    conversion: Conversion, folder: Path, layout: PackedLayout, on_shard: Callable[[str], None]
) -> Written:
    """:func:`write_folder` with packed layers, and how they are stored."""
    names, stored = write_folder(conversion, folder, on_shard, layout)
    rest = "as it is stored there" if conversion.keeps else f"in {conversion.dtype}"
    return Written(
        f"the artifact's own codes, to the bit; what is not packed {rest}", names, bits=stored, tables=layout.tables
    )


def _read_back(
    source: ModelSource, shard: Path, layout: PackedLayout, naming: StoredNames, layers: Mapping[str, Layer]
) -> None:
    """Compare every layer of a written shard with the artifact, to the bit. Raises NumericsError."""
    stored = LazyTensors([shard])
    for name, (scheme, shape) in layers.items():
        prefix = f"{naming.layer(name)}."
        shorts = [full.removeprefix(prefix) for full in stored.names if full.startswith(prefix)]
        found = layout.decode({short: stored.read(prefix + short) for short in shorts}, scheme.bits)
        if not torch.equal(found, formats.dequantize(scheme, source.read_packed(name), shape[1])):
            raise NumericsError(
                f"What was written of '{name}' does not decode to the artifact's weights.",
                hint="This is a defect of ulbq, or of the disk: please report it with the command.",
            )
